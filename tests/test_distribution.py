"""Sampled speculation end to end: the tokens have the distribution that enumeration gives."""

import itertools
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_step35.checkpoint import load_checkpoint
from mlx_step35.decoding import DecodeOptions, decode, make_controller
from mlx_step35.model import Model
from mlx_step35.mtp_state import DraftState
from mlx_step35.sampling import Chooser, Proposal, SamplingParams, log_softmax
from tests.drafters import prompt_of
from tests.test_sampling import chi_square
from tests.tiny import WINDOW, tiny_config, tiny_weights, write_checkpoint


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Vocabulary 12, so that all continuations of three tokens can be counted; flat enough to reach them."""
    raw = tiny_config(vocab_size=12, eos_token_id=[1, 2])
    tensors = tiny_weights(raw, seed=2)
    for name in tensors:
        if name == "lm_head.weight" or name.endswith("shared_head.output.weight"):
            tensors[name] = tensors[name] * 0.4
    return load_checkpoint(write_checkpoint(tmp_path_factory.mktemp("small") / "model", raw, tensors))


def enumerated(model: Model, prompt: list[int], params: SamplingParams, num_tokens: int = 3) -> np.ndarray:
    """The exact probability of every continuation, an axis per token."""
    size = model.config.vocab_size
    chooser = Chooser(params)
    probabilities = np.ones([1])
    for length in range(num_tokens):
        rest = list(itertools.product(range(size), repeat=length))
        logits = model(mx.array([[*prompt, *tokens] for tokens in rest]))[:, -1]
        rows = [
            chooser.process(row[None], [*prompt, *tokens], mx.array([], dtype=mx.uint32))
            for row, tokens in zip(logits, rest, strict=True)
        ]
        following = np.exp(np.array(log_softmax(chooser.scaled(mx.concatenate(rows))), dtype=np.float64))
        probabilities = (probabilities[:, None] * following).reshape(-1)
    return probabilities.reshape([size] * num_tokens)


def sampled(model: Model, prompt: list[int], params: SamplingParams, count: int, mtp: Any) -> np.ndarray:
    """Counts of the first three tokens over `count` runs from one prefilled cache."""
    counts = np.zeros([model.config.vocab_size] * 3)
    cache = model.make_cache()
    hidden = model.hidden(mx.array([prompt[:-1]]), cache) if len(prompt) > 1 else None
    snapshot = cache.snapshot()
    mx.eval(cache.state)
    controller = make_controller(model)
    for number in range(count):
        mx.random.seed(number)
        cache.restore(snapshot)
        cache.tokens, cache.pending = prompt[:-1], prompt[-1:]
        cache.mtp = DraftState(model.mtp, model.embed)
        if hidden is not None:
            cache.mtp.extend(hidden, 0)
        # One token more, so that a round of three drafts fits.
        options = DecodeOptions(5, mtp, False)
        stream = decode(model, [], cache, params, options, controller=controller)
        counts[tuple(next(stream).token for _ in range(3))] += 1
        stream.close()
    return counts


def surplus(counts: np.ndarray, expected: np.ndarray) -> float:
    return chi_square(counts.ravel(), expected.ravel() * counts.sum())


CONDITIONS = {
    "before the window": (3, 3, SamplingParams(temperature=1.0)),
    "at the window": (WINDOW, 3, SamplingParams(temperature=1.0)),
    "after the window": (3 * WINDOW, 3, SamplingParams(temperature=1.0)),
    "top-p, cool": (WINDOW + 1, 2, SamplingParams(temperature=0.6, top_p=0.9)),
    "top-k and min-p": (5, 1, SamplingParams(temperature=1.3, top_k=6, min_p=0.05)),
    "penalties": (
        2 * WINDOW,
        3,
        SamplingParams(temperature=1.0, repetition_penalty=1.5, presence_penalty=0.5),
    ),
}


def check_distribution(model: Model, name: str, count: int, num_tokens: int = 3) -> None:
    length, mtp, params = CONDITIONS[name]
    prompt = prompt_of(length, model.config.vocab_size)
    expected = enumerated(model, prompt, params)
    assert expected.sum() == pytest.approx(1)
    counts = sampled(model, prompt, params, count, mtp)
    ignored = tuple(range(num_tokens, 3))
    assert surplus(counts.sum(axis=ignored), expected.sum(axis=ignored)) < 4


@pytest.mark.parametrize("name", ["after the window"])
def test_two_tokens_have_the_models_distribution(small: Model, name: str) -> None:
    check_distribution(small, name, 200, num_tokens=2)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", CONDITIONS)
def test_three_tokens_have_the_models_distribution_in_many_draws(small: Model, name: str) -> None:
    check_distribution(small, name, 4000)


class Claiming:
    """The real drafts with a distribution that they were not sampled from."""

    def __init__(self, state: DraftState, vocab_size: int) -> None:
        self._state = state
        self._vocab_size = vocab_size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)

    def propose(self, depth: int, tokens: Sequence[int], choose: Any) -> Proposal:
        proposal = self._state.propose(depth, tokens, choose)
        uniform = mx.full((depth, self._vocab_size), -float(np.log(self._vocab_size)))
        return Proposal(proposal.tokens, uniform)


@pytest.mark.exhaustive
def test_the_end_to_end_statistic_notices_a_wrong_draft_distribution(small: Model) -> None:
    length, mtp, params = CONDITIONS["after the window"]
    prompt = prompt_of(length, small.config.vocab_size)
    counts = np.zeros([12] * 3)
    for number in range(3000):
        mx.random.seed(number)
        cache = small.make_cache()
        cache.mtp = DraftState(small.mtp, small.embed)
        drafter = Claiming(cache.mtp, 12)
        stream = decode(small, prompt, cache, params, DecodeOptions(5, mtp, False), drafter=drafter)
        counts[tuple(next(stream).token for _ in range(3))] += 1
        stream.close()
    assert surplus(counts, enumerated(small, prompt, params)) > 6


@pytest.mark.exhaustive
def test_two_tokens_of_nano_have_its_distribution(nano: Model) -> None:
    params = SamplingParams(temperature=1.0, top_k=20)
    prompt = prompt_of(100, 300)
    size = nano.config.vocab_size
    chooser = Chooser(params)
    first = np.exp(np.array(log_softmax(chooser.scaled(nano(mx.array([prompt]))[:, -1])), dtype=np.float64))[
        0
    ]
    support = first.nonzero()[0].tolist()
    logits = nano(mx.array([[*prompt, token] for token in support]))[:, -1]
    second = np.exp(np.array(log_softmax(chooser.scaled(logits)), dtype=np.float64))
    expected = np.zeros([size, size])
    expected[support] = first[support][:, None] * second
    pairs = np.zeros([size, size])
    for number in range(3000):
        mx.random.seed(number)
        cache = nano.make_cache()
        stream = decode(nano, prompt, cache, params, DecodeOptions(4, 3, False))
        pairs[tuple(next(stream).token for _ in range(2))] += 1
        stream.close()
    assert pairs[expected == 0].sum() == 0
    reached = expected > 0
    assert surplus(pairs[reached], expected[reached]) < 4
