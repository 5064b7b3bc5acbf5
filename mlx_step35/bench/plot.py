"""Curves over context length as a picture; needs matplotlib, which the extra `bench` installs."""

from collections.abc import Sequence
from pathlib import Path

from mlx_step35.bench.sweep import Frontier
from mlx_step35.errors import RequestError


def plot(frontiers: Sequence[Frontier], title: str, path: Path) -> None:
    """Write decode speed by depth at the lowest temperature, and prefill speed, as one picture."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise RequestError("--plot needs matplotlib: pip install 'mlx-step35[bench]'", field="plot") from None
    figure = Figure(figsize=(10, 4), layout="constrained")
    decode, prefill = figure.subplots(1, 2)
    contexts = [frontier.context for frontier in frontiers]
    coolest = min((run.temperature for frontier in frontiers for run in frontier.decodes), default=0.0)
    depths = {run.depth: None for frontier in frontiers for run in frontier.decodes}
    for depth in depths:
        speeds = [
            run.tokens_per_s
            for frontier in frontiers
            for run in frontier.decodes
            if run.depth == depth and run.temperature == coolest
        ]
        decode.plot(contexts, speeds, marker="o", label=f"mtp {depth}")
    decode.set(title=f"decode, temperature {coolest:g}", xlabel="context", ylabel="tokens/s", ylim=(0, None))
    decode.legend()
    filled = [frontier for frontier in frontiers if frontier.context]
    prefill.plot([f.context for f in filled], [f.prefill_tokens_per_s for f in filled], marker="o")
    prefill.set(title="prefill of a whole prompt", xlabel="prompt", ylabel="tokens/s", ylim=(0, None))
    figure.suptitle(title)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise RequestError(f"cannot write {path}: {error}", field="plot") from None
