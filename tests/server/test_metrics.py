"""Figures of a server that has been asked odd things for long."""

import tracemalloc

from mlx_step35.engine.engine import Engine
from mlx_step35.engine.runner import Runner
from mlx_step35.http.metrics import Metrics


def never() -> Runner:
    raise AssertionError("nobody starts this engine")


def test_names_of_unknown_fields_take_little_memory() -> None:
    metrics = Metrics(Engine(never))
    metrics.note_unknown("chat", ("first",))
    tracemalloc.start()
    try:
        for number in range(20):
            metrics.note_unknown("chat", (f"{number} " + "x" * 1_000_000,))
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert used < 1_000_000
    assert b'unknown_fields_total{endpoint="chat"} 21.0' in metrics.text()
