"""Compiled steps: the same numbers as plain calls, at every offset, and no copies of the caches."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_step35.cache import MAX_STEP_TOKENS, CompiledStep, KVCache, SlidingKVCache
from mlx_step35.checkpoint import load_checkpoint
from mlx_step35.model import Model
from tests.tiny import VOCAB_SIZE

LENGTH = 160
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def compiled(tiny_path: Path) -> Model:
    model = load_checkpoint(tiny_path)
    mx.eval(model.parameters())
    model.compile_steps()
    return model


@pytest.fixture(scope="module")
def ids() -> mx.array:
    return mx.array(np.random.default_rng(7).integers(0, VOCAB_SIZE, (2, LENGTH)))


@pytest.mark.parametrize("first", [1, 5, 30])
@pytest.mark.parametrize("batch", [1, 2])
def test_any_mixture_of_widths_equals_one_plain_pass(
    compiled: Model, tiny_model: Model, ids: mx.array, first: int, batch: int
) -> None:
    expected = tiny_model(ids[:batch])
    generator = np.random.default_rng(first)
    cache = compiled.make_cache()
    parts, start = [compiled(ids[:batch, :first], cache=cache)], first
    while start < LENGTH:
        width = int(generator.integers(1, 5))
        # A rejected verify in between must leave no trace.
        rejected = compiled((ids[:batch, :width] + 1) % VOCAB_SIZE, cache=cache)
        mx.eval(rejected)
        cache.rollback(width)
        parts.append(compiled(ids[:batch, start : start + width], cache=cache))
        start += width
    logits = mx.concatenate(parts, axis=1)[:, :LENGTH]
    assert mx.abs(logits - expected).max().item() < TOLERANCE
    assert {layer.offset for layer in cache} == {cache.offset}


def test_plain_and_compiled_calls_may_alternate(compiled: Model, tiny_model: Model, ids: mx.array) -> None:
    cache, expected = compiled.make_cache(), tiny_model(ids[:1])
    parts, start = [], 0
    for width in (MAX_STEP_TOKENS + 1, 3, 70, 1, MAX_STEP_TOKENS, 20, 2):
        parts.append(compiled(ids[:1, start : start + width], cache=cache))
        start += width
    assert mx.abs(mx.concatenate(parts, axis=1) - expected[:, :start]).max().item() < TOLERANCE


def test_snapshots_survive_compiled_steps(compiled: Model, ids: mx.array) -> None:
    cache = compiled.make_cache()
    compiled(ids[:1, :40], cache=cache)
    snapshot = cache.snapshot()
    first = compiled(ids[:1, 40:43], cache=cache)
    mx.eval(first, compiled(ids[:1, 50:60], cache=cache))
    cache.restore(snapshot)
    assert mx.array_equal(compiled(ids[:1, 40:43], cache=cache), first)


def test_mtp_layers_are_compiled_too(compiled: Model, tiny_model: Model, ids: mx.array) -> None:
    hidden, embeddings = tiny_model.hidden(ids[:1]), tiny_model.embed(ids[:1])
    for k, cache in enumerate(compiled.mtp.make_cache()):
        expected = tiny_model.mtp.step(k, embeddings, hidden)
        parts = [
            compiled.mtp.step(k, embeddings[:, i : i + 4], hidden[:, i : i + 4], cache)
            for i in range(0, LENGTH, 4)
        ]
        assert mx.abs(mx.concatenate(parts, axis=1) - expected).max().item() < TOLERANCE


def test_without_buffers_a_plain_call_is_asked_for() -> None:
    step = CompiledStep(lambda inputs, masks, caches: inputs[0], [None, 8])
    caches = [KVCache(), SlidingKVCache(8)]
    assert step([mx.zeros((1, 2, 4))], caches) is None
    assert [cache.offset for cache in caches] == [0, 0]


def test_steps_copy_nothing() -> None:
    def forward(inputs: object, masks: object, caches: object) -> mx.array:
        rows = inputs[0][:, None]  # type: ignore[index]
        keys, values = caches[0].update(rows, rows)  # type: ignore[index]
        return keys[0, 0, 0, 0] + values[0, 0, 0, 0]

    step, cache = CompiledStep(forward, [None]), KVCache()
    keys = mx.zeros((1, 1, 60_000, 64))
    cache.update(keys, keys)
    del keys
    row = mx.ones((1, 1, 64))
    mx.eval(row, cache.state, step([row], [cache]))
    mx.eval(cache.state)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for _ in range(10):
        mx.eval(step([row], [cache]), cache.state)
    assert mx.get_peak_memory() - before < cache.nbytes // 8
    assert cache.offset == 60_011


def test_a_compiled_model_is_still_a_module_tree(compiled: Model) -> None:
    assert any(module is compiled.mtp.layers[0] for module in compiled.modules())
    assert len(compiled.parameters()["mtp"]["layers"]) == 3
