"""The store's accounting and eviction, on arrays of made-up sizes."""

import mlx.core as mx
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_step35.cache import LayerSnapshot
from mlx_step35.prompt_cache.index import TokenArray, as_tokens
from mlx_step35.prompt_cache.records import BLOCK_TOKENS, Block, Rows, Snapshot, block_key
from mlx_step35.prompt_cache.store import PromptCacheStore

BLOCK_BYTES = 2 * 4 * BLOCK_TOKENS
SLIDING_BYTES = 4_000


def rows(num_rows: int) -> Rows:
    """One float32 number per row for keys and one for values."""
    return mx.zeros((1, 1, num_rows, 1)), mx.zeros((1, 1, num_rows, 1))


def blocks_of(store: PromptCacheStore, tokens: TokenArray, lent: bool = False) -> list[Block]:
    """All whole blocks of these tokens, those that the store has already and new ones."""
    blocks, key = [], b""
    for start in range(0, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        key = block_key(key, tokens[start : start + BLOCK_TOKENS])
        layers = None if lent else (rows(BLOCK_TOKENS),)
        blocks.append(store.block(key) or Block(key, start, start + BLOCK_TOKENS, BLOCK_BYTES, layers))
    return blocks


def snapshot_of(store: PromptCacheStore, tokens: TokenArray, lent: bool = False) -> Snapshot:
    blocks = blocks_of(store, tokens, lent)
    keys, values = mx.zeros((SLIDING_BYTES // 8,)), mx.zeros((SLIDING_BYTES // 8,))
    sliding = (LayerSnapshot(len(tokens), keys, values),)
    tail = (rows(len(tokens) % BLOCK_TOKENS),)
    return Snapshot(tokens, tuple(blocks), tail, sliding, None)


def conversation(seed: int, length: int) -> TokenArray:
    """The same first 600 tokens for all, then tokens that depend on the seed."""
    rng = np.random.default_rng(seed)
    common = np.random.default_rng(0).integers(0, 2_000, 600)
    return as_tokens(np.concatenate([common, rng.integers(0, 2_000, 5_000)])[:length])


def measured_bytes(store: PromptCacheStore) -> int:
    """Bytes of all arrays reachable from the store, each counted once."""
    arrays: dict[int, mx.array] = {}
    for _, _, entry in store._index.items():
        if entry.snapshot is None:
            continue
        layers = [*entry.snapshot.tail]
        for block in entry.snapshot.blocks:
            layers += block.layers or ()
        found = [array for layer in layers for array in layer]
        for layer in entry.snapshot.sliding:
            found += [array for array in (layer.keys, layer.values) if array is not None]
        arrays |= {id(array): array for array in found}
    return sum(array.nbytes for array in arrays.values())


EDITS = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 2_000), st.booleans()), max_size=25)


@settings(max_examples=60, deadline=None)
@given(EDITS, st.integers(0, 60_000))
def test_bytes_are_true_and_never_above_the_limit(edits: list[tuple[int, int, bool]], limit: int) -> None:
    store = PromptCacheStore(limit)
    for seed, length, use in edits:
        tokens = conversation(seed, length)
        if use:
            store.find(tokens, length)
        snapshot = snapshot_of(store, tokens)
        kept = store.add(snapshot)
        alone = snapshot.nbytes + len(snapshot.blocks) * BLOCK_BYTES
        assert kept == (alone <= limit)
        assert store.nbytes == measured_bytes(store) <= limit
        if kept:
            assert store.find(tokens, length).position == length
    store.clear()
    assert store.nbytes == 0 == len(store)
    assert not store._blocks


def test_branches_share_their_blocks() -> None:
    store = PromptCacheStore(10**9)
    for seed in range(1, 11):
        assert store.add(snapshot_of(store, conversation(seed, 600 + 40)))
    own = 10 * (SLIDING_BYTES + 2 * 4 * (640 % BLOCK_TOKENS))
    assert store.nbytes == own + 2 * BLOCK_BYTES


