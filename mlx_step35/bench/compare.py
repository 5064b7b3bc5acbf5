"""Stock mlx-lm beside this package: the same weights, the same tokens, runs taken in turn."""

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_step35.bench.timing import Spread
from mlx_step35.checkpoint import load_checkpoint
from mlx_step35.checkpoint.headers import read_listing
from mlx_step35.convert import convert
from mlx_step35.decoding import DecodeOptions, decode, prepare
from mlx_step35.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class Timed:
    """One run: seconds until the first token and after it, by the clock and of processor time."""

    prefill_s: float
    decode_s: float
    prefill_cpu_s: float
    decode_cpu_s: float
    tokens: list[int]


Run = Callable[[Sequence[int], int], Timed]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Ratios are ours over theirs, of tokens per second, one per pair of runs.

    `cpu_ratio` is of tokens per second of processor time, which a busy machine disturbs less; on a GPU it
    says what the host has to do.
    """

    num_prompt: int
    num_tokens: int
    pairs: int
    same_tokens: bool
    prefill: dict[str, Spread]
    decode: dict[str, Spread]

    def as_json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.num_prompt,
            "generated_tokens": self.num_tokens,
            "pairs": self.pairs,
            "same_tokens": self.same_tokens,
            "prefill": {name: spread.as_json() for name, spread in self.prefill.items()},
            "decode": {name: spread.as_json() for name, spread in self.decode.items()},
        }

    def __str__(self) -> str:
        lines = [
            f"against mlx-lm: {self.pairs} pairs of runs, {self.num_prompt} prompt and "
            f"{self.num_tokens} generated tokens, greedy, without drafts; median (range)",
            "",
            f"  {'':<10}{'mlx_step35, t/s':>28}{'mlx-lm, t/s':>28}{'ratio':>24}{'of CPU time':>24}",
        ]
        for title, found in (("prefill", self.prefill), ("decode", self.decode)):
            cells = "".join(f"{found[name]!s:>28}" for name in ("ours", "theirs"))
            ratios = "".join(f"{found[name]!s:>24}" for name in ("ratio", "cpu_ratio"))
            lines.append(f"  {title:<10}{cells}{ratios}")
        if not self.same_tokens:
            lines.append("  the two gave different tokens")
        return "\n".join(lines)


def compare(
    path: Path, text: Sequence[int], num_prompt: int, num_tokens: int, pairs: int, step_size: int = 2048
) -> Comparison:
    """Run both in turn; the first pair warms up and is not counted."""
    prompt = (list(text) * (num_prompt // len(text) + 1))[:num_prompt]
    with comparable(path) as same:
        runs = _ours(same, step_size), _theirs(same, step_size)
        pairs_run = [[run(prompt, num_tokens) for run in runs] for _ in range(pairs + 1)]
    outputs = [timed.tokens for pair in pairs_run for timed in pair]
    return Comparison(
        num_prompt,
        num_tokens,
        pairs,
        all(tokens == outputs[0] for tokens in outputs),
        _spreads([[(num_prompt / t.prefill_s, num_prompt / t.prefill_cpu_s) for t in p] for p in pairs_run]),
        _spreads(
            [[(len(t.tokens) / t.decode_s, len(t.tokens) / t.decode_cpu_s) for t in p] for p in pairs_run]
        ),
    )


@contextmanager
def comparable(path: Path) -> Iterator[Path]:
    """A directory that both can run: on the CPU unquantised weights must be float32, so others are copied."""
    listing = read_listing(path)
    is_packed = any(entry.dtype == "U32" for entry in listing.entries.values())
    is_float32 = all(entry.dtype == "F32" for entry in listing.entries.values())
    if mx.default_device().type != mx.DeviceType.cpu or is_packed or is_float32:
        yield path
        return
    directory = Path(tempfile.mkdtemp(prefix="mlx_step35-bench-"))
    try:
        convert(str(path), directory / "float32", dtype="float32")
        yield directory / "float32"
    finally:
        shutil.rmtree(directory)


def _spreads(pairs: Sequence[Sequence[tuple[float, float]]]) -> dict[str, Spread]:
    """From tokens per second, by the clock and of processor time; the first pair is the warm-up."""
    counted = pairs[1:]
    return {
        "ours": Spread.of([ours[0] for ours, _ in counted]),
        "theirs": Spread.of([theirs[0] for _, theirs in counted]),
        "ratio": Spread.of([ours[0] / theirs[0] for ours, theirs in counted]),
        "cpu_ratio": Spread.of([ours[1] / theirs[1] for ours, theirs in counted]),
    }


def _timed(tokens: Iterator[int]) -> Timed:
    clocks = [(time.perf_counter(), time.process_time())]
    found = [next(tokens)]
    clocks.append((time.perf_counter(), time.process_time()))
    found += tokens
    clocks.append((time.perf_counter(), time.process_time()))
    (start, start_cpu), (first, first_cpu), (end, end_cpu) = clocks
    return Timed(first - start, end - first, first_cpu - start_cpu, end_cpu - first_cpu, found)


def _ours(path: Path, step_size: int) -> Run:
    model = load_checkpoint(path)
    prepare(model)

    def run(prompt: Sequence[int], num_tokens: int) -> Timed:
        options = DecodeOptions(num_tokens, "off", lookup=False, prefill_step_size=step_size)
        with closing(decode(model, prompt, model.make_cache(), SamplingParams(), options)) as decoded:
            return _timed(item.token for item in decoded)

    return run


def _theirs(path: Path, step_size: int) -> Run:
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    # It does not know the field and would take the MTP layers of the lists for backbone layers' settings.
    config = json.loads((path / "config.json").read_text())
    model, _ = load_model(path, model_config=config)

    def run(prompt: Sequence[int], num_tokens: int) -> Timed:
        step = generate_step(
            mx.array(list(prompt)), model, max_tokens=num_tokens, prefill_step_size=step_size
        )
        return _timed(int(token) for token, _ in step)

    return run
