"""Where a tokenised conversation can be taken up again: the ends of its turns, by their control tokens.

Every turn of this family of templates runs from `<|im_start|>` to the next one. A control token is never
merged with its neighbours, so the tokens in front of one do not depend on what follows: they are the same in
every conversation that starts alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from mlx_step35.chat.tokenizer import Tokenizer

TURN_OPENER = "<|im_start|>"

# The longest name of a role in tokens, with room to spare.
_MAX_ROLE_TOKENS = 16

Kind = Literal["system", "user", "assistant", "tool", "prompt"]

_KINDS: dict[str, Kind] = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool_response": "tool",
    "tool": "tool",
    "observation": "tool",
}


@dataclass(frozen=True, slots=True)
class Boundary:
    """The first `position` tokens end with a turn of this kind, or with the whole prompt."""

    position: int
    kind: Kind


def prompt_boundaries(ids: Sequence[int], tokenizer: Tokenizer) -> tuple[Boundary, ...]:
    """Ends of the turns of a prompt in order, the end of the prompt last.

    The system turn holds the tools too. A turn that the prompt leaves open, as the generation prompt does,
    has no end of its own; without turns in the prompt only its end is one.
    """
    opener = tokenizer.token_id(TURN_OPENER)
    starts = [place for place, token in enumerate(ids) if token == opener]
    boundaries = [Boundary(end, _kind(ids[start + 1 : end], tokenizer)) for start, end in pairwise(starts)]
    if ids:
        boundaries.append(Boundary(len(ids), "prompt"))
    return tuple(boundaries)


def _kind(turn: Sequence[int], tokenizer: Tokenizer) -> Kind:
    """What kind of turn this is, from the line behind its opener."""
    head = tokenizer.decode(turn[:_MAX_ROLE_TOKENS]).split("\n", 1)[0]
    return _KINDS.get(head.strip(), "system")
