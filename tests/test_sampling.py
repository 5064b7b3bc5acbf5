"""Filters, noise and the acceptance rules by themselves."""

import math
from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from mlx_step35.errors import RequestError
from mlx_step35.sampling import (
    Chooser,
    CustomSampling,
    Noise,
    Proposal,
    SamplingParams,
    accept,
    apply_masks,
    log_softmax,
)

VOCAB_SIZE = 48
NO_TOKENS = mx.array([], dtype=mx.uint32)

FILTERS = {
    "none": SamplingParams(temperature=1.0),
    "cold": SamplingParams(temperature=0.3),
    "cool, top-p": SamplingParams(temperature=0.6, top_p=0.95),
    "top-p": SamplingParams(temperature=1.0, top_p=0.95),
    "top-k": SamplingParams(temperature=1.0, top_k=20),
    "min-p": SamplingParams(temperature=1.0, min_p=0.05),
    "penalty": SamplingParams(temperature=1.0, repetition_penalty=1.3),
}


def random_logits(rows: int, seed: int = 0, spread: float = 2.0) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(0, spread, (rows, VOCAB_SIZE)).astype(np.float32))


@pytest.mark.parametrize("name", FILTERS)
def test_distribution_is_that_of_mlx_lm(name: str) -> None:
    params, history = FILTERS[name], [3, 4, 5, 3]
    logits = random_logits(1)
    chooser = Chooser(params)
    ours = log_softmax(chooser.scaled(chooser.process(logits, history, NO_TOKENS)))
    # mlx-lm's processors write into the array they are given.
    theirs = mx.array(logits)
    for processor in make_logits_processors(None, params.repetition_penalty, 20):
        theirs = processor(mx.array(history), theirs)
    theirs = theirs - mx.logsumexp(theirs, keepdims=True)
    captured: list[mx.array] = []
    sampler = make_sampler(params.temperature, params.top_p, params.min_p, top_k=params.top_k)
    original = mx.random.categorical
    mx.random.categorical = lambda scores: captured.append(scores) or original(scores)  # type: ignore
    try:
        with mx.stream(mx.cpu):
            mx.disable_compile()
            sampler(theirs)
    finally:
        mx.random.categorical = original
        mx.enable_compile()
    assert np.allclose(np.exp(np.array(ours)), np.exp(np.array(log_softmax(captured[0]))), atol=1e-6)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(repetition_penalty=1.5),
        SamplingParams(presence_penalty=0.7, penalty_context_size=3),
        SamplingParams(frequency_penalty=0.4),
        SamplingParams(logit_bias={1: -5.0, 7: 2.5}),
        SamplingParams(repetition_penalty=0.8, presence_penalty=-0.5, frequency_penalty=0.2),
    ],
)
def test_every_row_has_its_own_history(params: SamplingParams) -> None:
    logits, past, drafts = random_logits(4), [5, 6, 7, 5, 9], [7, 7, 2]
    together = Chooser(params).process(logits, past, mx.array(drafts, dtype=mx.uint32))
    for row in range(4):
        alone = Chooser(params).process(logits[row : row + 1], past + drafts[:row], NO_TOKENS)
        assert mx.array_equal(together[row], alone[0])


def test_custom_processors_see_the_whole_history() -> None:
    seen: list[list[int]] = []

    def processor(tokens: mx.array, logits: mx.array) -> mx.array:
        seen.append(tokens.tolist())
        return logits

    chooser = Chooser(CustomSampling(processors=(processor,)))
    chooser.process(random_logits(2), [1, 2, 3], mx.array([4], dtype=mx.uint32))
    chooser.process(random_logits(1), [1, 2, 3, 9, 8], NO_TOKENS)
    assert seen == [[1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 9, 8]]


def test_a_custom_sampler_gets_log_probabilities_row_by_row() -> None:
    shapes: list[tuple[int, ...]] = []

    def sampler(logprobs: mx.array) -> mx.array:
        shapes.append(logprobs.shape)
        assert mx.allclose(mx.exp(logprobs).sum(axis=-1), mx.array(1.0), atol=1e-5)
        return mx.argmin(logprobs, axis=-1)

    logits = random_logits(3)
    tokens = Chooser(CustomSampling(sampler=sampler)).draw(logits, 0)
    assert shapes == [(1, VOCAB_SIZE)] * 3
    assert mx.array_equal(tokens, mx.argmin(logits, axis=-1))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("top_p", 1.5),
        ("top_k", -1),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
        ("min_tokens_to_keep", 0),
        ("penalty_context_size", 0),
    ],
)
def test_values_out_of_range_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    assert caught.value.field == name


