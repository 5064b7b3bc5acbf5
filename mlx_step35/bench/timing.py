"""Clocks and what they say about several runs."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import inf
from statistics import median
from typing import Any

import mlx.core as mx


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and range of repeated measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(median(values), min(values), max(values))

    def as_json(self) -> dict[str, float]:
        return {name: round(value, 4) for name, value in asdict(self).items()}

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of one pass, run alone: building its graph, handing it to the device, waiting for the device.

    Decoding has one step in flight, so there the first two overlap with the third.
    """

    build_s: float
    dispatch_s: float
    wait_s: float

    @property
    def total_s(self) -> float:
        return self.build_s + self.dispatch_s + self.wait_s

    @property
    def host_s(self) -> float:
        return self.build_s + self.dispatch_s


def time_step(
    build: Callable[[], Any], repeats: int = 5, *, is_warm: bool = False, budget_s: float = inf
) -> StepTime:
    """Time what `build` returns, the median of some repeats by total; the first run counts only if warm.

    Once the budget is spent, what has been counted is enough.
    """
    times: list[StepTime] = []
    begin_s = time.perf_counter()
    for index in range(repeats + (not is_warm)):
        if times and time.perf_counter() - begin_s > budget_s:
            break
        start_s = time.perf_counter()
        arrays = build()
        built_s = time.perf_counter()
        mx.async_eval(arrays)
        sent_s = time.perf_counter()
        mx.eval(arrays)
        done_s = time.perf_counter()
        if is_warm or index > 0:
            times.append(StepTime(built_s - start_s, sent_s - built_s, done_s - sent_s))
    return sorted(times, key=lambda step: step.total_s)[len(times) // 2]
