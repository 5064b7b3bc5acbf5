"""The command `mlx_step35.bench`: prefill and decode at context frontiers, beside mlx-lm, or by layer.

Figures hold for the machine, the weights and the text they were taken with; all three are in the output.
Acceptance of drafts depends on the text, which is repeated until it is as long as the longest context.
"""

import argparse
import io
import json
import platform
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_step35.bench.compare import Comparison, compare
from mlx_step35.bench.plot import check_plot, plot
from mlx_step35.bench.sweep import Frontier, SweepOptions, sweep
from mlx_step35.bench.synthetic import CHUNK, CPU_CHUNK, Synthetic, measure
from mlx_step35.chat.tokenizer import Tokenizer
from mlx_step35.checkpoint import NANO, load_checkpoint, read_config, resolve_model
from mlx_step35.costs import readable_bytes
from mlx_step35.decoding import MTPChoice, prepare
from mlx_step35.errors import RequestError, Step35Error
from mlx_step35.guard import check_load, total_memory
from mlx_step35.plan.subject import find_config
from mlx_step35.quantization import Quantization

TEXT = "heldout.txt"


@dataclass(frozen=True, slots=True)
class Job:
    """One run of the command."""

    model: str | None
    text: Path | None
    options: SweepOptions
    compares: bool
    pairs: int
    num_prompt: int
    is_synthetic: bool
    bits: int
    synthetic_context: int
    chunk: int | None
    plot: Path | None


@dataclass(frozen=True, slots=True)
class Report:
    """Everything one run found, and where."""

    machine: str
    versions: str
    model: str
    frontiers: tuple[Frontier, ...] = ()
    comparison: Comparison | None = None
    synthetic: Synthetic | None = None

    def as_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {"machine": self.machine, "versions": self.versions, "model": self.model}
        if self.frontiers:
            found["contexts"] = [frontier.as_json() for frontier in self.frontiers]
        if self.comparison:
            found["mlx_lm"] = self.comparison.as_json()
        if self.synthetic:
            found["synthetic"] = self.synthetic.as_json()
        return found

    def __str__(self) -> str:
        lines = [f"{self.model}; {self.machine}; {self.versions}", ""]
        lines += _tables(self.frontiers) if self.frontiers else []
        lines += [str(found) for found in (self.comparison, self.synthetic) if found]
        return "\n".join(lines)


