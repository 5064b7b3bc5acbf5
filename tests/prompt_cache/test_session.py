"""A session over random conversations answers as a cold run does, and recomputes only what it must."""

import random
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_step35 import depth, guard
from mlx_step35.chat.tokenizer import Tokenizer
from mlx_step35.checkpoint import resolve_model
from mlx_step35.engine.request import Candidate
from mlx_step35.engine.runner import Runner
from mlx_step35.engine.session import Session
from mlx_step35.model import Model
from mlx_step35.mtp_state import DraftState
from mlx_step35.prompt_cache.store import PromptCacheStore
from mlx_step35.sampling import SamplingParams
from tests.drafters import assert_fresh
from tests.prompt_cache.conversations import Conversation, assert_same, run, run_cold

PLENTY = 10**9


def make_session(model: Model, limit: int = PLENTY) -> Session:
    return Session(model, PromptCacheStore(limit), interval=50, block_tokens=16)


def assert_consistent(session: Session) -> None:
    """Lent blocks are the live cache's own, everything else has arrays, and the sums are right."""
    store, live = session.store, {id(block) for block in session._blocks}
    own = 0
    referenced = set()
    for position, _, entry in store._index.items():
        assert entry.snapshot is not None and entry.snapshot.position == position
        own += entry.snapshot.nbytes
        referenced |= {id(block) for block in entry.snapshot.blocks}
        assert all((block.layers is None) == (id(block) in live) for block in entry.snapshot.blocks)
    assert {id(block) for block in store._blocks.values()} == referenced
    assert store.nbytes == own + sum(block.nbytes for block in store._blocks.values())
    assert store.nbytes <= store.limit_bytes


def serve_random_requests(model: Model, seed: int, num_requests: int, limit: int = PLENTY) -> int:
    """Interleave and edit conversations; returns how many tokens were reused."""
    rng = random.Random(seed)
    session = make_session(model, limit)
    system = [rng.randint(8, 30) for _ in range(rng.randint(1, 70))]
    conversations = [Conversation(rng, system)]
    saved: set[tuple[int, ...]] = set()
    reused = 0
    for _ in range(num_requests):
        if rng.random() < 0.2:
            conversations.append(rng.choice(conversations).branch())
        conversation = rng.choice(conversations)
        conversation.edit()
        prompt, boundaries = conversation.prompt()
        usable = [len(key) for key in saved if tuple(prompt[: len(key)]) == key and len(key) < len(prompt)]
        mtp = rng.choice(["auto", "off", 1, 3])
        max_tokens = rng.randint(2, 12)
        close_after = rng.choice([None, None, 1, 3])
        cold = run_cold(model, prompt, max_tokens)
        warm = run(session, model, prompt, boundaries, max_tokens, mtp, close_after)
        if close_after is not None:
            cold.tokens, cold.logprobs = cold.tokens[:close_after], cold.logprobs[:close_after]
        assert_same(warm, cold)
        if limit == PLENTY:
            assert warm.reuse.cached_tokens >= max(usable, default=0)
        assert_consistent(session)
        reused += warm.reuse.cached_tokens
        saved |= {tuple(prompt[:stop]) for stop in warm.stops}
        saved |= {tuple(session.cache.tokens)}
        conversation.answer(warm.tokens)
    return reused


@pytest.mark.parametrize("seed", range(8))
def test_cached_equals_cold(tiny_model: Model, seed: int) -> None:
    assert serve_random_requests(tiny_model, seed, 12) > 0


@pytest.mark.parametrize("seed", range(4))
def test_cached_equals_cold_under_a_small_limit(tiny_model: Model, seed: int) -> None:
    serve_random_requests(tiny_model, 100 + seed, 12, limit=random.Random(seed).randrange(20_000, 400_000))


