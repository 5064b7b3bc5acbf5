"""What one run of `mlx_step35.bench` measures: its flags, each refused where it would have no effect."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

from mlx_step35.bench.sweep import SweepOptions
from mlx_step35.bench.synthetic import CHUNK, CPU_CHUNK
from mlx_step35.checkpoint import NANO
from mlx_step35.decoding import MTPChoice
from mlx_step35.errors import RequestError
from mlx_step35.quantization import AFFINE_BITS

NUM_PAIRS = 5
NUM_PROMPT = 1024
BITS = 4
SYNTHETIC_CONTEXT = 2048

# Which flags a measurement uses, beside --model and --json.
_SWEEP = frozenset({"contexts", "mtp", "temps", "num_tokens", "prefill_step_size", "text", "plot"})
_COMPARISON = frozenset(
    {"compare_mlx_lm", "pairs", "prompt_tokens", "num_tokens", "prefill_step_size", "text"}
)
_SYNTHETIC = frozenset({"synthetic", "contexts", "bits", "chunk"})


@dataclass(frozen=True, slots=True)
class Job:
    """One run of the command."""

    model: str | None
    text: Path | None
    options: SweepOptions
    has_own_contexts: bool
    compares: bool
    pairs: int
    num_prompt: int
    is_synthetic: bool
    bits: int
    synthetic_context: int
    chunk: int | None
    plot: Path | None
    is_json: bool


def parse_job(arguments: Sequence[str]) -> Job:
    """The job that flags describe. Raises RequestError for flags that do not go together."""
    given = _parser().parse_args(arguments)
    measurement, used = "the sweep over contexts", _SWEEP
    if given.compare_mlx_lm:
        measurement, used = "--compare-mlx-lm", _COMPARISON
    elif given.synthetic:
        measurement, used = "--synthetic", _SYNTHETIC
    for name, value in vars(given).items():
        if name not in used | {"model", "json"} and value not in (None, False):
            raise RequestError(f"--{name.replace('_', '-')} has no effect on {measurement}", field=name)
    if given.synthetic and given.contexts and len(given.contexts) > 1:
        raise RequestError("--synthetic measures one context", field="contexts")
    defaults = SweepOptions()
    return Job(
        model=given.model,
        text=given.text,
        options=SweepOptions(
            contexts=given.contexts or defaults.contexts,
            depths=given.mtp or defaults.depths,
            temperatures=given.temps or defaults.temperatures,
            num_tokens=given.num_tokens or defaults.num_tokens,
            prefill_step_size=given.prefill_step_size or defaults.prefill_step_size,
        ),
        has_own_contexts=given.contexts is not None,
        compares=given.compare_mlx_lm,
        pairs=given.pairs or NUM_PAIRS,
        num_prompt=given.prompt_tokens or NUM_PROMPT,
        is_synthetic=given.synthetic is not None,
        bits=given.bits or BITS,
        synthetic_context=given.contexts[0] if given.contexts else SYNTHETIC_CONTEXT,
        chunk=given.chunk,
        plot=given.plot,
        is_json=given.json,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mlx_step35.bench", description="Measure speed and memory.")
    add: Callable[..., Any] = parser.add_argument
    defaults = SweepOptions()
    contexts = ",".join(str(context) for context in defaults.contexts)
    count, several = partial(_whole, 1), partial(_whole, 2)
    add("--model", help=f"directory or hub repository; '{NANO}', the bundled one, by default")
    add(
        "--contexts",
        type=_list(partial(_whole, 0)),
        help=f"lengths (default: {contexts}, as far as they fit)",
    )
    add("--mtp", type=_list(_depth), help="depths (default: off,1,2,3,auto)")
    add("--temps", type=_list(_temperature), help="temperatures (default: 0,1)")
    add("--num-tokens", type=several, help=f"generated per run (default: {defaults.num_tokens})")
    add(
        "--prefill-step-size",
        type=count,
        help=f"prompt tokens a pass (default: {defaults.prefill_step_size})",
    )
    add("--text", type=Path, help="file whose text is the prompt; a bundled one by default")
    add("--compare-mlx-lm", action="store_true", help="instead: mlx-lm on the same weights, in turn")
    add("--pairs", type=count, help=f"pairs of runs for that (default: {NUM_PAIRS})")
    add("--prompt-tokens", type=several, help=f"their prompt (default: {NUM_PROMPT})")
    add("--synthetic", choices=["full-layer"], help="instead: real shapes, random weights, by layer")
    add("--bits", type=int, choices=AFFINE_BITS, help=f"of the synthetic weights (default: {BITS})")
    add("--chunk", type=count, help=f"synthetic prefill chunk (default: {CHUNK}, on a CPU {CPU_CHUNK})")
    add("--plot", type=Path, metavar="FILE.png", help="also draw the curves")
    add("--json", action="store_true", help="as JSON")
    return parser


def _list(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    return lambda text: tuple(kind(part) for part in text.split(","))


def _whole(minimum: int, text: str) -> int:
    if not text.strip().isdecimal() or int(text) < minimum:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {minimum}, found '{text}'")
    return int(text)


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not isfinite(value) or value < 0:
        raise argparse.ArgumentTypeError(f"expected a temperature of at least 0, found '{text}'")
    return value


def _depth(text: str) -> MTPChoice:
    if text not in ("off", "auto", "1", "2", "3"):
        raise argparse.ArgumentTypeError(f"expected off, auto, 1, 2 or 3, found '{text}'")
    # mypy does not narrow a string by the tuple it was found in.
    return int(text) if text.isdecimal() else text  # type: ignore[return-value]
