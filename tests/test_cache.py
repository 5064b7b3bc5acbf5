"""Caches against brute force: what a query may see, after any history of chunks, rollbacks and restores."""

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_step35.cache import (
    KVCache,
    LayerCache,
    LayerSnapshot,
    ModelCache,
    SlidingKVCache,
    window_mask,
)
from mlx_step35.cache.layers import SLIDING_ROOM
from mlx_step35.config import ModelConfig
from mlx_step35.errors import CacheRollbackError
from tests.tiny import WINDOW, tiny_config


def rows(values: list[float], heads: int = 1) -> mx.array:
    """One key per value, (1, heads, L, 1)."""
    return mx.broadcast_to(
        mx.array(values, dtype=mx.float32)[None, None, :, None], (1, heads, len(values), 1)
    )


def visible(cache: LayerCache, values: list[float]) -> list[list[float]]:
    """Feed rows; per new token the values of the keys it sees, checking that values went along with keys."""
    mask = cache.mask(len(values))
    keys, doubled = cache.update(rows(values), 2 * rows(values))
    assert mx.array_equal(2 * keys, doubled)
    flat = np.array(keys)[0, 0, :, 0]
    shown = np.ones((len(values), len(flat)), dtype=bool)
    if isinstance(mask, str):
        assert mask == "causal"
        shown = np.tril(shown, len(flat) - len(values))
    elif mask is not None:
        shown = np.array(mask)
    assert shown.shape == (len(values), len(flat))
    return [flat[line].tolist() for line in shown]


@dataclass
class History:
    """The truth beside a cache: every value so far, and the highest offset reached."""

    values: list[float] = field(default_factory=list)
    highest: int = 0

    def copy(self) -> "History":
        return History(list(self.values), self.highest)


# A step is a chunk length, a rollback, a snapshot or a return to one.
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("feed"), st.sampled_from([1, 1, 1, 2, 4, 7, 16, 40])),
        st.tuples(st.just("rollback"), st.integers(0, 16)),
        st.tuples(st.just("snapshot"), st.just(0)),
        st.tuples(st.just("restore"), st.integers(0, 9)),
    ),
    max_size=40,
)


@settings(deadline=None, max_examples=300)
@given(window=st.sampled_from([None, 1, 2, 8, 13]), slack=st.sampled_from([1, 4, 16]), steps=STEPS)
def test_any_history_shows_exactly_the_window(
    window: int | None, slack: int, steps: list[tuple[str, int]]
) -> None:
    cache: LayerCache = KVCache() if window is None else SlidingKVCache(window, slack)
    history, saved, counter = History(), list[tuple[LayerSnapshot, History]](), 0
    for action, number in steps:
        if action == "feed":
            new = [float(counter + i) for i in range(number)]
            counter += number
            seen = visible(cache, new)
            history.values += new
            history.highest = max(history.highest, len(history.values))
            for i, keys in enumerate(seen):
                end = len(history.values) - number + i + 1
                start = 0 if window is None else max(0, end - window)
                assert keys == history.values[start:end]
        elif action == "rollback":
            target = len(history.values) - number
            if target < 0:
                assert not cache.can_rollback(number)
            elif window is None or target >= history.highest - slack:
                cache.rollback(number)
                history.values = history.values[:target]
        elif action == "snapshot":
            saved.append((cache.snapshot(), history.copy()))
        elif saved:
            snapshot, truth = saved[number % len(saved)]
            cache.restore(snapshot)
            history = truth.copy()
        assert cache.offset == len(history.values)


@pytest.mark.parametrize("length", [WINDOW - 2, WINDOW, WINDOW + 1, 3 * WINDOW, 200])
def test_a_refused_rollback_changes_nothing(length: int) -> None:
    cache = SlidingKVCache(WINDOW, slack=4)
    values = [float(i) for i in range(length)]
    visible(cache, values)
    depth = next((n for n in range(length + 2) if not cache.can_rollback(n)), None)
    assert depth is not None
    assert depth > min(4, length)
    before = [np.array(array) for array in cache.state]
    with pytest.raises(CacheRollbackError):
        cache.rollback(depth)
    assert cache.offset == length
    assert all(np.array_equal(old, np.array(new)) for old, new in zip(before, cache.state, strict=True))
    assert visible(cache, [-1.0]) == [[*values[-(WINDOW - 1) :], -1.0]]


