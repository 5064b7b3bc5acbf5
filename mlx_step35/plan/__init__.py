"""The command `mlx_step35.plan`: does it fit, up to which context, and how fast will it be.

Everything follows from the config and a recipe, so nothing is downloaded but a config.json, and that only for
a repository the hub's local cache does not know. Times are estimates and say so.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_step35 import costs
from mlx_step35.config import ModelConfig
from mlx_step35.errors import CapacityError, RequestError
from mlx_step35.exits import run_command
from mlx_step35.memory import PREFILL_CHUNKS, Planner, Stored, raise_command, snapshot_bytes
from mlx_step35.plan.report import describe
from mlx_step35.plan.subject import (
    Machine,
    Subject,
    by_bits,
    by_recipe,
    existing,
    find_config,
    find_machine,
    release_config,
)
from mlx_step35.quantization import Quantization
from mlx_step35.recipes import RECIPES, RecipeName, uniform_recipe, with_mtp
from mlx_step35.speed import M4_MAX, Reads, decode_estimates, efficiency, prefill_rate, prefill_speed

DEFAULT_CONTEXT = 65536
SPEED_CONTEXTS = (0, 8192, 32768, 65536, 131072, 262144)
KV_CONTEXTS = (8192, 16384, 32768, 65536, 131072, 262144)


@dataclass(frozen=True, slots=True)
class Question:
    """One run of the command."""

    mac: int | None
    chip: str | None
    context: int | None
    model: str | None
    recipe: RecipeName | None
    bits: int | None
    mtp_bits: int | None
    chunk: int


def answer(question: Question) -> dict[str, Any]:
    """The whole plan as JSON values. Raises RequestError for what cannot be planned."""
    machine, config = find_machine(question.mac, question.chip), find_config(question.model)
    context = question.context or min(DEFAULT_CONTEXT, config.context_length)
    chunk = question.chunk
    if context > config.context_length:
        raise RequestError(f"context {context}: the model holds {config.context_length}", field="context")
    recommended = recommend(config, machine, context, chunk)
    subject = _subject(question, config, recommended)
    planner = Planner.of_tensors(config, subject.tensors, machine.backend)
    footprint = planner.footprint(context, chunk)
    is_raised = machine.raised_limit > machine.default_limit
    return {
        "machine": machine.name,
        "model": subject.name,
        "context": context,
        **_sizes(subject, context, machine.backend.value_bytes),
        "resident_bytes": footprint.weights + footprint.mtp,
        "cache_bytes": footprint.cache,
        "draft_bytes": footprint.drafts,
        "prefill_chunk": chunk,
        "workspace_bytes": footprint.workspace,
        "peak_bytes": footprint.peak,
        "memory_bytes": machine.memory_bytes,
        "limit_default_bytes": machine.default_limit,
        "limit_raised_bytes": machine.raised_limit,
        "fits_default": footprint.peak <= machine.default_limit,
        "fits_raised": footprint.peak <= machine.raised_limit,
        "max_context_default": planner.max_context(machine.default_limit, chunk),
        "max_context_raised": planner.max_context(machine.raised_limit, chunk),
        "raise_command": raise_command(machine.raised_limit) if is_raised else None,
        "recommended_recipe": recommended,
        "speed_estimate": _speed(subject, machine),
    }


def recommend(
    config: ModelConfig, machine: Machine, context: int, chunk: int = PREFILL_CHUNKS[0]
) -> RecipeName | None:
    """The machine's own recipe, or the largest smaller one, that fits once the limit is raised."""
    for name in reversed(RECIPES):
        if int(name.removeprefix("mac-")) * costs.GIB > machine.memory_bytes:
            continue
        try:
            tensors = by_recipe(config, name, 4).tensors
        except (CapacityError, RequestError):
            continue
        peak = Planner.of_tensors(config, tensors, machine.backend).footprint(context, chunk).peak
        if peak <= machine.raised_limit:
            return name
    return None


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; exit code 0 whether it fits or not."""
    given = _parser().parse_args(arguments)
    if code := run_command(lambda: _report(given)):
        sys.exit(code)


def _report(given: argparse.Namespace) -> None:
    found = answer(_question(given))
    print(json.dumps(found, indent=2) if given.json else describe(found))


def _subject(question: Question, config: ModelConfig, recommended: RecipeName | None) -> Subject:
    """The checkpoint of the question: as named, else as recommended."""
    if question.bits is not None:
        return by_bits(config, question.bits, question.mtp_bits)
    if question.model is not None and question.recipe is None:
        return existing(question.model, config)
    return by_recipe(config, question.recipe or recommended or RECIPES[0], question.mtp_bits)


def _sizes(subject: Subject, context: int, value_bytes: int) -> dict[str, Any]:
    """Bytes on disk, and of caches whose values have so many bytes, exactly."""
    config = subject.config
    heads = sum(entry.tensor.nbytes for entry in subject.tensors if entry.mtp_layer is not None)
    contexts = [length for length in KV_CONTEXTS if length <= config.context_length]
    return {
        "kinds_bytes": _by_kind(subject.tensors),
        "weights_bytes": sum(entry.tensor.nbytes for entry in subject.tensors) - heads,
        "mtp_bytes": heads,
        "kv_bytes": costs.kv_bytes(config, context, value_bytes),
        "kv_bytes_by_context": {
            str(length): costs.kv_bytes(config, length, value_bytes) for length in contexts
        },
        "mtp_kv_bytes": costs.mtp_kv_bytes(config, context, value_bytes) if heads else 0,
        "snapshot_bytes": snapshot_bytes(config, context, value_bytes, mtp=heads > 0),
    }


def _speed(subject: Subject, machine: Machine) -> dict[str, Any] | None:
    """Decode and prefill estimates; only Step-3.5-Flash has published figures to scale them by."""
    config, chip, release = subject.config, machine.chip, release_config()
    if chip is None or config.layers != release.layers:
        return None
    reference = with_mtp(release, uniform_recipe(release, Quantization(4, 64)), 4)
    share = efficiency(M4_MAX, release, reference)
    has_mtp = any(entry.mtp_layer is not None for entry in subject.tensors)
    contexts = [context for context in SPEED_CONTEXTS if context <= config.context_length]
    decode = decode_estimates(
        Reads.of_tensors(config, subject.tensors),
        chip.bandwidth * share,
        contexts,
        len(config.mtp_layers) if has_mtp else 0,
    )
    rate = prefill_rate(chip, config)
    own = "" if chip.name == "M4 Max" else ", which the M4 Max reached"
    return {
        "is_estimate": True,
        "chip": chip.name,
        "bandwidth_bytes_per_s": chip.bandwidth,
        "efficiency": round(share, 4),
        "basis": f"{share:.0%} of {chip.bandwidth / 1e9:.0f} GB/s{own} in llama.cpp; "
        "drafts accepted as reported for Step-3.7",
        "decode": [
            {"context": row.context, "tokens_per_s": [round(value, 2) for value in row.by_depth]}
            for row in decode
        ],
        "prefill": [
            {"prompt": context, "tokens_per_s": round(prefill_speed(config, rate, context), 1)}
            for context in contexts
            if rate and context
        ],
    }


def _by_kind(tensors: Sequence[Stored]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for entry in tensors:
        kind = "MTP layers" if entry.mtp_layer is not None else entry.kind
        sizes[kind] = sizes.get(kind, 0) + entry.tensor.nbytes
    return sizes


def _question(given: argparse.Namespace) -> Question:
    if given.mac is not None and given.mac < 8:
        raise RequestError(f"--mac {given.mac}: its memory in GB, for instance 128", field="mac")
    if given.context is not None and given.context < 1:
        raise RequestError(f"--context {given.context}: at least 1 token", field="context")
    if given.prefill_step_size < 1:
        raise RequestError("--prefill-step-size must be at least 1", field="prefill_step_size")
    return Question(
        mac=given.mac,
        chip=given.chip,
        context=given.context,
        model=given.model,
        recipe=given.recipe,
        bits=given.bits,
        mtp_bits=None if given.no_mtp else given.mtp_bits,
        chunk=given.prefill_step_size,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlx_step35.plan", description="Memory and estimated speed, before anything is downloaded."
    )
    add = parser.add_argument
    add("--mac", type=int, metavar="GB", help="memory of the Mac; without it, of this machine")
    add("--chip", help="its chip, for a speed estimate: 'M4 Max', 'M3 Ultra', ...")
    add("--context", type=int, help=f"tokens (default: {DEFAULT_CONTEXT})")
    add("--model", help="directory or hub repository; without it, the original release's config")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--recipe", choices=RECIPES, help="a conversion by this recipe")
    which.add_argument("--bits", type=int, help="a uniform conversion; 16 is unquantised")
    heads = parser.add_mutually_exclusive_group()
    heads.add_argument("--mtp-bits", type=int, default=4, help="of the MTP layers (default: %(default)s)")
    heads.add_argument("--no-mtp", action="store_true", help="without the MTP layers")
    add("--prefill-step-size", type=int, default=PREFILL_CHUNKS[0], help="prompt tokens a pass (%(default)s)")
    add("--json", action="store_true", help="as JSON")
    return parser
