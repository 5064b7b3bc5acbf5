"""How many tokens to draft, and from which source: the choice with the most expected tokens per second.

It learns from the past only: how often drafts of each depth were accepted, and how long whole rounds of each
kind took (`timing`). Before a kind was measured, bytes read per round stand in for time, scaled by whatever
was measured. Trying a kind that looks worse is paid from a budget, a small share of the time spent so far; so
once settled that is all the controller loses against the best kind it knows. Pure: the caller has the clock.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from math import exp, pow
from operator import mul
from typing import Literal, NamedTuple

from mlx_step35.config import ModelConfig
from mlx_step35.speed import Reads
from mlx_step35.timing import RoundTimes

Source = Literal["plain", "mtp", "lookup"]
MAX_MTP_DEPTH = 3

# A verify of 4, 8 or 16 tokens: widths between them would each need their own measurements.
LOOKUP_LENGTHS = (3, 7, 15)

# Acceptance assumed before anything was seen, and how many observations that assumption is worth. For lookup
# it depends on how many tokens matched: (at least this many, acceptance).
PRIOR_MTP = (0.8, 0.7, 0.6)
PRIOR_LOOKUP = ((3, 0.3), (5, 0.5), (8, 0.75), (16, 0.92))
PRIOR_WEIGHT = 2.0
# Observations that the long run is worth beside the newest ones; what an observation weighs in either after
# the next one of its kind, and after the next round of any kind. Lookup is not tried while it looks bad, so
# there the long run fades too.
LASTING_WEIGHT = 16.0
LASTING_DECAY = 0.995
RECENT_DECAY = 0.93
RECENT_FADING = 0.99
LOOKUP_FADING = 0.998

# Contexts this many tokens apart are told apart.
CONTEXT_STEP = 64
# By how much a plan must look faster than plain rounds or the plan in use to replace them.
LEAD = 1.015

# Share of all decode time that trying apparently worse kinds may cost.
PROBE_SHARE = 0.015
# Plain rounds that trying may cost before any were saved up.
PROBE_CREDIT = 5
# Plain rounds between two kinds of drafting: they are what all else is compared with, and one may be a pause.
MIN_PLAIN_ROUNDS = 4
# Rounds between two probes at first; the distance doubles while probes change nothing.
PROBE_INTERVAL = 16
MAX_PROBE_INTERVAL = 192
# A probe may lose as much as this many rounds without a right draft, and ends after so many in any case.
PROBE_ROUNDS = 3
MAX_PROBE_ROUNDS = 12
# A round of a probe is taken to lose at least this part of a plain one.
LEAST_LOSS = 0.1
# Deviations by which a plan's time may be better than thought, and the gain that any plan may turn out to
# have, when the plan to try is picked.
OPTIMISM = 2.0
LEAST_GAIN = 0.02
# Rounds over which the cost of bringing MTP layers up to date is spread when plans are compared: about those
# of a short answer, since every answer has to pay it anew.
CATCH_UP_ROUNDS = 48
# Plain rounds that catching up on rows was seen to take, and those rows: the assumption before any was seen.
CATCH_UP_PRIOR = (0.2, 50.0)
CATCH_UP_DECAY = 0.8
# A row of one layer never takes more than this part of a plain round, whatever else slowed the round down.
CATCH_UP_LIMIT = 0.05


class Plan(NamedTuple):
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
    """A share of successes: that of the newest trials, leaning on the long run, which starts at a prior.

    Text is predictable in stretches, so the newest trials count most; but they are few, and what they said
    fades while no more come.
    """

    def __init__(self, prior: float, fading: float = 1.0) -> None:
        self._prior = prior
        self._fading = fading
        # Decayed trials and successes.
        self._recent = [0.0, 0.0]
        self._lasting = [0.0, 0.0]
        self._round = 0

    def value(self, now: int) -> float:
        """The share as believed in round `now`."""
        age = now - self._round
        fading, recent_fading = pow(self._fading, age), pow(RECENT_FADING, age)
        trials, successes = self._lasting
        lasting = (self._prior * PRIOR_WEIGHT + successes * fading) / (PRIOR_WEIGHT + trials * fading)
        trials, successes = self._recent
        return (lasting * LASTING_WEIGHT + successes * recent_fading) / (
            LASTING_WEIGHT + trials * recent_fading
        )

    def observe(self, success: bool, now: int) -> None:
        age = now - self._round
        for counts, weight in (
            (self._lasting, LASTING_DECAY * pow(self._fading, age)),
            (self._recent, RECENT_DECAY * pow(RECENT_FADING, age)),
        ):
            counts[0] = counts[0] * weight + 1
            counts[1] = counts[1] * weight + success
        self._round = now


@dataclass(slots=True)
class _Probe:
    """Rounds of a plan that looks worse, until they lost too much or showed enough."""

    plan: Plan
    limit_s: float
    lost_s: float = 0.0
    rounds: int = 0


class DepthController:
    """Chooses a plan per round and learns from its outcome."""

    def __init__(self, round_bytes: RoundCost) -> None:
        self._round_bytes = round_bytes
        self._mtp = [_Rate(prior) for prior in PRIOR_MTP]
        self._lookup = [_Rate(prior, LOOKUP_FADING) for _, prior in PRIOR_LOOKUP]
        # Seconds per byte read, so that they carry over to other context lengths.
        self._times = RoundTimes[Plan](PLAIN)
        self._seen: set[Plan] = set()
        self._bytes: dict[tuple[Plan, int], float] = {}
        self._catch_up = CATCH_UP_PRIOR
        self._elapsed_s = 0.0
        self._probe_debt_s = 0.0
        self._probe_interval = PROBE_INTERVAL
        self._round = 0
        self._last_rounds: dict[Plan, int] = {}
        self._probe: _Probe | None = None
        self._best = PLAIN
        self._plain_until = 0

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
        return self._unit_s(plan) * self._nbytes(plan, context)

    def choose(self, context: int, offer: Offer) -> Plan:
        """The plan for the next round."""
        plans = _mtp_plans(offer.depths) + _lookup_plans(offer.lookup_tokens)
        if len(plans) == 1:
            return plans[0]
        if PLAIN in plans and PLAIN not in self._times:
            return PLAIN
        speeds = {plan: self._speed(plan, context, offer) for plan in plans}
        # A lead too small to be sure of is no reason to draft, nor to leave what works.
        for plan in {PLAIN, self._best} & speeds.keys():
            speeds[plan] *= LEAD
        best = max(plans, key=speeds.__getitem__)
        if best.source == "lookup":
            return best
        if best != self._best and (self._best != PLAIN or self._round >= self._plain_until):
            self._best = best
            self._plain_until = self._round + MIN_PLAIN_ROUNDS
            self._probe_interval = PROBE_INTERVAL
            self._end_probe()
        if self._probe is None:
            self._probe = self._next_probe(context, offer)
        preferred = self._probe.plan if self._probe else self._best
        return preferred if preferred in plans else best

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
        rates = self._rates(plan, match_length)
        for index in range(min(num_accepted + 1, plan.depth)):
            rates[index].observe(index < num_accepted, self._round)
        if caught_up:
            self._observe_catch_up(plan, seconds, context, caught_up)
        else:
            self._observe_time(plan, seconds, context)
        if PLAIN in self._times:
            round_s = self.round_s(plan, context)
            self._elapsed_s += round_s
            if self._probe and self._probe.plan == plan:
                self._count_probe(self._probe, round_s - (num_accepted + 1) * self._token_s(context))

    def _observe_time(self, plan: Plan, seconds: float, context: int) -> None:
        is_first = plan not in self._seen
        self._seen.add(plan)
        # The first round of a kind may compile kernels, and a coarse clock may stand still.
        is_odd = is_first and PLAIN in self._times and seconds > self.round_s(plan, context)
        if is_odd or seconds <= 0:
            return
        cost = self._unit_s(plan) / self._unit_s(PLAIN)
        self._times.observe(plan, seconds / self._nbytes(plan, context), cost)

    def _observe_catch_up(self, plan: Plan, seconds: float, context: int, num_rows: int) -> None:
        if PLAIN not in self._times:
            return
        excess = (seconds - self.round_s(plan, context)) / self.round_s(PLAIN, context)
        rounds, rows = (CATCH_UP_DECAY * known for known in self._catch_up)
        self._catch_up = (rounds + min(max(excess, 0.0), CATCH_UP_LIMIT * num_rows), rows + num_rows)

    def _count_probe(self, probe: _Probe, lost_s: float) -> None:
        """Book a round of a probe by expected times: a pause during it is not its fault."""
        probe.rounds += 1
        probe.lost_s += lost_s
        if probe.lost_s >= probe.limit_s or probe.rounds >= MAX_PROBE_ROUNDS:
            self._end_probe()

    def _end_probe(self) -> None:
        if self._probe:
            self._probe_debt_s += max(self._probe.lost_s, 0.0)
        self._probe = None

    def _unit_s(self, plan: Plan) -> float:
        """Seconds per byte of a plan, or of the measured plan of the nearest depth."""
        if plan in self._times:
            return self._times[plan]
        measured = self._times.kinds()
        if not measured:
            return 1.0
        return self._times[min(measured, key=lambda other: (abs(other.depth - plan.depth), other.depth))]

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
        catch_up_s = self._catch_up_s(plan, context, offer) / CATCH_UP_ROUNDS
        return self.expected_tokens(plan, offer.match_length) / (self.round_s(plan, context) + catch_up_s)

    def _token_s(self, context: int) -> float:
        """Seconds per token of the best plan, caught up."""
        return 1 / self._speed(self._best, context, Offer(()))

    def _catch_up_s(self, plan: Plan, context: int, offer: Offer) -> float:
        rounds, rows = self._catch_up
        return offer.catch_up_rows(plan) * rounds / rows * self.round_s(PLAIN, context)

    def _next_probe(self, context: int, offer: Offer) -> _Probe | None:
        """The plan not tried for long that promises most for its price, once the budget covers that."""
        due = self._round - self._probe_interval
        stale = [
            plan
            for plan in _mtp_plans(offer.depths)
            if plan != self._best and self._last_rounds.get(plan, 0) <= due
        ]
        if not stale:
            return None
        plain_s, token_s = self.round_s(PLAIN, context), self._token_s(context)
        # What it costs if every draft is wrong.
        limits = {
            plan: PROBE_ROUNDS * max(self.round_s(plan, context) - token_s, LEAST_LOSS * plain_s)
            for plan in stale
        }
        catch_ups = {plan: self._catch_up_s(plan, context, offer) for plan in stale}

        def worth(plan: Plan) -> float:
            doubt = self._times.deviation(plan, self._best)
            gain = self._speed(plan, context, offer) * exp(OPTIMISM * doubt) * token_s - 1
            return max(gain, LEAST_GAIN) / (limits[plan] + catch_ups[plan])

        # If the budget does not cover it yet, it is saved up: else it would always go to cheaper plans.
        plan = max(stale, key=worth)
        saved_s = PROBE_CREDIT * plain_s + PROBE_SHARE * self._elapsed_s
        if limits[plan] + catch_ups[plan] > saved_s - self._probe_debt_s:
            return None
        self._probe_interval = min(2 * self._probe_interval, MAX_PROBE_INTERVAL)
        self._probe_debt_s += catch_ups[plan]
        return _Probe(plan, limits[plan])


@cache
def _mtp_plans(depths: tuple[int, ...]) -> tuple[Plan, ...]:
    return tuple(Plan("mtp", depth) if depth else PLAIN for depth in depths)


@cache
def _lookup_plans(num_tokens: int) -> tuple[Plan, ...]:
    lengths = {min(length, num_tokens) for length in LOOKUP_LENGTHS} - {0}
    return tuple(Plan("lookup", length) for length in sorted(lengths))
