"""Refusing what does not fit, with the numbers, before anything of it is allocated.

A Mac that is asked for more than its wired limit may take the whole system down, so weights are compared with
the limit, with free memory and with what is in use before they are read, and every prompt before its prefill.
An answer that may outgrow what is left is not refused, because few get as long as they may: it ends early.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_step35.checkpoint import read_config
from mlx_step35.checkpoint.inventory import inventory
from mlx_step35.config import ModelConfig
from mlx_step35.costs import readable_bytes
from mlx_step35.errors import CapacityError, RequestError
from mlx_step35.memory import CPU, GPU, PREFILL_CHUNKS, Backend, Planner, raise_command, raised_limit

# What a model that was just loaded must still have room for.
MIN_CONTEXT = 2048


@dataclass(frozen=True, slots=True)
class Headroom:
    """Bytes: what the device allows in all, what of it is in use, and what the system has free."""

    limit: int
    in_use: int
    free: int

    @property
    def available(self) -> int:
        return max(min(self.limit - self.in_use, self.free), 0)


def headroom() -> Headroom:
    """The device's memory now; freed buffers that MLX keeps for reuse count as free."""
    return Headroom(device_limit(), mx.get_active_memory(), free_memory() + mx.get_cache_memory())


def device_backend() -> Backend:
    """How the default device holds a model."""
    return CPU if mx.default_device().type == mx.DeviceType.cpu else GPU


def device_limit() -> int:
    """Bytes that arrays may take: the wired limit on a Mac, a graphics card's or the system's memory."""
    info = mx.device_info()
    recommended = info.get("max_recommended_working_set_size", info.get("memory_size"))
    if device_backend() == CPU or recommended is None:
        return total_memory()
    return int(recommended)


def total_memory() -> int:
    """Bytes of memory this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_memory() -> int:
    """Bytes that can be taken without swapping; caches that the system gives up at once count."""
    if sys.platform == "darwin":
        output = subprocess.run(["vm_stat"], capture_output=True, text=True, check=True).stdout
        return parse_vm_stat(output)
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    return total_memory()


def parse_vm_stat(output: str) -> int:
    """Free bytes from what macOS's `vm_stat` prints."""
    first, *lines = output.splitlines()
    page_bytes = int(first.split("page size of")[1].split()[0])
    pages = {name: int(count.strip(" .")) for name, _, count in (line.partition(":") for line in lines)}
    kinds = ("Pages free", "Pages inactive", "Pages speculative", "Pages purgeable")
    return page_bytes * sum(pages.get(kind, 0) for kind in kinds)


def check_load(path: Path, max_context: int | None = None, room: Headroom | None = None) -> None:
    """Raise CapacityError if the checkpoint, with room for some context, does not fit this machine now.

    `max_context` is the context it must be able to hold, a small one by default. Reads headers only.
    """
    config = read_config(path)
    planner = Planner.of_tensors(config, inventory(path, config), device_backend())
    context = min(max_context or MIN_CONTEXT, config.context_length)
    needed = planner.footprint(context, PREFILL_CHUNKS[-1]).peak
    room = room or headroom()
    if needed <= room.available:
        return
    message = (
        f"{path} takes {readable_bytes(planner.loaded_bytes)} and {readable_bytes(needed)} with a context of "
        f"{context} tokens, but {readable_bytes(room.available)} are available ({_described(room)})"
    )
    raised = raised_limit(total_memory())
    if sys.platform == "darwin" and room.limit < needed <= raised:
        message += f"; raise the limit with: {raise_command(raised)}"
    raise CapacityError(message)


def prefill_chunk(planner: Planner, now: int, then: int, step_size: int, room: Headroom | None = None) -> int:
    """Prompt tokens per pass, at most `step_size`, with which a cache can go from `now` to `then` tokens.

    Raises RequestError if that context can never fit beside the weights, CapacityError if it cannot now.
    """
    room = room or headroom()
    narrower = [chunk for chunk in PREFILL_CHUNKS if chunk < step_size]
    for chunk in (step_size, *narrower):
        if planner.growth_bytes(now, then, chunk) <= room.available:
            return chunk
    smallest = min(step_size, PREFILL_CHUNKS[-1])
    peak = planner.footprint(then, smallest).peak
    if peak > room.limit:
        most = planner.max_context(room.limit, smallest)
        raise RequestError(
            f"a context of {then} tokens takes {readable_bytes(peak)} with the weights, the limit is "
            f"{readable_bytes(room.limit)}: at most {most} tokens fit",
            field="prompt",
            code="context_length_exceeded",
        )
    more = planner.growth_bytes(now, then, smallest)
    raise CapacityError(
        f"a context of {then} tokens needs {readable_bytes(more)} more, but "
        f"{readable_bytes(room.available)} are available ({_described(room)})"
    )


def answer_length(planner: Planner, now: int, then: int, wanted: int, room: Headroom | None = None) -> int:
    """How many of `wanted` tokens can follow once a cache has gone from `now` to `then` tokens; at least one.

    An answer grows the full-attention layers as a prompt does, a token at a time.
    """
    available = (room or headroom()).available
    low, high = 1, max(wanted, 1)
    while low < high:
        # The whole answer fits nearly always, so it is tried first.
        middle = high if low == 1 and high == wanted else (low + high + 1) // 2
        if planner.growth_bytes(now, then + middle, 1) <= available:
            low = middle
        else:
            high = middle - 1
    return low


def shortage(
    planner: Planner, now: int, then: int, wanted: int, freeable: int, room: Headroom | None = None
) -> int:
    """Bytes to free, of `freeable`, to take a cache from `now` to `then` tokens with `wanted` to follow.

    If these can never follow, as many as can; 0 if freeing does not help.
    """
    room = room or headroom()
    emptied = Headroom(room.limit, room.in_use - freeable, room.free + freeable)
    answer = answer_length(planner, now, then, wanted, emptied)
    needed = max(
        planner.growth_bytes(now, then, PREFILL_CHUNKS[-1]), planner.growth_bytes(now, then + answer, 1)
    )
    return 0 if needed > emptied.available else max(needed - room.available, 0)


def planner_of(config: ModelConfig, arrays: list[tuple[str, mx.array]]) -> Planner:
    """A planner for the parameters of a loaded model."""
    heads = sum(array.nbytes for name, array in arrays if name.startswith("mtp."))
    return Planner(config, sum(array.nbytes for _, array in arrays) - heads, heads, device_backend())


def _described(room: Headroom) -> str:
    limit, in_use, free = map(readable_bytes, (room.limit, room.in_use, room.free))
    return f"limit {limit}, in use {in_use}, free in the system {free}"
