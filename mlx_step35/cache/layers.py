"""The caches of single layers.

Both kinds keep their rows in temporal order in a buffer with spare room at the end, so decoding writes in
place and attends over one contiguous slice. A full layer keeps every row. A sliding layer keeps the rows
its window can still see plus `slack` older ones, and moves them to the front whenever the buffer is full;
no row is overwritten before that, so every offset from `slack` tokens below the highest one reached can be
returned to exactly.

Writes are functional (`mx.slice_update`, in place when nothing else holds the buffer), so an array handed
out by `snapshot` or `state` never changes afterwards.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_step35.config import LayerConfig
from mlx_step35.errors import CacheRollbackError

# The widest verify is 16 tokens: one accepted token and 15 drafts, all of which may be rejected.
DEFAULT_SLACK = 16

# Spare rows of a sliding layer: as many tokens between two moves of the window to the front.
SLIDING_ROOM = 64

# A full layer's buffer grows by an eighth, at least this many rows: few copies, at most an eighth of it
# unused.
GROWTH_ROWS = 256

# Arrays that 16 KB more or less are nothing to.
LARGE_BYTES = 1 << 20

Mask = mx.array | str | None


@dataclass(frozen=True, slots=True)
class LayerSnapshot:
    """One layer's rows at one moment: `keys` and `values` are (B, heads, rows, head_dim), None when empty."""

    offset: int
    keys: mx.array | None
    values: mx.array | None

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (self.keys, self.values) if array is not None)


class _Rows:
    """A growable pair of buffers, `end` rows of which are in use, in temporal order along axis 2."""

    def __init__(self) -> None:
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.end = 0

    @property
    def capacity(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (self.keys, self.values) if array is not None)

    def append(self, keys: mx.array, values: mx.array) -> None:
        """Write behind the rows in use; there must be room, because MLX does not check."""
        assert self.keys is not None and self.values is not None
        assert self.end + keys.shape[2] <= self.capacity
        start = mx.array([self.end])
        self.keys = mx.slice_update(self.keys, keys, start, axes=(2,))
        self.values = mx.slice_update(self.values, values, start, axes=(2,))
        self.end += keys.shape[2]

    def read(self, start: int) -> tuple[mx.array, mx.array]:
        """The rows in use from `start` on, as views of the buffers."""
        assert self.keys is not None and self.values is not None
        return self.keys[:, :, start : self.end], self.values[:, :, start : self.end]

    def replace(self, keys: mx.array, values: mx.array, spare: int) -> None:
        """Take these rows as the only ones, in new buffers with room for `spare` more."""
        self.end = keys.shape[2]
        self.keys = mx.concatenate([keys, _blank(keys, spare)], axis=2)
        self.values = mx.concatenate([values, _blank(values, spare)], axis=2)

    def arrays(self) -> list[mx.array]:
        return [] if self.keys is None or self.values is None else [self.keys, self.values]

    def set_arrays(self, arrays: Sequence[mx.array]) -> None:
        """Exchange the buffers for others of the same shape, for instance the results of a compiled step."""
        assert [array.shape for array in arrays] == [array.shape for array in self.arrays()]
        if arrays:
            self.keys, self.values = arrays

    def snapshot(self, offset: int, start: int) -> LayerSnapshot:
        """A compact copy of the rows from `start` on, so that it does not hold the spare room alive."""
        if self.keys is None:
            return LayerSnapshot(offset, None, None)
        keys, values = self.read(start)
        return LayerSnapshot(offset, compact(keys), compact(values))


class _Buffered:
    """What both kinds have in common: rows in buffers."""

    def __init__(self) -> None:
        self._rows = _Rows()

    @property
    def nbytes(self) -> int:
        """Allocated bytes, spare room included."""
        return self._rows.nbytes

    @property
    def state(self) -> list[mx.array]:
        """The arrays to evaluate after a model call."""
        return self._rows.arrays()

    @state.setter
    def state(self, arrays: Sequence[mx.array]) -> None:
        self._rows.set_arrays(arrays)


