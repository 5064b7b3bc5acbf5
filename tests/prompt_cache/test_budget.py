"""Limits hold in measured bytes, and nothing is kept that nobody counts."""

import gc
import random

import mlx.core as mx
import pytest

from mlx_step35.checkpoint import load_checkpoint, resolve_model
from mlx_step35.engine.session import Session
from mlx_step35.guard import Headroom, planner_of
from mlx_step35.model import Model
from mlx_step35.prompt_cache.budget import default_limit
from mlx_step35.prompt_cache.store import PromptCacheStore
from tests.prompt_cache.conversations import Conversation, assert_same, run, run_cold
from tests.prompt_cache.test_session import assert_consistent, make_session, serve_random_requests

GIB = 1 << 30


def stored_bytes(store: PromptCacheStore) -> int:
    """Bytes of all arrays that the store can reach, each counted once."""
    arrays: dict[int, mx.array] = {}
    for _, _, entry in store._index.items():
        if entry.snapshot is None:
            continue
        rows = [*entry.snapshot.tail]
        for block in entry.snapshot.blocks:
            rows += block.layers or ()
        found = [array for pair in rows for array in pair]
        for layer in entry.snapshot.sliding:
            found += [array for array in (layer.keys, layer.values) if array is not None]
        if entry.snapshot.draft is not None and entry.snapshot.draft.hidden is not None:
            found.append(entry.snapshot.draft.hidden)
        arrays |= {id(array): array for array in found}
    return sum(array.nbytes for array in arrays.values())


def test_many_prompts_under_a_small_limit(tiny_model: Model) -> None:
    """200 distinct prompts: the limit holds at every step, in the store's books and in the arrays."""
    limit = 300_000
    session = make_session(tiny_model, limit)
    rng = random.Random(0)
    system = [rng.randint(8, 30) for _ in range(40)]
    for number in range(200):
        prompt = [*system, number % 20 + 8, *(rng.randint(8, 30) for _ in range(rng.randint(1, 60)))]
        run(session, tiny_model, prompt, [40], max_tokens=1, mtp="off")
        assert stored_bytes(session.store) == session.store.nbytes <= limit
    assert session.store.num_evicted > 100
    assert_consistent(session)
    # What all of them share is still there.
    assert session.sync([*system, 7, 7, 7]).cached_tokens == 40


def test_the_books_say_what_is_allocated(tiny_model: Model) -> None:
    """Short prompts with draft rows: the buffers behind the arrays are no larger than these."""
    session = make_session(tiny_model)
    rng = random.Random(0)
    run(session, tiny_model, [8] * 20, [], max_tokens=2, mtp=1)
    session.reset()
    session.store.clear()
    gc.collect()
    before = mx.get_active_memory()
    for _ in range(30):
        run(session, tiny_model, [rng.randint(8, 30) for _ in range(14)], [], max_tokens=2, mtp=1)
    session.reset()
    gc.collect()
    assert len(session.store) >= 30
    assert abs(mx.get_active_memory() - before - session.store.nbytes) < 0.02 * session.store.nbytes


def memory_after(session: Session, model: Model, num_requests: int, seed: int) -> int:
    """Active bytes beside what the store and the live cache hold, after so many requests."""
    rng = random.Random(seed)
    conversation = Conversation(rng, [rng.randint(8, 30) for _ in range(30)])
    for number in range(num_requests):
        if number % 10 == 9:
            conversation = Conversation(rng, conversation.system)
        conversation.edit()
        prompt, boundaries = conversation.prompt()
        warm = run(session, model, prompt[:400], boundaries, max_tokens=2)
        conversation.answer(warm.tokens)
    gc.collect()
    mx.clear_cache()
    live = session.cache.nbytes + (session.cache.mtp.nbytes if session.cache.mtp else 0)
    return mx.get_active_memory() - session.store.nbytes - live


def check_leaks(model: Model, num_requests: int) -> None:
    session = make_session(model, 400_000)
    before = memory_after(session, model, num_requests // 10, seed=1)
    after = memory_after(session, model, num_requests, seed=2)
    # Small arrays share buffers that are larger than they are.
    assert after - before < 300_000


def test_no_leak(tiny_model: Model) -> None:
    check_leaks(tiny_model, 50)


@pytest.mark.exhaustive
def test_no_leak_over_500_requests(tiny_model: Model) -> None:
    check_leaks(tiny_model, 500)


def test_without_room_nothing_is_kept(tiny_model: Model) -> None:
    session = Session(tiny_model, PromptCacheStore(0))
    prompt = [*range(8, 30)] * 3
    for _ in range(3):
        warm = run(session, tiny_model, prompt)
        assert warm.reuse.cached_tokens == 0
        assert_same(warm, run_cold(tiny_model, prompt))
    assert len(session.store) == 0


def test_extending_a_conversation_copies_no_rows(tiny_model: Model) -> None:
    """The live cache keeps lending its rows; they are copied out only when a prompt leaves its path."""
    session = make_session(tiny_model)
    prompt = [random.Random(5).randint(8, 30) for _ in range(150)]
    first = run(session, tiny_model, prompt)
    run(session, tiny_model, [*prompt, *first.tokens, *prompt[:20]])
    assert all(block.layers is None for block in session.store._blocks.values())
    assert len(session.store._blocks) == 180 // 16
    # A branch in the middle: only what lies behind it is copied.
    run(session, tiny_model, [*prompt[:100], 7, 7, 7], [100])
    copied = [block.start for block in session.store._blocks.values() if block.layers is not None]
    assert copied and min(copied) >= 96 - 16


def test_the_default_limit_comes_from_the_memory_plan(tiny_model: Model) -> None:
    planner = planner_of(tiny_model.config, [])
    longest = planner.growth_bytes(0, 4096, 2048)
    plenty = Headroom(limit=8 * GIB, in_use=0, free=100 * GIB)
    assert default_limit(planner, 4096, plenty) == 4 * GIB
    tight = Headroom(limit=longest + (longest >> 2), in_use=0, free=100 * GIB)
    assert default_limit(planner, 4096, tight) == tight.available // 4
    assert default_limit(planner, 4096, Headroom(GIB, 2 * GIB, GIB)) == 0


@pytest.fixture(scope="module")
def nano() -> Model:
    return load_checkpoint(resolve_model("nano"), "float32")


def test_cached_equals_cold_on_nano(nano: Model) -> None:
    assert serve_random_requests(nano, 7, 8) > 0


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(20))
def test_cached_equals_cold_on_nano_often(nano: Model, seed: int) -> None:
    serve_random_requests(nano, seed, 40, limit=random.Random(seed).choice([10**9, 10**7, 3 * 10**6]))
