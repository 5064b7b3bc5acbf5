"""The command `mlx_step35.bench`: prefill and decode at context frontiers, beside mlx-lm, or by layer.

Figures hold for the machine, the weights and the text they were taken with; all three are in the output.
Acceptance of drafts depends on the text, which is repeated until it is as long as the longest context.
"""

import io
import json
import platform
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_step35.bench.compare import Comparison, compare
from mlx_step35.bench.options import Job, parse_job
from mlx_step35.bench.plot import check_plot, plot
from mlx_step35.bench.sweep import Frontier, SweepOptions, sweep
from mlx_step35.bench.synthetic import Synthetic, measure
from mlx_step35.chat.tokenizer import Tokenizer
from mlx_step35.checkpoint import NANO, load_checkpoint, read_config, resolve_model
from mlx_step35.costs import readable_bytes
from mlx_step35.decoding import prepare
from mlx_step35.errors import RequestError
from mlx_step35.exits import run_command
from mlx_step35.guard import check_load, total_memory
from mlx_step35.plan.subject import find_config
from mlx_step35.quantization import Quantization

TEXT = "heldout.txt"


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
    options = _fitting(job, read_config(path).context_length, on_done)
    check_load(path, max(options.contexts) + _room(options))
    model = load_checkpoint(path)
    prepare(model)
    if model.mtp is None:
        options = replace(options, depths=("off",))
    return Report(machine, versions, name, tuple(sweep(model, text, options, on_done)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; ends the process unless all is well."""
    given = sys.argv[1:] if arguments is None else arguments
    if code := run_command(lambda: _run(given)):
        sys.exit(code)


def _run(arguments: Sequence[str]) -> None:
    job = parse_job(arguments)
    report = run(job, lambda what: print(what, file=sys.stderr, flush=True))
    print(json.dumps(report.as_json(), indent=2) if job.is_json else report, flush=True)
    if job.plot is not None:
        plot(report.frontiers, f"{report.model}, {report.machine}", job.plot)


def _room(options: SweepOptions) -> int:
    """Tokens behind a context that a run from it needs."""
    return options.num_tokens + 2


def _fitting(job: Job, context_length: int, on_done: Callable[[str], None]) -> SweepOptions:
    """Contexts that the model holds: of the usual ones those, of others all or RequestError."""
    options = job.options
    most = context_length - _room(options)
    beyond = [context for context in options.contexts if context > most]
    if beyond and (job.has_own_contexts or len(beyond) == len(options.contexts)):
        message = f"{max(beyond)} tokens and {options.num_tokens} more, the model holds {context_length}"
        raise RequestError(message, field="contexts")
    for context in beyond:
        on_done(f"context {context} is left out: the model holds {context_length}")
    return replace(options, contexts=tuple(context for context in options.contexts if context <= most))


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