class KVCache(_Buffered):
    """Keys and values of every token of one full-attention layer."""

    @property
    def offset(self) -> int:
        """Tokens seen, and the position of the next one."""
        return self._rows.end

    def mask(self, num_tokens: int) -> Mask:
        """The mask for `num_tokens` new tokens over what `update` will return for them."""
        return window_mask(num_tokens, self.offset, None)

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append (B, heads, L, head_dim) rows; returns all rows, valid until the next update."""
        rows = self._rows
        if self.place(keys.shape[2]) is None:
            rows.replace(keys[:, :, :0], values[:, :, :0], _full_capacity(keys.shape[2]))
        rows.append(keys, values)
        return rows.read(0)

    def read(self, start: int, end: int) -> tuple[mx.array, mx.array]:
        """Compact copies of rows start..end-1; later updates do not touch them."""
        assert 0 <= start <= end <= self.offset
        keys, values = self._rows.read(start)
        return compact(keys[:, :, : end - start]), compact(values[:, :, : end - start])

    def place(self, num_tokens: int) -> int | None:
        """Make room for that many tokens; returns where they go, None without a buffer."""
        rows = self._rows
        if rows.keys is None:
            return None
        if rows.end + num_tokens > rows.capacity:
            rows.replace(*rows.read(0), _full_capacity(rows.end + num_tokens) - rows.end)
        return rows.end

    def commit(self, arrays: Sequence[mx.array], num_tokens: int) -> None:
        """Take the buffers of a compiled step that wrote that many rows at `place`."""
        self._rows.set_arrays(arrays)
        self._rows.end += num_tokens

    def can_rollback(self, num_tokens: int) -> bool:
        return 0 <= num_tokens <= self.offset

    def rollback(self, num_tokens: int) -> None:
        """Forget the newest tokens exactly, or raise CacheRollbackError and change nothing."""
        if not self.can_rollback(num_tokens):
            raise CacheRollbackError(f"cannot forget {num_tokens} of {self.offset} tokens")
        self._rows.end -= num_tokens

    def snapshot(self) -> LayerSnapshot:
        """The present state; later updates do not touch it."""
        return self._rows.snapshot(self.offset, 0)

    def restore(self, snapshot: LayerSnapshot) -> None:
        """Go to the state of a snapshot, whatever the cache holds now."""
        self._rows = _Rows()
        if snapshot.keys is not None and snapshot.values is not None:
            self._rows.replace(
                snapshot.keys, snapshot.values, _full_capacity(snapshot.offset) - snapshot.offset
            )


class SlidingKVCache(_Buffered):
    """Keys and values one sliding-attention layer can still need: its window and `slack` tokens before it."""

    def __init__(self, window: int, slack: int = DEFAULT_SLACK) -> None:
        super().__init__()
        self.window = window
        self.slack = slack
        self.offset = 0

    def mask(self, num_tokens: int) -> Mask:
        """The mask for `num_tokens` new tokens over what `update` will return for them."""
        return window_mask(num_tokens, self._num_visible, self.window)

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append (B, heads, L, head_dim) rows, L of any length.

        Returns the rows that the first new token's window still reaches, and all new ones; valid until the
        next update.
        """
        rows = self._rows
        num_tokens, visible = keys.shape[2], self._num_visible
        if rows.keys is None:
            rows.replace(keys[:, :, :0], values[:, :, :0], self._held + self._room)
        if num_tokens > self._room and rows.end + num_tokens > rows.capacity:
            return self._update_long(keys, values, visible)
        self.place(num_tokens)
        rows.append(keys, values)
        self.offset += num_tokens
        return rows.read(rows.end - num_tokens - visible)

    def place(self, num_tokens: int) -> int | None:
        """Make room for at most SLIDING_ROOM tokens; returns where they go, None without a buffer."""
        rows = self._rows
        if rows.keys is None:
            return None
        if rows.end + num_tokens > rows.capacity:
            assert num_tokens <= self._room
            kept = min(rows.end, self._held)
            rows.replace(*rows.read(rows.end - kept), self._held + self._room - kept)
        return rows.end

    def commit(self, arrays: Sequence[mx.array], num_tokens: int) -> None:
        """Take the buffers of a compiled step that wrote that many rows at `place`."""
        self._rows.set_arrays(arrays)
        self._rows.end += num_tokens
        self.offset += num_tokens

    def can_rollback(self, num_tokens: int) -> bool:
        """True down to `slack` tokens below the highest offset reached, and below while rows remain."""
        target = self.offset - num_tokens
        oldest_row = self.offset - self._rows.end
        return 0 <= num_tokens <= self.offset and max(target - (self.window - 1), 0) >= oldest_row

    def rollback(self, num_tokens: int) -> None:
        """Forget the newest tokens exactly, or raise CacheRollbackError and change nothing."""
        if not self.can_rollback(num_tokens):
            raise CacheRollbackError(
                f"cannot forget {num_tokens} of {self.offset} tokens: "
                f"the window of {self.window} before them is kept for {self.slack}"
            )
        self._rows.end -= num_tokens
        self.offset -= num_tokens

    def snapshot(self) -> LayerSnapshot:
        """The present state, with the rows that a later rollback may need; later updates do not touch it."""
        return self._rows.snapshot(self.offset, max(self._rows.end - self._held, 0))

    def restore(self, snapshot: LayerSnapshot) -> None:
        """Go to the state of a snapshot, whatever the cache holds now."""
        self._rows = _Rows()
        self.offset = snapshot.offset
        if snapshot.keys is not None and snapshot.values is not None:
            spare = self._held + self._room - snapshot.keys.shape[2]
            self._rows.replace(snapshot.keys, snapshot.values, spare)

    @property
    def _num_visible(self) -> int:
        """Past rows that the next token sees: itself is the last of its window."""
        return min(self.offset, self.window - 1)

    @property
    def _held(self) -> int:
        """Rows kept when the buffer is compacted: what the window needs after forgetting `slack` tokens."""
        return self.window - 1 + self.slack

    @property
    def _room(self) -> int:
        """Spare rows behind those."""
        return max(SLIDING_ROOM, self.slack)

    def _update_long(self, keys: mx.array, values: mx.array, visible: int) -> tuple[mx.array, mx.array]:
        """A chunk longer than the spare room: attend over a temporary, keep its tail."""
        kept_keys, kept_values = self._rows.read(max(self._rows.end - self._held, 0))
        all_keys = mx.concatenate([kept_keys, keys], axis=2)
        all_values = mx.concatenate([kept_values, values], axis=2)
        total = all_keys.shape[2]
        tail = max(total - self._held, 0)
        spare = self._held + self._room - (total - tail)
        self._rows.replace(all_keys[:, :, tail:], all_values[:, :, tail:], spare)
        self.offset += keys.shape[2]
        first = total - keys.shape[2] - visible
        return all_keys[:, :, first:], all_values[:, :, first:]


