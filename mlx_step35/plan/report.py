"""A plan as text."""

from typing import Any

from mlx_step35.costs import readable_bytes


def describe(found: dict[str, Any]) -> str:
    """The plan for people."""
    context = found["context"]
    lines = [f"{found['model']} on {found['machine']}, context {context:,} tokens", ""]
    lines += [f"  {kind:<34}{_size(size)}" for kind, size in found["kinds_bytes"].items()]
    extra = found["resident_bytes"] - found["weights_bytes"] - found["mtp_bytes"]
    rows = [
        ("more in memory than on disk", extra),
        (f"keys and values at {context:,}", found["kv_bytes"]),
        ("spare rows of their buffers", found["cache_bytes"] - found["kv_bytes"]),
        ("caches of the MTP layers", found["draft_bytes"]),
        (f"prefill, {found['prefill_chunk']} tokens a pass", found["workspace_bytes"]),
    ]
    lines += [f"  {title:<34}{_size(size)}" for title, size in rows if size]
    lines += [f"  {'peak':<34}{_size(found['peak_bytes'])}", ""]
    lines += _verdict(found)
    lines += [
        "",
        f"each saved prefix (snapshot) takes {readable_bytes(found['snapshot_bytes'])} beside its KV",
    ]
    lines += ["", *_speed_lines(found["speed_estimate"])]
    return "\n".join(lines)


def _verdict(found: dict[str, Any]) -> list[str]:
    limits = [("default GPU limit", "default")]
    if found["raise_command"]:
        limits.append(("raised GPU limit", "raised"))
    lines = []
    for title, key in limits:
        most = found[f"max_context_{key}"]
        fits = "fits" if found[f"fits_{key}"] else "does not fit"
        longest = f"up to {most:,} tokens" if most else "no context fits"
        lines.append(f"  {title:<19}{_size(found[f'limit_{key}_bytes'])}   {fits}; {longest}")
    if not found["fits_default"] and found["fits_raised"]:
        lines += ["", "raise the limit (until the next restart) with", f"  {found['raise_command']}"]
    recipe = found["recommended_recipe"]
    lines.append("")
    if recipe is None:
        lines.append("no recipe is made for this machine: they start at 96 GB")
    elif found["model"] == f"recipe {recipe}":
        lines.append(f"{recipe} is the best recipe for this machine")
    else:
        lines.append(f"best recipe for this machine: mlx_step35.convert --recipe {recipe}")
    return lines


def _speed_lines(estimate: dict[str, Any] | None) -> list[str]:
    if estimate is None:
        return ["no speed estimate: name the chip, for instance --chip 'M4 Max'"]
    depths = range(1, len(estimate["decode"][0]["tokens_per_s"]))
    lines = [
        f"ESTIMATE for {estimate['chip']}, nothing measured: {estimate['basis']}",
        "",
        f"  {'tokens/s at context':<22}{'plain':>8}" + "".join(f"{f'mtp {depth}':>8}" for depth in depths),
    ]
    for row in estimate["decode"]:
        cells = "".join(f"{value:>8.1f}" for value in row["tokens_per_s"])
        lines.append(f"  {row['context']:<22,}{cells}")
    if estimate["prefill"]:
        lines += ["", f"  {'prompt of':<22}{'tokens/s':>8}{'seconds':>9}"]
        lines += [
            f"  {row['prompt']:<22,}{row['tokens_per_s']:>8.0f}{row['prompt'] / row['tokens_per_s']:>9.0f}"
            for row in estimate["prefill"]
        ]
    return lines


def _size(size: int) -> str:
    return f"{readable_bytes(size):>12}"
