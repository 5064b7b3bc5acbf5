"""What a generation reports when it is over: a few lines for people, JSON for programs."""

from collections.abc import Sequence
from typing import Any

from mlx_step35.decoding import DecodeStats
from mlx_step35.generate.api import GenerationResponse


def print_summary(response: GenerationResponse) -> None:
    """mlx-lm's closing lines, and how drafting went."""
    print()
    print("=" * 10)
    cached = f" and {response.stats.cached_tokens} cached" if response.stats.cached_tokens else ""
    print(f"Prompt: {response.prompt_tokens} tokens{cached}, {response.prompt_tps:.3f} tokens-per-sec")
    print(f"Generation: {response.generation_tokens} tokens, {response.generation_tps:.3f} tokens-per-sec")
    print(f"Passes: {response.stats.forward_passes}, {response.stats.tokens_per_pass:.2f} tokens per pass")
    for line in _drafting(response.stats):
        print(line)
    print(f"Peak memory: {response.peak_memory:.3f} GB")


def stats_json(response: GenerationResponse | None, token_ids: Sequence[int]) -> dict[str, Any]:
    """Everything measured; without a response nothing was generated."""
    if response is None:
        return {"generated_tokens": 0, "token_ids": [], "finish_reason": "interrupted"}
    return {
        "prompt_tokens": response.prompt_tokens + response.stats.cached_tokens,
        "cached_tokens": response.stats.cached_tokens,
        "generated_tokens": response.generation_tokens,
        "token_ids": list(token_ids),
        "prompt_tps": response.prompt_tps,
        "generation_tps": response.generation_tps,
        "peak_memory_bytes": round(response.peak_memory * 1e9),
        "finish_reason": response.finish_reason or "interrupted",
        **response.stats.as_json(),
    }


def _drafting(stats: DecodeStats) -> list[str]:
    """One line per source of drafts, and why the MTP layers gave none."""
    lines = []
    for source, drafted in stats.drafted.items():
        shares = [
            f"{accepted / max(count, 1):.0%}"
            for count, accepted in zip(drafted, stats.accepted[source], strict=True)
        ]
        counts = " ".join(map(str, drafted))
        lines.append(f"Drafts ({source}): {counts} by depth, accepted {' '.join(shares)}")
    if lines:
        lines.append("Rounds by depth: " + ", ".join(f"{name} {n}" for name, n in stats.depths.items()))
    if stats.reason_off:
        lines.append(f"Drafting with MTP was off: {stats.reason_off}")
    return lines
