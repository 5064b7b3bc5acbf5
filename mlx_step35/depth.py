"""How many tokens to draft, and from which source: the choice with the most expected tokens per second.

It learns from the past only: how often drafts of each depth were accepted (decayed counts), and how long
whole rounds of each kind took. Before a kind was measured, bytes read per round stand in for time, scaled by
whatever was measured. Trying a kind that looks worse is paid from a budget, a small share of the time spent
so far; so once settled the controller cannot lose more than that against the best kind it knows. Pure: the
caller has the clock.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from math import pow
from operator import mul
from statistics import median
from typing import Literal

from mlx_step35.config import ModelConfig
from mlx_step35.speed import Reads

Source = Literal["plain", "mtp", "lookup"]
MAX_MTP_DEPTH = 3

# A verify of 4, 8 or 16 tokens: widths between them would each need their own measurements.
LOOKUP_LENGTHS = (3, 7, 15)

# Acceptance assumed before anything was seen, and how many observations that assumption is worth. For lookup
# it depends on how many tokens matched: (at least this many, acceptance).
PRIOR_MTP = (0.8, 0.7, 0.6)
PRIOR_LOOKUP = ((3, 0.3), (5, 0.5), (8, 0.75), (16, 0.92))
PRIOR_WEIGHT = 1.0
# What an observation weighs after the next one of its kind, and after the next round of any kind: lookup is
# not tried while it looks bad, so what is known about it must fade.
DECAY = 0.95
FADING = 0.995

# Round times kept per kind; their median ignores a stray pause.
NUM_TIMES = 7
# The first round of a kind may compile kernels: it is not believed beyond this multiple of what is expected.
FIRST_ROUND_LIMIT = 1.5
# Contexts this many tokens apart are told apart.
CONTEXT_STEP = 64

# Share of all decode time that trying apparently worse kinds may cost.
PROBE_SHARE = 0.01
# Rounds between two probes at first; the distance doubles while probes change nothing.
PROBE_INTERVAL = 24
MAX_PROBE_INTERVAL = 1536
PROBE_ROUNDS = 3
# Rounds over which the cost of bringing MTP layers up to date is spread when plans are compared.
CATCH_UP_ROUNDS = 16


@dataclass(frozen=True, slots=True)
class Plan:
    """One round: `depth` drafts from a source; a plain round drafts nothing."""

    source: Source
    depth: int


PLAIN = Plan("plain", 0)

# Bytes one round of a plan reads at a context length.
RoundCost = Callable[[Plan, int], float]


class RoundBytes:
    """What a plan's round reads, counted as the planner's speed estimates count it."""

    def __init__(
        self,
        config: ModelConfig,
        backbone_bytes: int,
        expert_bytes: int,
        mtp_bytes: Sequence[int],
        kv_dtype_bytes: int,
    ) -> None:
        self._reads = Reads(config, backbone_bytes, expert_bytes, mtp_bytes, kv_dtype_bytes)

    def __call__(self, plan: Plan, context: int) -> float:
        return self._reads.round_bytes(plan.depth, context, by_mtp=plan.source == "mtp")


@dataclass(frozen=True, slots=True)
class Offer:
    """What a round may do.

    `depths` are numbers of MTP drafts, 0 for a plain round; `match_length` tokens matched before
    `lookup_tokens` drafts; `rows_behind` tells how many rows the layers must catch up on for a depth.
    """

    depths: tuple[int, ...]
    lookup_tokens: int = 0
    match_length: int = 0
    rows_behind: Callable[[int], int] | None = None

    def catch_up_rows(self, plan: Plan) -> int:
        return self.rows_behind(plan.depth) if plan.source == "mtp" and self.rows_behind else 0


class _Rate:
    """A decayed share of successes that starts at a prior, and returns to it if it fades."""

    def __init__(self, prior: float, fading: float = 1.0) -> None:
        self._prior = prior
        self._fading = fading
        self._trials = 0.0
        self._successes = 0.0
        self._round = 0

    def value(self, now: int) -> float:
        """The share as believed in round `now`."""
        weight = pow(self._fading, now - self._round)
        return (self._prior * PRIOR_WEIGHT + self._successes * weight) / (
            PRIOR_WEIGHT + self._trials * weight
        )

    def observe(self, success: bool, now: int) -> None:
        weight = DECAY * pow(self._fading, now - self._round)
        self._trials = self._trials * weight + 1
        self._successes = self._successes * weight + success
        self._round = now


class DepthController:
    """Chooses a plan per round and learns from its outcome."""

    def __init__(self, round_bytes: RoundCost) -> None:
        self._round_bytes = round_bytes
        self._mtp = [_Rate(prior) for prior in PRIOR_MTP]
        self._lookup = [_Rate(prior, FADING) for _, prior in PRIOR_LOOKUP]
        # Seconds per byte read, so that they carry over to other context lengths: the newest rounds of a
        # plan, and their median once there are two.
        self._times: dict[Plan, deque[float]] = {}
        self._typical: dict[Plan, float] = {}
        self._bytes: dict[tuple[Plan, int], float] = {}
        self._catch_up_s = 0.0
        self._elapsed_s = 0.0
        self._probe_debt_s = 0.0
        self._probe_interval = PROBE_INTERVAL
        self._round = 0
        self._last_rounds: dict[Plan, int] = {}
        self._probe: tuple[Plan, int] | None = None
        self._best = PLAIN

    def expected_tokens(self, plan: Plan, match_length: int = 0) -> float:
        """Tokens one round yields on average: the one of the verify, and every draft accepted before it."""
        rates = self._rates(plan, match_length)
        if plan.source == "lookup":
            values = [rates[0].value(self._round)] * plan.depth
        else:
            values = [rate.value(self._round) for rate in rates]
        chain: list[float] = list(accumulate(values, mul))
        return 1 + sum(chain)

    def round_s(self, plan: Plan, context: int) -> float:
        """Seconds of a round: measured, or by bytes from the plan of the nearest depth that was measured."""
        nbytes = self._nbytes(plan, context)
        if plan in self._typical:
            return self._typical[plan] * nbytes
        first = self._times[plan][0] if plan in self._times else None
        if not self._typical:
            return nbytes if first is None else first * nbytes
        nearest = min(self._typical, key=lambda p: (abs(p.depth - plan.depth), p.depth))
        expected = self._typical[nearest]
        return (expected if first is None else min(first, FIRST_ROUND_LIMIT * expected)) * nbytes

    def choose(self, context: int, offer: Offer) -> Plan:
        """The plan for the next round."""
        plans = _mtp_plans(offer.depths) + _lookup_plans(offer.lookup_tokens)
        if len(plans) == 1:
            return plans[0]
        if PLAIN in plans and PLAIN not in self._typical:
            return PLAIN
        best = max(plans, key=lambda plan: self._speed(plan, context, offer))
        if best.source == "lookup":
            return best
        if best != self._best:
            self._best = best
            self._probe_interval = PROBE_INTERVAL
        if self._probe is None:
            self._probe = self._next_probe(context, offer)
        return self._probe[0] if self._probe and self._probe[0] in plans else best

    def observe(
        self,
        plan: Plan,
        num_accepted: int,
        seconds: float,
        context: int,
        match_length: int = 0,
        caught_up: int = 0,
    ) -> None:
        """Learn from a finished round; `caught_up` MTP rows were run beyond those of the round itself."""
        self._round += 1
        self._last_rounds[plan] = self._round
        self._elapsed_s += seconds
        rates = self._rates(plan, match_length)
        for index in range(min(num_accepted + 1, plan.depth)):
            rates[index].observe(index < num_accepted, self._round)
        if caught_up:
            self._catch_up_s = max(seconds - self.round_s(plan, context), 0.0) / caught_up
        else:
            times = self._times.setdefault(plan, deque(maxlen=NUM_TIMES))
            times.append(seconds / self._nbytes(plan, context))
            if len(times) == 2 and times[0] > FIRST_ROUND_LIMIT * times[1]:
                times.popleft()
            if len(times) > 1:
                self._typical[plan] = median(times)
        if self._probe and self._probe[0] == plan:
            lost_s = seconds - (num_accepted + 1) / self._speed(self._best, context, Offer(()))
            self._probe_debt_s += max(lost_s, 0.0)
            left = self._probe[1] - 1
            self._probe = (plan, left) if left else None

    def _nbytes(self, plan: Plan, context: int) -> float:
        """Bytes of a round; a few tokens more or less in the context make no difference."""
        key = (plan, context // CONTEXT_STEP)
        if key not in self._bytes:
            self._bytes = {} if len(self._bytes) > 100 else self._bytes
            self._bytes[key] = self._round_bytes(plan, context)
        return self._bytes[key]

    def _rates(self, plan: Plan, match_length: int) -> list[_Rate]:
        """Acceptance of each draft of a plan, given that those before it were accepted."""
        if plan.source == "lookup":
            bucket = sum(match_length >= least for least, _ in PRIOR_LOOKUP) - 1
            return [self._lookup[max(bucket, 0)]] * plan.depth
        return self._mtp[: plan.depth]

    def _speed(self, plan: Plan, context: int, offer: Offer) -> float:
        """Expected tokens per second; catching up is shared by the rounds that will profit from it."""
        catch_up_s = self._catch_up_s * offer.catch_up_rows(plan) / CATCH_UP_ROUNDS
        return self.expected_tokens(plan, offer.match_length) / (self.round_s(plan, context) + catch_up_s)

    def _next_probe(self, context: int, offer: Offer) -> tuple[Plan, int] | None:
        """The most promising plan not tried for long, if the budget covers that every draft is wrong."""
        if self._best not in self._typical:
            return None
        due = self._round - self._probe_interval
        stale = [
            p for p in _mtp_plans(offer.depths) if p != self._best and self._last_rounds.get(p, 0) <= due
        ]
        budget_s = PROBE_SHARE * self._elapsed_s - self._probe_debt_s
        token_s = 1 / self._speed(self._best, context, offer)
        for plan in sorted(stale, key=lambda plan: -self._speed(plan, context, offer)):
            lost_s = PROBE_ROUNDS * (self.round_s(plan, context) - token_s)
            if lost_s + self._catch_up_s * offer.catch_up_rows(plan) <= budget_s:
                self._probe_interval = min(2 * self._probe_interval, MAX_PROBE_INTERVAL)
                return plan, PROBE_ROUNDS
        return None


@cache
def _mtp_plans(depths: tuple[int, ...]) -> tuple[Plan, ...]:
    return tuple(Plan("mtp", depth) if depth else PLAIN for depth in depths)


@cache
def _lookup_plans(num_tokens: int) -> tuple[Plan, ...]:
    lengths = {min(length, num_tokens) for length in LOOKUP_LENGTHS} - {0}
    return tuple(Plan("lookup", length) for length in sorted(lengths))
