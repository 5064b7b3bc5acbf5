"""What a plan comes to, for people: bytes per kind, bits per weight, the Macs it fits."""

from collections.abc import Iterable

from mlx_step35 import costs
from mlx_step35.config import ModelConfig
from mlx_step35.conversion.plan import Plan
from mlx_step35.costs import Size, readable_bytes
from mlx_step35.layout import Weight
from mlx_step35.recipes import summary

MACS = (64, 96, 128, 192, 256, 512)
CONTEXTS = (8192, 32768, 65536, 131072, 262144)


def describe(plan: Plan, config: ModelConfig) -> str:
    """The whole plan as a plain table."""
    lines = [f"recipe: {plan.recipe.name}", "", f"{'kind':<16}{'size':>9}{'bits/weight':>13}  chosen"]
    for title, size, chosen in (*rows(plan), ("total", total(plan), f"{len(plan.files)} files")):
        lines.append(f"{title:<16}{readable_bytes(size.nbytes):>9}{size.bits_per_weight:>13.2f}  {chosen}")
    for reason in sorted(set(plan.dropped.values())):
        count = sum(1 for value in plan.dropped.values() if value == reason)
        lines.append(f"dropped: {count} tensors ({reason})")
    if plan.shards:
        lines += ["", "memory without the workspace of a prefill, against the default GPU limit:"]
        lines += [f"  {gib:>4} GB Mac: {fit}" for gib, fit in fits(plan, config)]
    return "\n".join(lines)


def rows(plan: Plan) -> list[tuple[str, Size, str]]:
    """Title, size and choice per kind; the MTP layers follow the backbone."""
    table = []
    for title, shards in (("", plan.shards), ("mtp ", (plan.sidecar,) if plan.sidecar else ())):
        weights = [job.weight for shard in shards for job in shard.jobs]
        chosen = summary(weights, plan.recipe)
        sizes = costs.sizes_by_kind(weights, plan.recipe)
        table += [(title + kind, size, chosen[kind]) for kind, size in sizes.items()]
    return table


def total(plan: Plan) -> Size:
    return costs.total(costs.sizes_by_kind(_weights(plan), plan.recipe))


def fits(plan: Plan, config: ModelConfig) -> list[tuple[int, str]]:
    """Per Mac, the largest usual context that fits."""
    lines = []
    for gib in MACS:
        limit = costs.memory_limit(gib)
        fitting = [context for context in CONTEXTS if memory(plan, config, context) <= limit]
        text = f"fits {max(fitting) // 1024}K context" if fitting else "does not fit"
        needed = readable_bytes(memory(plan, config, 8192))
        lines.append((gib, f"{text} (limit {readable_bytes(limit)}, 8K needs {needed})"))
    return lines


def memory(plan: Plan, config: ModelConfig, context: int) -> int:
    """Weights, heads and caches at a context length."""
    caches = costs.kv_bytes(config, context)
    if plan.sidecar is not None:
        caches += costs.mtp_kv_bytes(config, context)
    return plan.nbytes + caches


def _weights(plan: Plan) -> Iterable[Weight]:
    return (job.weight for job in plan.jobs)
