"""Simulated machines and texts for the depth controller: a fake clock whose truth is known.

A world has a true cost for every kind of round and decides for every position in advance which drafts are
right there, so every way of decoding meets the same text. The controller is shown noisy times; what is
compared is the true cost of what it chose, in which noise has no part.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

from mlx_step35.depth import PLAIN, DepthController, Offer, Plan

Cost = Callable[[Plan, int], float]
# Probability that the k-th draft is right, given those before it, for a position in the text.
Acceptance = Callable[[int, int], float]

DEPTHS = (0, 1, 2, 3)


@dataclass(frozen=True, slots=True)
class Noise:
    """Measured over true time: lognormal, sometimes a long pause, and stretches in which all is slower."""

    sigma: float = 0.0
    spikes: float = 0.0
    spike: float = 10.0
    load: float = 1.0
    load_rounds: int = 400

    def factor(self, generator: random.Random, num_rounds: int) -> float:
        slow = self.load if num_rounds // self.load_rounds % 2 else 1.0
        pause = self.spike if generator.random() < self.spikes else 1.0
        return slow * pause * generator.lognormvariate(0, self.sigma)


QUIET = Noise(0.03)
BUSY = Noise(0.3, spikes=0.03)
VARYING = Noise(0.15, spikes=0.02, load=2.5)
NOISES = {"quiet": QUIET, "busy": BUSY, "varying load": VARYING}


@dataclass
class World:
    """A machine and a text of `num_tokens`."""

    cost: Cost
    acceptance: Acceptance
    noise: Noise = QUIET
    # Tokens that lookup proposes at a position, how many of them are right, and the match's length.
    lookup: Callable[[int], tuple[int, int, int]] = lambda position: (0, 0, 0)
    num_tokens: int = 8000
    seed: int = 0
    depths: tuple[int, ...] = DEPTHS
    # A new answer every so many tokens: there the layers have seen nothing.
    answer_tokens: int = 8000
    # Rows before the newest that one layer sees, and what it costs to run one row.
    window: int = 64
    row_cost: float = 0.02
    generator: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.generator = random.Random(f"noise {self.seed}")

    @cached_property
    def right(self) -> list[tuple[bool, ...]]:
        """Per position, whether each draft that starts there is right, given those before it."""
        generator = random.Random(f"text {self.seed}")
        return [
            tuple(generator.random() < self.acceptance(k, position) for k in range(max(self.depths)))
            for position in range(self.num_tokens)
        ]

    def accepted(self, plan: Plan, position: int) -> int:
        if plan.source == "lookup":
            return min(plan.depth, self.lookup(position)[1])
        drafts = self.right[position][: plan.depth]
        return drafts.index(False) if False in drafts else plan.depth

    def fixed(self, plan: Plan, start: int = 0) -> float:
        """True cost of decoding everything from `start` on with one plan."""
        position, cost = start, 0.0
        answer = start // self.answer_tokens if start else -1
        while position < self.num_tokens:
            if position // self.answer_tokens != answer:
                answer = position // self.answer_tokens
                cost += self.row_cost * self.rows_behind([self.num_tokens] * 3, plan.depth)
            cost += self.cost(plan, position)
            position += self.accepted(plan, position) + 1
        return cost

    def rows_behind(self, behind: Sequence[int], depth: int) -> int:
        """Rows that the first `depth` layers must run, given how many each did not see.

        One that starts again needs a window of rows for their keys only, which are a fifth of the work.
        """
        reach = self.window - 1
        again = [int((depth - k - 0.8) * reach) for k in range(depth)]
        return sum(max(min(*counts) - 6, 0) for counts in zip(again, behind, strict=False))

    def off(self, start: int = 0) -> float:
        return self.fixed(PLAIN, start)

    def best(self, start: int = 0) -> float:
        """True cost of the best fixed depth."""
        return min(self.fixed(plan_of(depth), start) for depth in self.depths)

    def auto(self, controller: DepthController, settled: int = 400) -> tuple[float, Counter[Plan]]:
        """True cost of what the controller chose from position `settled` on, and its plans there."""
        chosen: Counter[Plan] = Counter()
        position, cost, num_rounds, answer = 0, 0.0, 0, -1
        behind: list[int] = []
        while position < self.num_tokens:
            if position // self.answer_tokens != answer:
                behind, answer = [self.num_tokens] * 3, position // self.answer_tokens
            num_drafts, _, match_length = self.lookup(position)
            offer = Offer(self.depths, num_drafts, match_length, partial(self.rows_behind, behind))
            plan = controller.choose(position, offer)
            accepted, caught_up = self.accepted(plan, position), offer.catch_up_rows(plan)
            true_cost = self.cost(plan, position) + self.row_cost * caught_up
            factor = self.noise.factor(self.generator, num_rounds)
            num_rounds += 1
            controller.observe(plan, accepted, 0.01 * true_cost * factor, position, match_length, caught_up)
            if position >= settled:
                cost += true_cost
                chosen[plan] += 1
            used = plan.depth if plan.source == "mtp" else 0
            behind = [0] * used + [rows + accepted + 1 for rows in behind[used:]]
            position += accepted + 1
        return cost, chosen


def plan_of(depth: int) -> Plan:
    return Plan("mtp", depth) if depth else PLAIN


def rounds(*widths: float, head: float = 0.0) -> Cost:
    """Costs of a verify of 2, 3, 4, 8, 16 tokens in plain steps, and of each head before it."""
    table = dict(zip((0, 1, 2, 3, 7, 15), (1.0, *widths), strict=True))

    def cost(plan: Plan, position: int) -> float:
        least = min(depth for depth in table if depth >= plan.depth)
        return table[least] + (head * plan.depth if plan.source == "mtp" else 0.0)

    return cost


def steady(*rates: float) -> Acceptance:
    return lambda k, position: rates[k]


def copying(position: int) -> tuple[int, int, int]:
    """Every 600 tokens 120 are a copy; elsewhere one position in five has a match by chance."""
    place = position % 600
    if 3 < place < 120:
        return 15, min(119 - place, 15), min(32, 4 + place)
    return (15, 0, 3 + 4 * (place % 7 == 0)) if position * 2654435761 % 100 < 20 else (0, 0, 0)


def chance(position: int) -> tuple[int, int, int]:
    """Two positions in five have a match; it is right for one token in a few of them."""
    if position * 2654435761 % 100 >= 40:
        return 0, 0, 0
    return 15, int(position * 7919 % 10 < 2), 3 + 6 * (position * 40503 % 100 < 25)


def alternating(length: int, first: tuple[float, ...], second: tuple[float, ...]) -> Acceptance:
    return lambda k, position: (second if position // length % 2 else first)[k]


# A model as small as nano, where Python and drafting weigh much, the same on a machine that is slow at large
# products, and a model dominated by the bytes it reads.
SMALL = rounds(1.29, 1.35, 1.5, 2.0, 3.0, head=0.2)
SLOW = rounds(1.42, 1.7, 2.05, 2.4, 3.5, head=0.2)
LARGE = rounds(1.45, 1.88, 2.31, 3.9, 6.6, head=0.07)


def growing(base: Cost, per_token: float, drafting: float = 1.0) -> Cost:
    """Costs that grow with the context: every round by the same, times `drafting` for those with drafts."""

    def cost(plan: Plan, position: int) -> float:
        return base(plan, position) + per_token * position * (drafting if plan.depth else 1.0)

    return cost