def test_a_snapshot_above_the_limit_is_not_stored() -> None:
    store = PromptCacheStore(SLIDING_BYTES + 2 * BLOCK_BYTES)
    small = conversation(1, 100)
    assert store.add(snapshot_of(store, small))
    assert not store.add(snapshot_of(store, conversation(2, 3 * BLOCK_TOKENS)))
    assert store.find(small, 100).position == 100


def test_what_is_dear_to_recompute_stays_longer() -> None:
    limit = 3 * (SLIDING_BYTES + 2 * 4 * BLOCK_TOKENS) + 3 * BLOCK_BYTES
    store = PromptCacheStore(limit)
    system = conversation(1, 600)
    store.add(snapshot_of(store, system))
    for seed in range(2, 12):
        # Short prompts of their own: as new as anything, and cheap to run again.
        prompt = as_tokens(np.random.default_rng(seed).integers(0, 2_000, 50))
        store.find(prompt, 50)
        store.add(snapshot_of(store, prompt))
    assert store.num_evicted
    assert store.find(system, 600).position == 600


def test_what_was_not_used_for_long_goes() -> None:
    store = PromptCacheStore(4 * (SLIDING_BYTES + 2 * 4 * 100))
    prompts = [as_tokens(np.random.default_rng(seed).integers(0, 2_000, 100)) for seed in range(6)]
    for prompt in prompts:
        store.find(prompts[0], 100)
        store.find(prompt, 100)
        store.add(snapshot_of(store, prompt))
    kept = [store.touch(prompt) for prompt in prompts]
    assert kept == [True, False, False, True, True, True]


def test_lent_blocks_count_when_they_are_copied() -> None:
    store = PromptCacheStore(2 * SLIDING_BYTES + 3 * BLOCK_BYTES)
    long = conversation(1, 4 * BLOCK_TOKENS)
    assert store.add(snapshot_of(store, long[: 2 * BLOCK_TOKENS], lent=True))
    assert store.add(snapshot_of(store, long, lent=True))
    assert store.nbytes == 2 * SLIDING_BYTES
    blocks = blocks_of(store, long)
    # Four blocks do not fit: the longer snapshot goes, and with it the need for two of them.
    wanted = store.claim(blocks, keep=())
    assert wanted == blocks[:2]
    for block in wanted:
        store.fill(block, (rows(BLOCK_TOKENS),))
    assert store.nbytes == SLIDING_BYTES + 2 * BLOCK_BYTES
    assert store.find(long, len(long)).position == 2 * BLOCK_TOKENS


def test_a_lost_live_cache_takes_what_it_lent() -> None:
    store = PromptCacheStore(10**9)
    kept = conversation(1, 300)
    store.add(snapshot_of(store, kept))
    store.add(snapshot_of(store, conversation(2, 900), lent=True))
    store.drop_lent()
    assert len(store) == 1
    assert store.find(kept, 300).position == 300


def test_shrinking_for_a_while() -> None:
    store = PromptCacheStore(10**9)
    for seed in range(1, 9):
        store.add(snapshot_of(store, conversation(seed, 700)))
    before = store.nbytes
    store.shrink(before // 2)
    assert 0 < store.nbytes <= before // 2
    assert store.add(snapshot_of(store, conversation(9, 700)))
    store.shrink(0)
    assert store.nbytes == 0 == len(store)


def test_a_saved_boundary_outlives_its_snapshot() -> None:
    store = PromptCacheStore(SLIDING_BYTES + 2 * 4 * 100)
    first, second = conversation(1, 100), as_tokens(range(100))
    store.add(snapshot_of(store, first))
    store.add_saved(first, "name")
    store.add(snapshot_of(store, second))
    entry = store.find(first, 100).value
    assert entry is not None and entry.snapshot is None and entry.saved == "name"
    store.forget_saved(first)
    assert store.find(first, 100).value is None
