"""How much memory saved prompts may take when nobody says."""

from mlx_step35.guard import Headroom
from mlx_step35.memory import PREFILL_CHUNKS, Planner


def default_limit(planner: Planner, context_length: int, room: Headroom) -> int:
    """Bytes beside the loaded weights and the longest context.

    Where that context hardly fits, a quarter of what there is: shorter ones are the rule. Never more than
    half: the rest of the system lives there too.
    """
    longest = planner.growth_bytes(0, context_length, PREFILL_CHUNKS[0])
    beside = room.available - longest
    return min(max(beside, room.available // 4), room.available // 2)