LayerCache = KVCache | SlidingKVCache


def make_layer_cache(layer: LayerConfig, slack: int = DEFAULT_SLACK) -> LayerCache:
    """An empty cache of the layer's kind."""
    return KVCache() if layer.window is None else SlidingKVCache(layer.window, slack)


def window_mask(num_tokens: int, num_past: int, window: int | None) -> Mask:
    """Which of `num_past` + `num_tokens` keys the new tokens see: none of the future, `window` with
    themselves.

    None means everything, "causal" the lower-right triangle; an array is (num_tokens, keys), true where
    visible.
    """
    if num_tokens == 1 and (window is None or num_past < window):
        return None
    if window is None or num_past + num_tokens <= window:
        return "causal"
    distance = num_past + mx.arange(num_tokens)[:, None] - mx.arange(num_past + num_tokens)[None]
    return (distance >= 0) & (distance < window)


def compact(array: mx.array) -> mx.array:
    """A copy that keeps nothing else alive.

    `mx.contiguous` takes over a buffer that is up to 16 KB larger, as a slice of one head's rows has it: many
    times what a small array counts for.
    """
    if array.nbytes >= LARGE_BYTES:
        return mx.contiguous(array)
    return mx.slice_update(mx.zeros(array.shape, array.dtype), array, mx.array([0]), axes=(0,))


def _blank(like: mx.array, rows: int) -> mx.array:
    batch, heads, _, head_dim = like.shape
    return mx.zeros((batch, heads, rows, head_dim), dtype=like.dtype)


def _full_capacity(num_tokens: int) -> int:
    """Rows to allocate for a full layer that must hold `num_tokens`: an eighth more, in whole steps."""
    wanted = num_tokens + max(num_tokens // 8, 1)
    return -(-wanted // GROWTH_ROWS) * GROWTH_ROWS
