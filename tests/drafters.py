"""Drafters for tests: they know what greedy decoding will say and spoil it as often as they are told to."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from mlx_step35.cache import ModelCache
from mlx_step35.decoding import DecodeOptions, DecodeStats, decode
from mlx_step35.model import Model
from mlx_step35.mtp_state import DraftState
from mlx_step35.sampling import CustomSampling, Proposal, SamplingParams

GREEDY = SamplingParams()


class KnowingDrafter:
    """Proposes what follows in `tokens`, the whole text; each draft is wrong with probability `error`."""

    max_depth = 3
    num_kept_rows = 1

    def __init__(self, tokens: Sequence[int], vocab_size: int, error: float, seed: int = 0) -> None:
        self._tokens = list(tokens)
        self._vocab_size = vocab_size
        self._error = error
        self._random = random.Random(seed)
        self.end = 0
        # Lengths of the text at which a draft was wrong.
        self.errors: list[int] = []

    def extend(self, hidden: mx.array, at: int) -> None:
        self.end = at + hidden.shape[1]

    def rows_behind(self, depth: int) -> int:
        return 0

    def propose(self, depth: int, tokens: Sequence[int], choose: Callable[..., Any]) -> Proposal:
        assert len(tokens) == self.end + 1
        drafts = []
        for position in range(len(tokens), len(tokens) + depth):
            draft = self._tokens[position] if position < len(self._tokens) else 0
            if self._random.random() < self._error:
                draft = (draft + 1 + self._random.randrange(self._vocab_size - 1)) % self._vocab_size
                self.errors.append(position)
            drafts.append(draft)
        return Proposal(mx.array(drafts, dtype=mx.uint32), None)

    def settle(self, num_right: int) -> None:
        pass


def run(
    model: Model,
    prompt: Sequence[int],
    num_tokens: int,
    sampling: SamplingParams | CustomSampling = GREEDY,
    *,
    cache: ModelCache | None = None,
    stats: DecodeStats | None = None,
    drafter: Any = None,
    constraint: Any = None,
    mtp: Any = "off",
    lookup: bool = False,
    **options: Any,
) -> list[int]:
    """Decode to the end and check that the cache ends where the text does."""
    cache = model.make_cache() if cache is None else cache
    before = [*cache.tokens, *cache.pending]
    decoded = decode(
        model,
        prompt,
        cache,
        sampling,
        DecodeOptions(num_tokens, mtp, lookup, **options),
        stats=stats,
        drafter=drafter,
        constraint=constraint,
    )
    tokens = [item.token for item in decoded]
    check_cache(cache, [*before, *prompt, *tokens])
    return tokens


def check_cache(cache: ModelCache, tokens: Sequence[int]) -> None:
    """Every layer and the draft state cover all tokens but the newest, which is pending."""
    assert [*cache.tokens, *cache.pending] == list(tokens)
    assert len(cache.pending) == 1
    assert {layer.offset for layer in cache} == {len(tokens) - 1}
    if isinstance(cache.mtp, DraftState):
        assert cache.mtp.end == len(tokens) - 1


def prompt_of(length: int, vocab_size: int, seed: int = 0) -> list[int]:
    generator = random.Random(f"{seed} {length}")
    return [generator.randrange(vocab_size) for _ in range(length)]


def teacher_forced(model: Model, tokens: list[int], drafts: list[int]) -> list[mx.array]:
    """Draft logits (V,), one per draft, of a run without caches over `tokens`, the pending one included."""
    known, rows = [*tokens, *drafts], len(tokens) - 1
    hidden, logits = model.hidden(mx.array([tokens[:-1]])), []
    for k in range(len(drafts)):
        ids = mx.array([known[1 + k : 1 + k + rows]])
        hidden = model.mtp.step(k, model.embed(ids), hidden, None)
        logits.append(model.mtp.logits(k, hidden[:, -1:])[0, 0])
    return logits


def assert_fresh(model: Model, state: DraftState, tokens: list[int], depth: int = 3) -> list[int]:
    """Draft, and compare the logits with those of a fresh run over the same tokens; returns the drafts."""
    seen: list[mx.array] = []

    def choose(logits: mx.array, _: Any) -> tuple[mx.array, None]:
        seen.append(logits[0])
        return mx.argmax(logits, axis=-1), None

    drafts: list[int] = state.propose(depth, tokens, choose).tokens.tolist()
    for logits, expected in zip(seen, teacher_forced(model, tokens, drafts), strict=True):
        assert mx.abs(logits - expected).max().item() < 1e-4
    return drafts
