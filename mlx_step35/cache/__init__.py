"""Keys and values of past tokens: one cache per layer, and the bundle of them that a model call takes.

Positions, masks and write places come from here; nothing outside this package does arithmetic on offsets.
`layers` holds the caches of single layers, `steps` runs compiled calls on them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import mlx.core as mx

from mlx_step35.cache.layers import (
    DEFAULT_SLACK,
    KVCache,
    LayerCache,
    LayerSnapshot,
    Mask,
    SlidingKVCache,
    compact,
    make_layer_cache,
    window_mask,
)
from mlx_step35.cache.steps import MAX_STEP_TOKENS, AttentionCache, CompiledStep
from mlx_step35.config import LayerConfig
from mlx_step35.errors import CacheRollbackError

__all__ = [
    "DEFAULT_SLACK",
    "MAX_STEP_TOKENS",
    "AttentionCache",
    "CompiledStep",
    "KVCache",
    "LayerCache",
    "LayerSnapshot",
    "Mask",
    "ModelCache",
    "ModelSnapshot",
    "SlidingKVCache",
    "compact",
    "make_layer_cache",
    "window_mask",
]


@dataclass(frozen=True, slots=True)
class ModelSnapshot:
    """Every layer's rows at one moment; restoring it brings back exactly that state."""

    layers: tuple[LayerSnapshot, ...]

    @property
    def offset(self) -> int:
        return self.layers[0].offset if self.layers else 0

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)


class ModelCache(Sequence[LayerCache]):
    """The caches of all backbone layers; also usable as the `prompt_cache` of mlx-lm's loops.

    `tokens` are the ids covered so far, `pending` the accepted ids that have not been run through the
    backbone (after a finished generation: the newest one), `mtp` the draft state that belongs to the same
    tokens. The decode loop keeps all three; a plain model call only advances the layers.
    """

    def __init__(self, layers: Sequence[LayerConfig], slack: int = DEFAULT_SLACK) -> None:
        self._layers: list[LayerCache] = [make_layer_cache(layer, slack) for layer in layers]
        self.slack = slack
        self.pending: list[int] = []
        self.tokens: list[int] = []
        self.mtp: Any = None

    @property
    def offset(self) -> int:
        """Tokens seen by every layer."""
        return self._layers[0].offset

    @property
    def nbytes(self) -> int:
        """Allocated bytes of all layers, spare room included; the draft state is not counted."""
        return sum(layer.nbytes for layer in self._layers)

    @property
    def state(self) -> list[list[mx.array]]:
        """The arrays to evaluate after a model call, per layer."""
        return [layer.state for layer in self._layers]

    @state.setter
    def state(self, arrays: Sequence[Sequence[mx.array]]) -> None:
        for layer, layer_arrays in zip(self._layers, arrays, strict=True):
            layer.state = list(layer_arrays)

    def can_rollback(self, num_tokens: int) -> bool:
        return all(layer.can_rollback(num_tokens) for layer in self._layers)

    def rollback(self, num_tokens: int) -> None:
        """Forget the newest tokens everywhere, or raise CacheRollbackError and change nothing.

        A pending token that followed them is forgotten too.
        """
        if not self.can_rollback(num_tokens):
            raise CacheRollbackError(
                f"cannot forget {num_tokens} of {self.offset} tokens: sliding layers keep {self.slack}"
            )
        for layer in self._layers:
            layer.rollback(num_tokens)
        if len(self.tokens) > self.offset:
            del self.tokens[self.offset :]
            self.pending = []
        if self.mtp is not None and self.mtp.end > self.offset:
            self.mtp.rollback(self.mtp.end - self.offset)

    def snapshot(self) -> ModelSnapshot:
        """The present rows of all layers; later updates do not touch them."""
        return ModelSnapshot(tuple(layer.snapshot() for layer in self._layers))

    def restore(self, snapshot: ModelSnapshot) -> None:
        """Go to the state of a snapshot; `tokens`, `pending` and `mtp` are the caller's to set."""
        for layer, layer_snapshot in zip(self._layers, snapshot.layers, strict=True):
            layer.restore(layer_snapshot)

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Iterator[LayerCache]:
        return iter(self._layers)

    @overload
    def __getitem__(self, index: int) -> LayerCache: ...
    @overload
    def __getitem__(self, index: slice) -> list[LayerCache]: ...
    def __getitem__(self, index: int | slice) -> LayerCache | list[LayerCache]:
        return self._layers[index]
