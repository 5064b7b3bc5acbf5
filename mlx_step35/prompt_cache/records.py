"""What a prompt can be resumed from: a snapshot of all layers, with the full-attention rows in shared blocks.

Rows of a full-attention layer never change once written, so snapshots of one path share them, in blocks of
equally many tokens. While the live cache still holds a block's rows the block is only lent: it has a key
and no arrays, and costs nothing until the live cache leaves its path. The rows after the last whole block
are each snapshot's own.

Here arrays are evaluated, and nowhere else in this package but for the disk: an unevaluated copy would keep
the live buffers from being written in place.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_step35.cache import KVCache, LayerSnapshot, ModelCache, SlidingKVCache, compact
from mlx_step35.model import Model
from mlx_step35.mtp_state import DraftSnapshot, DraftState
from mlx_step35.prompt_cache.index import TokenArray

# 12 MiB on the real model: large enough to copy and to file well, small beside the snapshots' own arrays.
BLOCK_TOKENS = 256

# Keys and values (1, heads, rows, head_dim) of one layer.
Rows = tuple[mx.array, mx.array]


@dataclass(slots=True, eq=False)
class Block:
    """The full-attention rows of tokens start..end-1; `layers` is None while they are lent.

    `key` stands for these tokens and all before them. `size` is what the arrays take once they are here.
    """

    key: bytes
    start: int
    end: int
    size: int
    layers: tuple[Rows, ...] | None = None
    references: int = 0

    @property
    def nbytes(self) -> int:
        return 0 if self.layers is None else self.size


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """Everything needed to continue after `tokens`; immutable but for the lending of its blocks.

    `tail` are the full layers' rows behind the last block, `sliding` the windows of the other layers, both in
    the order of the layers. `draft` is the MTP layers' state, None if they were not in use.
    """

    tokens: TokenArray
    blocks: tuple[Block, ...]
    tail: tuple[Rows, ...]
    sliding: tuple[LayerSnapshot, ...]
    draft: DraftSnapshot | None

    @property
    def position(self) -> int:
        return len(self.tokens)

    @property
    def tail_start(self) -> int:
        return self.blocks[-1].end if self.blocks else 0

    @property
    def nbytes(self) -> int:
        """Bytes of its own, without the shared blocks."""
        own = sum(layer.nbytes for layer in self.sliding) + (self.draft.nbytes if self.draft else 0)
        return own + rows_bytes(self.tail)


def block_key(parent: bytes, tokens: TokenArray) -> bytes:
    """The key of the block with these tokens behind the block `parent` (empty for the first one)."""
    return hashlib.blake2b(parent + tokens.tobytes(), digest_size=20).digest()


def rows_bytes(layers: Sequence[Rows]) -> int:
    return sum(keys.nbytes + values.nbytes for keys, values in layers)


def full_layers(cache: ModelCache) -> list[KVCache]:
    return [layer for layer in cache if isinstance(layer, KVCache)]


def sliding_layers(cache: ModelCache) -> list[SlidingKVCache]:
    return [layer for layer in cache if isinstance(layer, SlidingKVCache)]


def row_bytes(cache: ModelCache) -> int:
    """Bytes of one token in the full-attention layers of a cache that is not empty."""
    return rows_bytes([layer.read(0, 1) for layer in full_layers(cache)])


def take(cache: ModelCache, tokens: TokenArray, blocks: Sequence[Block]) -> Snapshot:
    """The cache's present state, which covers exactly `tokens`; `blocks` are all whole ones in them."""
    assert cache.offset == len(tokens)
    start = blocks[-1].end if blocks else 0
    tail = tuple(layer.read(start, len(tokens)) for layer in full_layers(cache))
    sliding = tuple(layer.snapshot() for layer in sliding_layers(cache))
    snapshot = Snapshot(tokens, tuple(blocks), tail, sliding, _draft_snapshot(cache))
    evaluate(snapshot)
    return snapshot


def cut(cache: ModelCache, blocks: Sequence[Block]) -> list[tuple[Rows, ...]]:
    """Copies of the rows that the cache lends to these blocks."""
    copies = [tuple(layer.read(block.start, block.end) for layer in full_layers(cache)) for block in blocks]
    mx.eval(copies)
    return copies


def restore(model: Model, cache: ModelCache, snapshot: Snapshot, kept: int) -> None:
    """Bring the cache to a snapshot's state; its first `kept` rows are already the snapshot's.

    `kept` is the start of a block or the snapshot's end; the blocks after it must be here, not lent.
    """
    blocks = [block.layers for block in snapshot.blocks if block.start >= kept]
    pieces = [layers for layers in blocks if layers is not None]
    assert len(pieces) == len(blocks)
    if snapshot.tail_start < snapshot.position:
        pieces.append(snapshot.tail)
    for index, layer in enumerate(full_layers(cache)):
        layer.rollback(layer.offset - kept)
        if kept < snapshot.position:
            layer.update(
                mx.concatenate([piece[index][0] for piece in pieces], axis=2),
                mx.concatenate([piece[index][1] for piece in pieces], axis=2),
            )
    for sliding, state in zip(sliding_layers(cache), snapshot.sliding, strict=True):
        sliding.restore(state)
    cache.tokens = snapshot.tokens.tolist()
    cache.pending = []
    cache.mtp = None
    if snapshot.draft is not None and model.mtp is not None:
        cache.mtp = DraftState.from_snapshot(model.mtp, model.embed, snapshot.draft)
    mx.eval(cache.state)


def shrunk(model: Model, cache: ModelCache, kept: int) -> ModelCache:
    """A new cache whose full-attention layers hold the first `kept` rows; `restore` fills in the rest."""
    smaller = model.make_cache(cache.slack)
    if kept:
        for old, new in zip(full_layers(cache), full_layers(smaller), strict=True):
            new.update(*old.read(0, kept))
        mx.eval(smaller.state)
    return smaller


def evaluate(snapshot: Snapshot) -> None:
    """Compute a snapshot's arrays, so that they hold nothing else alive."""
    arrays: list[Any] = [snapshot.tail, [(layer.keys, layer.values) for layer in snapshot.sliding]]
    if snapshot.draft is not None:
        arrays.append(snapshot.draft.hidden)
    mx.eval(arrays)


def _draft_snapshot(cache: ModelCache) -> DraftSnapshot | None:
    # A state that stands elsewhere was not used for these tokens.
    if cache.mtp is None or cache.mtp.end != cache.offset:
        return None
    draft: DraftSnapshot = cache.mtp.snapshot()
    # Rows are views of the pass they came from.
    return DraftSnapshot(draft.first, None if draft.hidden is None else compact(draft.hidden))
