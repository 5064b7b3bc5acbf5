"""Curves over context length as a picture; needs matplotlib, which the extra `bench` installs."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mlx_step35.bench.sweep import Frontier
from mlx_step35.errors import RequestError


def check_plot(path: Path) -> None:
    """Raise RequestError if no picture can be written there, before hours of measuring."""
    if find_spec("matplotlib") is None:
        raise RequestError("--plot needs matplotlib: pip install 'mlx-step35[bench]'", field="plot")
    if not path.parent.is_dir():
        raise RequestError(f"--plot {path}: there is no directory {path.parent}", field="plot")


def plot(frontiers: Sequence[Frontier], title: str, path: Path) -> None:
    """Write decode speed by depth at the lowest temperature, and prefill speed, as one picture."""
    check_plot(path)
    from matplotlib.figure import Figure

    filled = [frontier for frontier in frontiers if frontier.context]
    figure = Figure(figsize=(10 if filled else 5, 4.2), layout="constrained", dpi=150)
    axes = figure.subplots(1, 2 if filled else 1, squeeze=False)[0]
    _decode(axes[0], frontiers)
    if filled:
        axes[1].plot([f.context for f in filled], [f.prefill_tokens_per_s for f in filled], marker="o")
        axes[1].set(title="prefill of a whole prompt", xlabel="prompt tokens", ylabel="tokens/s")
    for ax, shown in zip(axes, (frontiers, filled), strict=False):
        _frame(ax, [frontier.context for frontier in shown])
    figure.suptitle(title, fontsize=9, color="dimgray")
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise RequestError(f"cannot write {path}: {error}", field="plot") from None


def _decode(ax: Any, frontiers: Sequence[Frontier]) -> None:
    coolest = min((run.temperature for frontier in frontiers for run in frontier.decodes), default=0.0)
    depths = {run.depth: None for frontier in frontiers for run in frontier.decodes}
    for depth in depths:
        speeds = [
            run.tokens_per_s
            for frontier in frontiers
            for run in frontier.decodes
            if run.depth == depth and run.temperature == coolest
        ]
        # Drafts are compared with decoding without them, so that is what stands out.
        style = {"color": "black", "linestyle": "--"} if depth == "off" else {}
        label = "no drafts" if depth == "off" else f"mtp {depth}"
        ax.plot([f.context for f in frontiers], speeds, marker="o", label=label, **style)
    ax.set(title=f"decode, temperature {coolest:g}", xlabel="context tokens", ylabel="tokens/s")
    ax.legend()


def _frame(ax: Any, contexts: Sequence[int]) -> None:
    """A scale from zero to above the highest point, and the contexts measured as ticks."""
    ax.set_ylim(0, 1.08 * max(float(max(line.get_ydata())) for line in ax.lines))
    longest = max(contexts)
    # Ticks closer than this would overlap; the longest of a crowd is labelled.
    ticks: list[int] = []
    for context in sorted(contexts, reverse=True):
        if not ticks or ticks[-1] - context >= longest / 12:
            ticks.append(context)
    ax.set_xticks(ticks, [_short(context) for context in ticks])
    ax.grid(alpha=0.3)


def _short(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens and tokens % 1024 == 0 else str(tokens)
