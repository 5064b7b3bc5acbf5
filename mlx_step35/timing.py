"""What rounds of each kind cost, learned from times that a busy machine makes noisy.

The logarithm of a round's time is taken as the sum of the machine's pace, which wanders, the cost of the
round's kind beside a plain round, which hardly changes, and noise. A Kalman filter over pace and costs tells
them apart: as long as one kind runs alone, slower rounds mean a slower machine; only a change of kind says
anything about their costs. So a load that comes and goes makes no kind look better. A surprise beyond a few
deviations is taken for noise, so a pause hardly matters; how noisy times are is learned.
"""

from collections.abc import Collection, Hashable
from math import exp, log, sqrt
from statistics import median
from typing import Generic, TypeVar

Kind = TypeVar("Kind", bound=Hashable)

# Per round the pace may change by 3%, a cost by 0.2%; before it is measured a cost may be off by 35%.
PACE_DRIFT = 0.03**2
COST_DRIFT = 0.004**2
COST_PRIOR = 0.35**2
PACE_PRIOR = 1e6
# Variance of one round's time at first, its least value, and how fast it is learned.
NOISE = 0.15**2
LEAST_NOISE = 0.02**2
NOISE_GAIN = 0.05
# Deviations beyond which a surprise is taken for noise: it counts the less the larger it is.
SURPRISE = 2.5
# The first rounds decide by their median: without a pace every time is a surprise.
FIRST_ROUNDS = 5


class RoundTimes(Generic[Kind]):
    """Times of kinds of rounds, in seconds per unit of expected work; `reference` has cost 1."""

    def __init__(self, reference: Kind) -> None:
        self._reference = reference
        # Means and covariances of the logarithms; entry 0 is the pace.
        self._means = [0.0]
        self._covariance = [[PACE_PRIOR]]
        self._places: dict[Kind, int] = {}
        self._noise = NOISE
        self._first: list[float] = []
        self._unit_s: dict[Kind, float] = {}

    def kinds(self) -> Collection[Kind]:
        """Those measured."""
        return self._unit_s.keys()

    def __contains__(self, kind: Kind) -> bool:
        return kind in self._unit_s

    def __getitem__(self, kind: Kind) -> float:
        """Seconds per unit of a measured kind at the present pace."""
        return self._unit_s[kind]

    def deviation(self, kind: Kind, other: Kind) -> float:
        """Standard deviation of the logarithm of how many times longer one kind takes than the other."""
        variance, first, second = 0.0, self._places.get(kind), self._places.get(other)
        for place in (first, second):
            variance += COST_PRIOR if place is None else self._cost_variance(place, place)
        if first is not None and second is not None:
            variance -= 2 * self._cost_variance(first, second)
        return sqrt(max(variance, 0.0))

    def observe(self, kind: Kind, unit_s: float, guess: float) -> None:
        """Learn from one round; `guess` is the cost of its kind as far as known if this is the first."""
        value = log(unit_s)
        if not self._unit_s:
            self._first.append(value)
            if len(self._first) < FIRST_ROUNDS:
                return
            value = median(self._first)
        self._drift()
        place = self._place(kind, guess)
        error, variance = self._surprise(place, value)
        if self._unit_s:
            known, limit = variance - self._noise, SURPRISE**2 * variance
            square = min(error * error, limit)
            self._noise = max(self._noise + NOISE_GAIN * (square - known - self._noise), LEAST_NOISE)
            variance = max(variance, error * error / SURPRISE**2)
        self._correct(place, error, variance)
        self._unit_s = {
            kind: exp(self._means[0] + (self._means[place] if place else 0.0))
            for kind, place in self._places.items()
        }

    def _place(self, kind: Kind, guess: float) -> int:
        """The kind's row; 0 for the reference, whose cost is nothing but the pace."""
        if kind not in self._places:
            if kind == self._reference:
                self._places[kind] = 0
            else:
                self._places[kind] = len(self._means)
                self._means.append(log(guess))
                for row in self._covariance:
                    row.append(0.0)
                self._covariance.append([0.0] * len(self._means))
                self._covariance[-1][-1] = COST_PRIOR
        return self._places[kind]

    def _drift(self) -> None:
        for place, row in enumerate(self._covariance):
            row[place] += COST_DRIFT if place else PACE_DRIFT

    def _surprise(self, place: int, value: float) -> tuple[float, float]:
        """How far a logarithm is from what was expected, and the variance of that."""
        mean, variance = self._means[0], self._covariance[0][0]
        if place:
            mean += self._means[place]
            variance += 2 * self._covariance[0][place] + self._covariance[place][place]
        return value - mean, variance + self._noise

    def _correct(self, place: int, error: float, variance: float) -> None:
        rows = self._covariance
        gains = [(row[0] + (row[place] if place else 0.0)) / variance for row in rows]
        for at, gain in enumerate(gains):
            self._means[at] += gain * error
            for other, other_gain in enumerate(gains):
                rows[at][other] -= gain * other_gain * variance

    def _cost_variance(self, place: int, other: int) -> float:
        """Covariance of two costs; the reference's is known."""
        return self._covariance[place][other] if place and other else 0.0
