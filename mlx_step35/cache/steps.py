"""Calls of few tokens as compiled functions: the same graph every time, so its small operations fuse.

Everything that changes from call to call has to be an array then: the position, the place where rows are
written, and the mask, which covers the whole buffer because its filled part has no fixed size.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import mlx.core as mx

from mlx_step35.cache.layers import DEFAULT_SLACK, LayerCache, Mask

# Beyond the widest verify a call is prefill, which comes in any length and gains nothing.
MAX_STEP_TOKENS = DEFAULT_SLACK


class AttentionCache(Protocol):
    """What attention needs of a cache."""

    @property
    def offset(self) -> int | mx.array: ...

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]: ...


class StepCache:
    """One layer's buffers inside a compiled step."""

    def __init__(self, keys: mx.array, values: mx.array, offset: mx.array, place: mx.array) -> None:
        self.keys = keys
        self.values = values
        self.offset = offset
        self._place = place

    def update(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write the rows in place; returns the whole buffers, for a mask that knows which rows count."""
        self.keys = mx.slice_update(self.keys, keys, self._place, axes=(2,))
        self.values = mx.slice_update(self.values, values, self._place, axes=(2,))
        return self.keys, self.values


Forward = Callable[[Sequence[mx.array], Sequence[Mask], Sequence[AttentionCache]], mx.array]


class CompiledStep:
    """A forward function over some layers, compiled once per number of tokens and buffer size.

    `windows` are the layers'. The weights the function uses become constants of the compiled graph: they must
    have been evaluated before, or every call would load them again.
    """

    def __init__(self, forward: Forward, windows: Sequence[int | None]) -> None:
        self._forward = forward
        self._windows = list(windows)
        # Layers of one kind hold the same rows; one place and one mask serve them all.
        self._kinds = list(dict.fromkeys(windows))
        self._compiled = mx.compile(self._trace)

    def __call__(self, inputs: Sequence[mx.array], caches: Sequence[LayerCache]) -> mx.array | None:
        """Run on inputs (B, L, ...) and advance the caches; does nothing and gives None where it cannot."""
        num_tokens = inputs[0].shape[1]
        if num_tokens > MAX_STEP_TOKENS:
            return None
        places: dict[int | None, int] = {}
        for window, cache in zip(self._windows, caches, strict=True):
            place = cache.place(num_tokens)
            if place is None or places.setdefault(window, place) != place:
                return None
        arrays = [array for cache in caches for array in cache.state]
        output, arrays = self._compiled(
            list(inputs),
            mx.array(caches[0].offset),
            [mx.array([places[window]]) for window in self._kinds],
            arrays,
        )
        for index, cache in enumerate(caches):
            cache.commit(arrays[2 * index : 2 * index + 2], num_tokens)
        return output

    def _trace(
        self,
        inputs: list[mx.array],
        offset: mx.array,
        places: list[mx.array],
        arrays: list[mx.array],
    ) -> tuple[mx.array, list[mx.array]]:
        num_tokens = inputs[0].shape[1]
        masks: dict[int | None, mx.array] = {}
        caches = []
        for index, window in enumerate(self._windows):
            keys, values = arrays[2 * index : 2 * index + 2]
            place = places[self._kinds.index(window)]
            caches.append(StepCache(keys, values, offset, place))
            if window not in masks:
                masks[window] = _buffer_mask(num_tokens, keys.shape[2], place, window)
        output = self._forward(inputs, [masks[window] for window in self._windows], caches)
        return output, [array for cache in caches for array in (cache.keys, cache.values)]


def _buffer_mask(num_tokens: int, capacity: int, place: mx.array, window: int | None) -> mx.array:
    """Which buffer rows (num_tokens, capacity) the tokens written from `place` on see."""
    queries = place + mx.arange(num_tokens)[:, None]
    rows = mx.arange(capacity)[None]
    visible = rows <= queries
    return visible if window is None else visible & (rows > queries - window)