def test_the_window_counts_the_current_token() -> None:
    cache = SlidingKVCache(512)
    values = [float(i) for i in range(2000)]
    assert visible(cache, values)[1500] == values[989:1501]
    assert visible(cache, [-1.0]) == [[*values[-511:], -1.0]]


@pytest.mark.parametrize("offset", [0, 1, WINDOW - 1, WINDOW, WINDOW + 1, 5 * WINDOW])
@pytest.mark.parametrize("width", [1, 2, 5, 16])
def test_a_rejected_verify_leaves_no_trace(offset: int, width: int) -> None:
    plain, verified = SlidingKVCache(WINDOW), SlidingKVCache(WINDOW)
    for i in range(offset):
        visible(plain, [float(i)])
        visible(verified, [float(i)])
    for rejected in range(width + 1):
        visible(verified, [-2.0] * width)
        verified.rollback(width)
        assert verified.offset == plain.offset, rejected
    assert visible(verified, [7.0, 8.0]) == visible(plain, [7.0, 8.0])


def test_snapshots_do_not_see_later_writes() -> None:
    for cache in (KVCache(), SlidingKVCache(WINDOW)):
        visible(cache, [1.0, 2.0, 3.0])
        snapshot, state = cache.snapshot(), cache.state
        before = [np.array(array) for array in (snapshot.keys, snapshot.values, *state)]
        cache.rollback(2)
        visible(cache, [9.0] * 30)
        after = [np.array(array) for array in (snapshot.keys, snapshot.values, *state)]
        assert all(np.array_equal(old, new) for old, new in zip(before, after, strict=True))
        cache.restore(snapshot)
        visible(cache, [5.0])
        assert np.array_equal(np.array(snapshot.keys), before[0])


def test_a_snapshot_holds_no_spare_room() -> None:
    full, sliding = KVCache(), SlidingKVCache(WINDOW, slack=4)
    for cache in (full, sliding):
        visible(cache, [float(i) for i in range(1000)])
    for snapshot, num_rows in ((full.snapshot(), 1000), (sliding.snapshot(), WINDOW - 1 + 4)):
        assert snapshot.keys is not None
        assert snapshot.keys.shape[2] == num_rows
        assert snapshot.nbytes == 2 * num_rows * 4
    assert full.nbytes == sum(array.nbytes for array in full.state)
    # Constant, however long the sequence.
    assert sliding.nbytes == 2 * 4 * (WINDOW - 1 + 4 + SLIDING_ROOM)


@pytest.mark.parametrize("num_heads", [1, 2])
@pytest.mark.parametrize("make", [KVCache, partial(SlidingKVCache, WINDOW)])
def test_copies_keep_nothing_else_alive(make: Callable[[], LayerCache], num_heads: int) -> None:
    """A slice of one head's rows is contiguous as it is, and would do as a copy of itself."""
    new = mx.zeros((1, num_heads, 10, 4))
    mx.eval(new)
    # Buffers kept from earlier tests would be handed out, and may be much larger.
    mx.clear_cache()
    before = mx.get_active_memory()
    copies: list[mx.array] = []
    for _ in range(20):
        cache = make()
        cache.update(new, new)
        snapshot = cache.snapshot()
        assert snapshot.keys is not None and snapshot.values is not None
        copies += [snapshot.keys, snapshot.values]
        if isinstance(cache, KVCache):
            copies += cache.read(2, 5)
        mx.eval(copies, cache.state)
    del cache, snapshot
    gc.collect()
    # MLX may hand out a used buffer that is somewhat larger.
    assert mx.get_active_memory() - before < 1.5 * sum(array.nbytes for array in copies)


