"""What goes into a decode and what comes out of it."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import mlx.core as mx

from mlx_step35.depth import MAX_MTP_DEPTH, Plan
from mlx_step35.errors import RequestError
from mlx_step35.mtp_state import ChooseDraft
from mlx_step35.sampling import Proposal

MTPChoice = Literal["auto", "off", 1, 2, 3]
# Called with the prompt tokens done and all of them; what it raises ends the prefill between two chunks.
PrefillCallback = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class DecodeOptions:
    """How to decode, not what: the output does not depend on it. Prefill chunks also end at boundaries."""

    max_tokens: int = 256
    mtp: MTPChoice = "auto"
    lookup: bool = True
    prefill_step_size: int = 2048
    prefill_boundaries: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.mtp not in ("auto", "off", *range(1, MAX_MTP_DEPTH + 1)) or isinstance(self.mtp, bool):
            raise RequestError(f"mtp must be auto, off, 1, 2 or 3, found {self.mtp!r}", field="mtp")
        for name in ("max_tokens", "prefill_step_size"):
            if type(getattr(self, name)) is not int:
                raise RequestError(
                    f"{name} must be a whole number, found {getattr(self, name)!r}", field=name
                )
        if self.max_tokens == 0 or self.max_tokens < -1:
            message = f"max_tokens must be at least 1, or -1 for no limit, found {self.max_tokens}"
            raise RequestError(message, field="max_tokens")
        if self.prefill_step_size < 1:
            message = f"prefill_step_size must be at least 1, found {self.prefill_step_size}"
            raise RequestError(message, field="prefill_step_size")


@dataclass(frozen=True, slots=True)
class Decoded:
    """One token, the model's log-probabilities (V,) it was chosen by, and whether a draft had guessed it."""

    token: int
    logprobs: mx.array
    from_draft: bool


@dataclass(slots=True)
class DecodeStats:
    """What a decode did so far. Passes count from the prompt's last one, which yields the first token."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    # How many the answer can have: as many as asked for, or what the context or memory leaves room for.
    token_limit: int = 0
    forward_passes: int = 0
    prompt_s: float = 0.0
    generation_s: float = 0.0
    # By source; entry k counts the k-th drafts of a round.
    drafted: dict[str, list[int]] = field(default_factory=dict)
    accepted: dict[str, list[int]] = field(default_factory=dict)
    rounds: Counter[Plan] = field(default_factory=Counter)
    # Why no draft came from the MTP layers, None if they were available.
    reason_off: str | None = None

    @property
    def tokens_per_pass(self) -> float:
        return self.generated_tokens / self.forward_passes if self.forward_passes else 0.0

    @property
    def depths(self) -> dict[str, int]:
        """How many rounds had which drafts."""
        return {f"{plan.source}-{plan.depth}": count for plan, count in sorted(self.rounds.items())}

    def as_json(self) -> dict[str, Any]:
        """The speculation figures as JSON values."""
        return {
            "forward_passes": self.forward_passes,
            "tokens_per_forward_pass": round(self.tokens_per_pass, 4),
            "drafted": self.drafted,
            "accepted": self.accepted,
            "depths": self.depths,
            "mtp_off_reason": self.reason_off,
        }

    def count_round(self, plan: Plan) -> None:
        """Book a forward pass and its drafts."""
        self.forward_passes += 1
        self.rounds[plan] += 1
        for table in (self.drafted, self.accepted):
            row = table.setdefault(plan.source, []) if plan.depth else []
            row.extend([0] * (plan.depth - len(row)))
        for index in range(plan.depth):
            self.drafted[plan.source][index] += 1


class Drafter(Protocol):
    """Where MTP drafts come from; `DraftState` but for tests."""

    @property
    def max_depth(self) -> int: ...

    @property
    def end(self) -> int: ...

    @property
    def num_kept_rows(self) -> int: ...

    def extend(self, hidden: mx.array, at: int) -> None: ...

    def rows_behind(self, depth: int) -> int: ...

    def propose(self, depth: int, tokens: Sequence[int], choose: ChooseDraft) -> Proposal: ...

    def settle(self, num_right: int) -> None: ...
