"""Prefill and decode at context frontiers: one growing cache, every way of decoding from each frontier."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_step35.bench.timing import StepTime, time_step
from mlx_step35.cache import ModelCache
from mlx_step35.decoding import DecodeOptions, DecodeStats, MTPChoice, decode
from mlx_step35.model import Model
from mlx_step35.mtp_state import DraftState
from mlx_step35.sampling import SamplingParams

SEED = 0
VERIFY_WIDTHS = (1, 2, 3, 4)


@dataclass(frozen=True, slots=True)
class SweepOptions:
    """What to measure; a context of 0 is a prompt of one token."""

    contexts: tuple[int, ...] = (0, 2048, 8192, 16384, 32768)
    depths: tuple[MTPChoice, ...] = ("off", 1, 2, 3, "auto")
    temperatures: tuple[float, ...] = (0.0, 1.0)
    num_tokens: int = 128
    prefill_step_size: int = 2048


@dataclass(frozen=True, slots=True)
class DecodeRun:
    """One decode from a frontier."""

    depth: MTPChoice
    temperature: float
    tokens_per_s: float
    tokens_per_pass: float


@dataclass(frozen=True, slots=True)
class Frontier:
    """Everything measured at one context length; prefill counts from an empty cache."""

    context: int
    prefill_tokens_per_s: float
    first_token_s: float
    peak_bytes: int
    decodes: tuple[DecodeRun, ...]
    steps: dict[int, StepTime]

    def as_json(self) -> dict[str, Any]:
        return {
            "context": self.context,
            "prefill_tokens_per_s": round(self.prefill_tokens_per_s, 2),
            "time_to_first_token_s": round(self.first_token_s, 4),
            "peak_bytes": self.peak_bytes,
            "decode": [
                {
                    "mtp": run.depth,
                    "temperature": run.temperature,
                    "tokens_per_s": round(run.tokens_per_s, 2),
                    "tokens_per_pass": round(run.tokens_per_pass, 3),
                }
                for run in self.decodes
            ],
            "step_ms": {
                str(width): {
                    "host": round(step.host_s * 1e3, 3),
                    "build": round(step.build_s * 1e3, 3),
                    "dispatch": round(step.dispatch_s * 1e3, 3),
                    "wait": round(step.wait_s * 1e3, 3),
                }
                for width, step in self.steps.items()
            },
        }


def sweep(
    model: Model,
    text: Sequence[int],
    options: SweepOptions,
    on_done: Callable[[str], None] = lambda what: None,
) -> Iterator[Frontier]:
    """Measure every context, shortest first; `text` is repeated until it is long enough."""
    longest = max(options.contexts, default=0)
    tokens = (list(text) * (longest // len(text) + len(VERIFY_WIDTHS)))[: longest + len(VERIFY_WIDTHS)]
    cache = model.make_cache()
    prefill_s = 0.0
    for context in sorted(set(options.contexts)):
        mx.reset_peak_memory()
        prefill_s += _prefill(model, cache, tokens[len(cache.tokens) : context], options.prefill_step_size)
        on_done(f"prefill of {context}")
        saved = _Saved(model, cache)
        decodes = []
        first_s = 0.0
        for depth in options.depths:
            for temperature in options.temperatures:
                saved.restore(cache)
                run, first_s = _decode(model, cache, tokens[context], depth, temperature, options)
                decodes.append(run)
                on_done(f"context {context}, mtp {depth}, temperature {temperature:g}")
        steps = {width: _step(model, cache, tokens[:width]) for width in VERIFY_WIDTHS}
        peak = mx.get_peak_memory()
        saved.restore(cache)
        yield Frontier(
            context,
            context / prefill_s if context else 0.0,
            prefill_s + first_s,
            peak,
            tuple(decodes),
            steps,
        )


class _Saved:
    """A cache's state at a frontier."""

    def __init__(self, model: Model, cache: ModelCache) -> None:
        self._model = model
        self._layers = cache.snapshot()
        mx.eval([[layer.keys, layer.values] for layer in self._layers.layers if layer.keys is not None])
        self._tokens = list(cache.tokens)
        self._drafts = cache.mtp.snapshot() if cache.mtp is not None else None

    def restore(self, cache: ModelCache) -> None:
        cache.restore(self._layers)
        cache.tokens = list(self._tokens)
        cache.pending = []
        cache.mtp = None
        if self._drafts is not None and self._model.mtp is not None:
            cache.mtp = DraftState.from_snapshot(self._model.mtp, self._model.embed, self._drafts)
        mx.eval(cache.state)


def _prefill(model: Model, cache: ModelCache, tokens: Sequence[int], step_size: int) -> float:
    """Seconds to bring the cache to the end of `tokens`."""
    if not tokens:
        return 0.0
    start_s = time.perf_counter()
    options = DecodeOptions(1, "auto", lookup=False, prefill_step_size=step_size)
    with closing(decode(model, tokens, cache, SamplingParams(), options)) as decoded:
        next(decoded)
    mx.eval(cache.state)
    cache.pending = []
    return time.perf_counter() - start_s


def _decode(
    model: Model,
    cache: ModelCache,
    token: int,
    depth: MTPChoice,
    temperature: float,
    options: SweepOptions,
) -> tuple[DecodeRun, float]:
    """Decode from a frontier; also the seconds until the first token."""
    stats = DecodeStats()
    sampling = SamplingParams(temperature=temperature, seed=SEED if temperature else None)
    run = DecodeOptions(options.num_tokens + 1, depth, lookup=False)
    times = [time.perf_counter()]
    with closing(decode(model, [token], cache, sampling, run, stats=stats)) as decoded:
        times += [time.perf_counter() for _ in decoded]
    # The first token closes the prompt; what follows it is decoding.
    speed = (len(times) - 2) / (times[-1] - times[1])
    return DecodeRun(depth, temperature, speed, stats.tokens_per_pass), times[1] - times[0]


def _step(model: Model, cache: ModelCache, tokens: Sequence[int]) -> StepTime:
    """A verify of that many tokens, undone each time."""
    ids = mx.array([list(tokens)], dtype=mx.uint32)

    def build() -> list[mx.array]:
        if cache.offset > offset:
            cache.rollback(cache.offset - offset)
        return [model.logits(model.hidden(ids, cache)), *(array for layer in cache.state for array in layer)]

    offset = cache.offset
    found = time_step(build)
    cache.rollback(cache.offset - offset)
    return found