def test_filters_wider_than_the_vocabulary_do_nothing() -> None:
    logits = random_logits(1)
    wide = Chooser(SamplingParams(temperature=1.0, top_k=10**6)).scaled(logits)
    assert mx.array_equal(wide, Chooser(SamplingParams(temperature=1.0)).scaled(logits))


class TestNoise:
    def test_a_row_depends_on_seed_and_position_only(self) -> None:
        together = Noise(7).gumbel("token", range(3, 6), VOCAB_SIZE)
        for index, position in enumerate(range(3, 6)):
            alone = Noise(7).gumbel("token", range(position, position + 1), VOCAB_SIZE)
            assert mx.array_equal(together[index], alone[0])

    @pytest.mark.parametrize("seed", [-1, 0, 2**63, 2**64 + 5, 10**30])
    def test_any_integer_is_a_seed(self, seed: int) -> None:
        rows = Noise(seed).gumbel("token", range(2), VOCAB_SIZE)
        assert mx.isfinite(rows).all().item()

    def test_seeds_positions_and_purposes_are_unrelated(self) -> None:
        rows = [
            Noise(seed).gumbel(purpose, range(position, position + 1), VOCAB_SIZE)[0].tolist()
            for seed in (0, 1, -1)
            for position in (0, 1, 2**31)
            for purpose in ("token", "draft", "residual")
        ]
        assert len({tuple(row) for row in rows}) == len(rows)
        correlation = np.corrcoef(np.array(rows))[np.triu_indices(len(rows), 1)]
        assert np.abs(correlation).max() < 0.7 and abs(correlation.mean()) < 0.05

    def test_old_rows_are_let_go(self) -> None:
        noise = Noise(0)
        first = noise.gumbel("token", range(1), VOCAB_SIZE)
        for position in range(100):
            noise.gumbel("token", range(position, position + 1), VOCAB_SIZE)
        assert len(noise._rows) <= 32
        assert mx.array_equal(noise.gumbel("token", range(1), VOCAB_SIZE), first)


class TestMasks:
    def test_rows_are_masked_one_by_one_and_short_masks_end_the_vocabulary(self) -> None:
        logits = random_logits(3)
        masked = apply_masks(logits, [None, np.array([False, True, True]), np.ones(VOCAB_SIZE, bool)])
        assert mx.array_equal(masked[0], logits[0]) and mx.array_equal(masked[2], logits[2])
        assert np.isfinite(np.array(masked[1])).nonzero()[0].tolist() == [1, 2]

    def test_without_masks_nothing_is_copied(self) -> None:
        logits = random_logits(2)
        assert apply_masks(logits, [None, None]) is logits


# --- The acceptance rules, statistically -------------------------------------------------------------------


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    """How many standard deviations the statistic is above its mean, cells of few expected counts pooled."""
    order = np.argsort(expected)
    counts, expected = counts[order], expected[order]
    small = int(np.searchsorted(np.cumsum(expected), 20.0)) + 1
    cells = np.concatenate([[counts[:small].sum()], counts[small:]])
    means = np.concatenate([[expected[:small].sum()], expected[small:]])
    degrees = max(len(cells) - 1, 1)
    statistic = float(((cells - means) ** 2 / np.maximum(means, 1e-9)).sum())
    # Wilson and Hilferty.
    return ((statistic / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees))


LIMIT = 4.0