def run(job: Job, on_done: Callable[[str], None] = lambda what: None) -> Report:
    """Do what the job says. Raises RequestError or CapacityError before anything long starts."""
    if job.plot is not None:
        check_plot(job.plot)
    machine, versions = _machine(), f"mlx-step35 {version('mlx-step35')}, mlx {version('mlx')}"
    if job.is_synthetic:
        config = find_config(job.model)
        found = measure(config, Quantization(job.bits, 64), job.synthetic_context, job.chunk, on_done)
        return Report(machine, versions, f"full-size layers, {job.bits} bits", synthetic=found)
    name = job.model or NANO
    path = resolve_model(name)
    text = _tokens(path, job.text)
    if job.compares:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            comparison = compare(
                path,
                text,
                job.num_prompt,
                job.options.num_tokens,
                job.pairs,
                job.options.prefill_step_size,
            )
        return Report(machine, f"{versions}, mlx-lm {version('mlx-lm')}", name, comparison=comparison)
    config = read_config(path)
    longest = max(job.options.contexts) + job.options.num_tokens + 2
    if longest > config.context_length:
        raise RequestError(f"{longest} tokens, the model holds {config.context_length}", field="contexts")
    check_load(path, longest)
    model = load_checkpoint(path)
    prepare(model)
    options = job.options if model.mtp is not None else _without_drafts(job.options)
    frontiers = tuple(sweep(model, text, options, on_done))
    if job.plot is not None:
        plot(frontiers, f"{name}, {machine}", job.plot)
    return Report(machine, versions, name, frontiers)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: exit code 2 for a mistake of the caller or too little memory."""
    given = _parser().parse_args(arguments)
    try:
        report = run(_job(given), lambda what: print(what, file=sys.stderr, flush=True))
    except Step35Error as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(json.dumps(report.as_json(), indent=2) if given.json else report)


def _tables(frontiers: Sequence[Frontier]) -> list[str]:
    first = frontiers[0].decodes
    heads = [f"{run.depth}, T={run.temperature:g}" for run in first]
    lines = ["decode tokens/s by mtp depth and temperature; in brackets tokens per pass", ""]
    lines.append(f"  {'context':>8}" + "".join(f"{head:>15}" for head in heads))
    for frontier in frontiers:
        cells = [f"{run.tokens_per_s:.2f} ({run.tokens_per_pass:.2f})" for run in frontier.decodes]
        lines.append(f"  {frontier.context:>8,}" + "".join(f"{cell:>15}" for cell in cells))
    widths = list(frontiers[0].steps)
    lines += [
        "",
        "prefill, memory, and milliseconds of one pass run alone: host (building, sending) + wait",
        "",
    ]
    lines.append(
        f"  {'context':>8}{'prefill t/s':>13}{'first token':>13}{'peak':>10}"
        + "".join(f"{f'{width} tokens':>18}" for width in widths)
    )
    for frontier in frontiers:
        steps = [
            f"{frontier.steps[w].host_s * 1e3:.2f} + {frontier.steps[w].wait_s * 1e3:.2f}" for w in widths
        ]
        lines.append(
            f"  {frontier.context:>8,}{frontier.prefill_tokens_per_s:>13.1f}{frontier.first_token_s:>11.2f} s"
            f"{readable_bytes(frontier.peak_bytes):>10}" + "".join(f"{cell:>18}" for cell in steps)
        )
    return lines


def _machine() -> str:
    info = mx.device_info()
    name = info.get("device_name", platform.processor() or platform.machine())
    device = mx.default_device().type
    kind = "CPU" if device == mx.DeviceType.cpu else "GPU"
    return f"{name} ({kind}, {total_memory() / 1e9:.0f} GB, {platform.platform(terse=True)})"


def _tokens(path: Path, text: Path | None) -> list[int]:
    try:
        content = (files("mlx_step35") / TEXT).read_text("utf-8") if text is None else text.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read {text}: {error}", field="text") from None
    tokenizer = Tokenizer.from_directory(path)
    bos = tokenizer.bos_token_id
    return ([] if bos is None else [bos]) + tokenizer.encode_text(content)


def _without_drafts(options: SweepOptions) -> SweepOptions:
    return SweepOptions(
        options.contexts, ("off",), options.temperatures, options.num_tokens, options.prefill_step_size
    )


def _job(given: argparse.Namespace) -> Job:
    options = SweepOptions(
        contexts=given.contexts,
        depths=given.mtp,
        temperatures=given.temps,
        num_tokens=given.num_tokens,
        prefill_step_size=given.prefill_step_size,
    )
    if given.num_tokens < 2:
        raise RequestError("--num-tokens must be at least 2", field="num_tokens")
    if given.synthetic and given.compare_mlx_lm:
        raise RequestError("choose --synthetic or --compare-mlx-lm", field="synthetic")
    if given.plot and (given.synthetic or given.compare_mlx_lm):
        raise RequestError("--plot draws the sweep over contexts only", field="plot")
    return Job(
        model=given.model,
        text=given.text,
        options=options,
        compares=given.compare_mlx_lm,
        pairs=given.pairs,
        num_prompt=given.prompt_tokens,
        is_synthetic=given.synthetic is not None,
        bits=given.bits,
        synthetic_context=given.contexts[0] if len(given.contexts) == 1 else 2048,
        chunk=given.chunk,
        plot=given.plot,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mlx_step35.bench", description="Measure speed and memory.")
    add = parser.add_argument
    defaults = SweepOptions()
    add("--model", help=f"directory or hub repository; '{NANO}', the bundled one, by default")
    add("--contexts", type=_integers, default=defaults.contexts, help="lengths, such as 0,2048,8192")
    add("--mtp", type=_depths, default=defaults.depths, help="depths (default: off,1,2,3,auto)")
    add("--temps", type=_floats, default=defaults.temperatures, help="temperatures (default: 0,1)")
    add("--num-tokens", type=int, default=defaults.num_tokens, help="generated per run (%(default)s)")
    add("--prefill-step-size", type=int, default=defaults.prefill_step_size, help="prompt tokens a pass")
    add("--text", type=Path, help="file whose text is the prompt; a bundled one by default")
    add("--compare-mlx-lm", action="store_true", help="instead: mlx-lm on the same weights, in turn")
    add("--pairs", type=int, default=5, help="pairs of runs for that (default: %(default)s)")
    add("--prompt-tokens", type=int, default=1024, help="their prompt (default: %(default)s)")
    add("--synthetic", choices=["full-layer"], help="instead: real shapes, random weights, by layer")
    add("--bits", type=int, default=4, help="of the synthetic weights (default: %(default)s)")
    add("--chunk", type=int, help=f"synthetic prefill chunk (default: {CHUNK}, on a CPU {CPU_CHUNK})")
    add("--plot", type=Path, metavar="FILE.png", help="also draw the curves")
    add("--json", action="store_true", help="as JSON")
    return parser


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _floats(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def _depths(text: str) -> tuple[MTPChoice, ...]:
    found: list[MTPChoice] = []
    for part in text.split(","):
        if part not in ("off", "auto", "1", "2", "3"):
            raise argparse.ArgumentTypeError(f"expected off, auto, 1, 2 or 3, found '{part}'")
        # mypy does not narrow a string by the list it was found in.
        found.append(int(part) if part.isdecimal() else part)  # type: ignore[arg-type]
    return tuple(found)