def test_writing_in_place_copies_nothing() -> None:
    cache = KVCache()
    keys = mx.zeros((1, 8, 4096, 64))
    cache.update(keys, keys)
    mx.eval(cache.state)
    row = mx.ones((1, 8, 1, 64))
    mx.eval(row)
    active = mx.get_active_memory()
    mx.reset_peak_memory()
    for _ in range(20):
        cache.update(row, row)
        mx.eval(cache.state)
    assert mx.get_peak_memory() - active < cache.nbytes // 8


def test_growth_keeps_every_row() -> None:
    cache = KVCache()
    for start in range(0, 3000, 100):
        visible(cache, [float(i) for i in range(start, start + 100)])
    assert visible(cache, [-1.0]) == [[*(float(i) for i in range(3000)), -1.0]]
    assert cache.nbytes <= 2 * 4 * (3001 * 9 // 8 + 257)


def test_buffers_can_be_exchanged() -> None:
    cache = SlidingKVCache(WINDOW)
    assert cache.state == []
    visible(cache, [1.0, 2.0])
    cache.state = [array + 1 for array in cache.state]
    keys, _ = cache.update(rows([3.0]), rows([3.0]))
    assert np.array(keys).ravel().tolist() == [2.0, 3.0, 3.0]


class TestModelCache:
    def make(self, slack: int = 4) -> ModelCache:
        return ModelCache(ModelConfig.from_hf(tiny_config()).layers, slack)

    def feed(self, cache: ModelCache, values: list[float]) -> None:
        for layer in cache:
            layer.update(rows(values), 2 * rows(values))

    def test_layers_by_kind(self) -> None:
        cache = self.make()
        assert [type(layer) for layer in cache[:5]] == [KVCache, *[SlidingKVCache] * 3, KVCache]
        assert len(cache) == 6
        assert cache.offset == cache.nbytes == 0
        assert (cache.tokens, cache.pending, cache.mtp) == ([], [], None)

    def test_rollback_is_all_or_none(self) -> None:
        cache = self.make()
        self.feed(cache, [float(i) for i in range(100)])
        cache.tokens = list(range(100))
        with pytest.raises(CacheRollbackError, match="cannot forget 30 of 100"):
            cache.rollback(30)
        assert {layer.offset for layer in cache} == {100}
        assert len(cache.tokens) == 100
        cache.rollback(4)
        assert {layer.offset for layer in cache} == {96}
        assert cache.tokens == list(range(96))

    def test_a_negative_rollback_is_refused(self) -> None:
        cache = self.make()
        self.feed(cache, [1.0])
        with pytest.raises(CacheRollbackError):
            cache.rollback(-1)

    def test_snapshot_and_restore(self) -> None:
        cache, other = self.make(), self.make()
        self.feed(cache, [float(i) for i in range(50)])
        snapshot = cache.snapshot()
        assert snapshot.offset == 50
        assert snapshot.nbytes == sum(layer.nbytes for layer in snapshot.layers)
        self.feed(cache, [-1.0] * 9)
        other.restore(snapshot)
        cache.restore(snapshot)
        for mine, its in zip(cache, other, strict=True):
            assert visible(mine, [3.0]) == visible(its, [3.0])
        assert cache.offset == other.offset == 51

    def test_state_lists_every_buffer(self) -> None:
        cache = self.make()
        assert cache.state == [[]] * 6
        self.feed(cache, [1.0])
        assert [len(arrays) for arrays in cache.state] == [2] * 6
        cache.state = [[array + 1 for array in arrays] for arrays in cache.state]
        assert np.array(cache.state[3][0])[0, 0, 0, 0] == 2.0


@pytest.mark.parametrize("window", [None, 1, 3, 512])
def test_masks_by_brute_force(window: int | None) -> None:
    for past in (0, 1, 2, 5, 7):
        num_past = past if window is None else min(past, window - 1)
        for new in (1, 2, 3, 9):
            mask = window_mask(new, num_past, window)
            shown = np.ones((new, num_past + new), dtype=bool)
            if isinstance(mask, str):
                shown = np.tril(shown, num_past)
            elif mask is not None:
                shown = np.array(mask)
            for i in range(new):
                for j in range(num_past + new):
                    distance = num_past + i - j
                    assert shown[i, j] == (distance >= 0 and (window is None or distance < window))