def test_every_snapshot_drafts_as_a_cold_run_does(tiny_model: Model) -> None:
    """Drafts after a hit use the restored state: those of all three layers equal a fresh run's."""
    rng = random.Random(3)
    prompt = [rng.randint(8, 30) for _ in range(200)]
    boundaries = [20, 90, 150]
    session = make_session(tiny_model)
    run(session, tiny_model, prompt, boundaries, mtp=3)
    for length in (*boundaries, 199):
        other = [*prompt[:length], 7]
        assert session.sync(other).cached_tokens == length
        cold = make_session(tiny_model)
        run(cold, tiny_model, other, mtp=3, max_tokens=1)
        assert cold.sync([*other, 7]).cached_tokens == length + 1
        cold.cache.mtp.rollback(1)
        assert_same_drafts(session.cache.mtp, cold.cache.mtp, other)


@pytest.mark.parametrize("seed", range(4))
def test_going_back_a_few_tokens(tiny_model: Model, seed: int) -> None:
    """As an editor's backspace does; the session then forgets rows of its live cache."""
    rng = random.Random(seed)
    session = make_session(tiny_model)
    prompt = [rng.randint(8, 30) for _ in range(rng.randint(60, 120))]
    num_compared = 0
    for _ in range(6):
        max_tokens = rng.choice([1, 2, 4, 8])
        warm = run(session, tiny_model, prompt, (), max_tokens, rng.choice(["auto", 1, 2, 3]))
        assert_same(warm, run_cold(tiny_model, prompt, max_tokens))
        prompt = [*prompt[: -rng.randint(1, 3)], rng.randint(8, 30)]
        reuse = session.sync(prompt)
        if session.cache.mtp is not None and reuse.cached_tokens == len(prompt) - 1:
            assert_fresh(tiny_model, session.cache.mtp, prompt)
            num_compared += 1
    assert num_compared >= 3


def test_the_newest_token_is_not_taken_for_granted(nano: Model) -> None:
    """An answer that ends among accepted drafts has MTP rows of its last token, which may not come back."""
    prompt = Tokenizer.from_directory(resolve_model("nano")).encode(Path(depth.__file__).read_text()[:600])
    for length in range(2, 9):
        session = make_session(nano)
        answer = run(session, nano, prompt, (), 60, 3, close_after=length).tokens
        other = [*prompt, *answer[:-1], (answer[-1] + 7) % 300, 11]
        assert session.sync(other).cached_tokens == len(other) - 2
        assert_fresh(nano, session.cache.mtp, other[:-1])


def assert_same_drafts(ours: DraftState, theirs: DraftState, tokens: list[int]) -> None:
    logits: list[list[mx.array]] = [[], []]
    for state, found in zip((ours, theirs), logits, strict=True):

        def choose(row: mx.array, drafts: object, found: list[mx.array] = found) -> tuple[mx.array, None]:
            found.append(row)
            return mx.array([len(found) + 8], dtype=mx.uint32), None

        state.propose(3, tokens, choose)
    for mine, other in zip(*logits, strict=True):
        assert mx.abs(mine - other).max().item() < 1e-4


def test_saved_prompts_make_room_for_a_whole_answer(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(11)
    session = make_session(tiny_model)
    for length in (300, 350, 400):
        run(session, tiny_model, [rng.randint(8, 30) for _ in range(length)])
    arrays: Any = tree_flatten(tiny_model.parameters())
    needed = guard.planner_of(tiny_model.config, arrays).growth_bytes(0, 40 + 900, 1)
    saved = session.store.nbytes
    assert saved > 0
    monkeypatch.setattr(
        guard, "headroom", lambda: guard.Headroom(10**12, 0, needed + saved // 3 - session.store.nbytes)
    )
    prompt = [rng.randint(8, 30) for _ in range(40)]
    answer = Candidate(prompt, cast(Any, None), SamplingParams(), max_tokens=900)
    started = Runner(tiny_model, session).start(answer, "off", False, lambda done, total: None)
    assert len(list(started.tokens)) == 900
    # Only as many were given up as it took.
    assert session.store.num_evicted > 0 and len(session.store) > 0