def draws(
    target: mx.array, draft: mx.array, count: int, seed: int, greedy_match: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """First and second tokens from `count` runs of two drafts; second is -1 where the first draft fell.

    `greedy_match` is the biased rule of accepting a sampled draft if it is the target's best token.
    """
    key = mx.random.key(seed)
    keys = mx.random.split(key, 3)
    vocab_size = target.shape[1]
    drafts = mx.stack(
        [mx.random.categorical(draft[row], num_samples=count, key=keys[0] + row) for row in range(2)], axis=1
    )
    uniform = mx.random.uniform(shape=(count, 2), key=keys[1])
    gumbel = mx.random.gumbel(shape=(count, vocab_size), key=keys[2])
    if greedy_match:
        best = mx.argmax(target, axis=-1)
        right = mx.cumprod((drafts == best[:2]).astype(mx.int32), axis=1)
        num_accepted = right.sum(axis=1)
        tokens = mx.argmax(target[num_accepted] + gumbel, axis=-1)
    else:
        num_accepted, tokens = mx.vmap(accept, in_axes=(None, None, 0, 0, 0))(
            target, draft, drafts, uniform, gumbel
        )
    given, guessed, accepted = (np.array(array, dtype=np.int64) for array in (tokens, drafts, num_accepted))
    second = np.where(accepted > 1, guessed[:, 1], given)
    return np.where(accepted > 0, guessed[:, 0], given), np.where(accepted > 0, second, -1)


def excess(first: np.ndarray, second: np.ndarray, target: mx.array) -> tuple[float, float]:
    """Chi-square of the first tokens, and of the second where they followed an accepted draft."""
    probabilities = np.exp(np.array(target, dtype=np.float64))
    results = []
    for tokens, row in ((first, 0), (second[second >= 0], 1)):
        counts = np.bincount(tokens, minlength=probabilities.shape[1])
        results.append(chi_square(counts, probabilities[row] * len(tokens)))
    return results[0], results[1]


def distributions(name: str, logits: mx.array, history: Sequence[int]) -> mx.array:
    chooser = Chooser(FILTERS[name])
    fresh = mx.array([1, 2][: logits.shape[0] - 1], dtype=mx.uint32)
    return log_softmax(chooser.scaled(chooser.process(logits, history, fresh)))


@pytest.mark.parametrize("name", FILTERS)
def test_rejection_keeps_the_targets_distribution(name: str) -> None:
    logits = random_logits(3, seed=1)
    target = distributions(name, logits, [3, 4, 5])
    draft = distributions(name, logits + random_logits(3, seed=2, spread=1.0), [3, 4, 5])[:2]
    first, second = draws(target, draft, 100_000, seed=5)
    assert max(excess(first, second, target)) < LIMIT


@pytest.mark.parametrize("name", ["none", "top-p"])
def test_the_statistic_rejects_a_biased_rule(name: str) -> None:
    logits = random_logits(3, seed=1)
    target = distributions(name, logits, [3, 4, 5])
    draft = distributions(name, logits + random_logits(3, seed=2, spread=1.0), [3, 4, 5])[:2]
    first, second = draws(target, draft, 100_000, seed=5, greedy_match=True)
    assert excess(first, second, target)[0] > 10 * LIMIT


def test_equal_distributions_accept_everything() -> None:
    target = log_softmax(random_logits(3))
    first, second = draws(target, target[:2], 20_000, seed=1)
    assert (second >= 0).mean() > 0.9999
    assert max(excess(first, second, target)) < LIMIT


def test_disjoint_distributions_reject_everything() -> None:
    low, high = np.zeros((3, VOCAB_SIZE), bool), np.zeros((2, VOCAB_SIZE), bool)
    low[:, :20], high[:, 20:] = True, True
    target = log_softmax(mx.where(mx.array(low), random_logits(3), -mx.inf))
    draft = log_softmax(mx.where(mx.array(high), random_logits(2), -mx.inf))
    first, second = draws(target, draft, 20_000, seed=1)
    assert (second == -1).all() and (first < 20).all()
    assert excess(first, second, target)[0] < LIMIT


def test_noise_shared_between_draft_and_target_gives_the_plain_tokens() -> None:
    params = SamplingParams(temperature=1.0, top_k=20, seed=11)
    logits = random_logits(4)
    plain = Chooser(params)
    expected = [plain.draw(logits[row : row + 1], 50 + row).item() for row in range(4)]
    chooser = Chooser(params)
    drafts, _ = zip(*(chooser.draft(logits[row : row + 1], 50 + row) for row in range(3)), strict=True)
    outcome = chooser.verify(logits, Proposal(mx.concatenate(list(drafts)), None), 50).tolist()
    assert outcome == [3, *expected]


def test_certain_guesses_keep_the_distribution_too() -> None:
    logits = random_logits(2)
    target = log_softmax(logits)
    proposal = Proposal(mx.argmax(logits[:1], axis=-1), None)
    tokens = [
        Chooser(SamplingParams(temperature=1.0), seed).verify(logits, proposal, 9)[1] for seed in range(4000)
    ]
    counts = np.bincount(np.array(mx.stack(tokens)), minlength=VOCAB_SIZE)
    assert chi_square(counts, np.exp(np.array(target[0], dtype=np.float64)) * 4000) < LIMIT
