"""The acceptance rule on distributions of the bundled model: what comes out has the model's distribution.

Logits of nano and of its MTP layers are recorded on held-out dialogues and source code, filtered as a request
would have them, and verified under the noise of many (seed, position) keys. A chi-square test compares the
tokens with the model's probabilities; biased rules, put to the same test, have to fail it.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
import pytest

from benchmarks.acceptance import Recorded, acceptance, record, shared_noise
from benchmarks.heldout import dialogues, sources
from mlx_step35.chat.tokenizer import Tokenizer
from mlx_step35.checkpoint import resolve_model
from mlx_step35.model import Model
from mlx_step35.sampling import Chooser, Noise, Proposal, SamplingParams, accept, log_softmax

NUM_DRAFTS = 2
# Standard deviations: a right rule exceeds the first once in 30,000 tests, a wrong one must the second.
LIMIT, BIASED = 4.0, 8.0
BATCH = 1000
NO_TOKENS = mx.array([], dtype=mx.uint32)

TEMPERATURES = (0.3, 0.6, 1.0)
FILTERS = {
    "none": SamplingParams(),
    "top-p": SamplingParams(top_p=0.95),
    "top-k": SamplingParams(top_k=20),
    "min-p": SamplingParams(min_p=0.05),
    "penalty": SamplingParams(repetition_penalty=1.3),
}

# Normalised log-probabilities (3, V) and (2, V), drafts (2,), uniform (2,), Gumbel noise (V,).
Rule = Callable[[mx.array, mx.array, mx.array, mx.array, mx.array], tuple[mx.array, mx.array]]


@dataclass(frozen=True, slots=True)
class Place:
    """Target logits (3, V) and draft logits (2, V) at a position, and the tokens before it."""

    position: int
    past: list[int]
    target: mx.array
    draft: mx.array


@pytest.fixture(scope="module")
def recordings(nano: Model) -> list[Recorded]:
    path, rng = resolve_model("nano"), random.Random(3)
    tokenizer = Tokenizer.from_directory(path)
    prompts = [*dialogues(path, tokenizer, 3, rng), *sources(tokenizer, 3, rng, 200)]
    return [record(nano, prompt[-200:], 40, seed) for seed, prompt in enumerate(prompts)]


@pytest.fixture(scope="module")
def places(recordings: list[Recorded]) -> list[Place]:
    """Two positions of every text: those where drafts are neither all right nor all wrong."""
    found: list[Place] = []
    for recorded in recordings:
        p, q = (np.exp(np.array(log_softmax(logits[:, 0]))) for logits in (recorded.target, recorded.draft))
        doubt = np.abs(np.minimum(p, q).sum(axis=-1) - 0.6)
        for index in np.argsort(doubt)[:2].tolist():
            position = recorded.first + index
            rows, drafts = recorded.target[index, : NUM_DRAFTS + 1], recorded.draft[index, :NUM_DRAFTS]
            found.append(Place(position, recorded.tokens[:position], rows, drafts))
    return found


def distributions(place: Place, params: SamplingParams) -> tuple[mx.array, mx.array]:
    """Target (3, V) and draft (2, V) as `Chooser` compares them; the drafts before a row are some tokens."""
    chooser, fresh = Chooser(params), mx.array(place.past[-2:], dtype=mx.uint32)
    target = chooser.scaled(chooser.process(place.target, place.past, fresh))
    draft = chooser.scaled(chooser.process(place.draft, place.past, fresh[:1]))
    return log_softmax(target), log_softmax(draft)


def noise(seeds: range, position: int, vocab_size: int) -> tuple[mx.array, mx.array]:
    """`Noise`'s numbers for many seeds at once: uniform (N, 2) and Gumbel (N, V)."""

    def keys(purpose: str) -> mx.array:
        return mx.stack([Noise(seed)._key(purpose, position) for seed in seeds])  # type: ignore[arg-type]

    uniform = mx.vmap(lambda key: mx.random.uniform(shape=(NUM_DRAFTS,), key=key))(keys("accept"))
    gumbel = mx.vmap(lambda key: mx.random.gumbel(shape=(vocab_size,), key=key))(keys("residual"))
    return uniform, gumbel


def outcomes(
    place: Place, params: SamplingParams, seeds: range, rules: dict[str, Rule]
) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """For each rule, counts and expected counts of first tokens, and of second ones behind a right draft."""
    target, draft = distributions(place, params)
    vocab_size = target.shape[1]
    # What both rule out can be left out.
    support = mx.array(np.isfinite(np.array(mx.maximum(target.max(0), draft.max(0)))).nonzero()[0])
    target, draft = target[:, support], draft[:, support]
    p, q = (np.exp(np.array(logs, dtype=np.float64)) for logs in (target, draft))
    counts = {name: np.zeros((2, support.size)) for name in rules}
    for start in range(seeds.start, seeds.stop, BATCH):
        batch = range(start, min(start + BATCH, seeds.stop))
        generator = np.random.default_rng([start, place.position])
        drafts = np.stack(
            [generator.choice(support.size, len(batch), p=row / row.sum()) for row in q], axis=1
        )
        uniform, gumbel = noise(batch, place.position, vocab_size)
        for name, rule in rules.items():
            accepted, tokens = mx.vmap(rule, in_axes=(None, None, 0, 0, 0))(
                target, draft, mx.array(drafts), uniform, gumbel[:, support]
            )
            num, given = np.array(accepted, dtype=np.int64), np.array(tokens, dtype=np.int64)
            first = np.where(num > 0, drafts[:, 0], given)
            second = np.where(num > 1, drafts[:, 1], given)[num > 0]
            counts[name] += [np.bincount(values, minlength=support.size) for values in (first, second)]
    return {
        name: [(row, p[index] / p[index].sum() * row.sum()) for index, row in enumerate(table)]
        for name, table in counts.items()
    }


def deviations(cells: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """Chi-square over tables of counts, in standard deviations above its mean; rare tokens are pooled."""
    statistic, degrees = 0.0, 0
    for counts, expected in cells:
        order = np.argsort(expected)
        counts, expected = counts[order], expected[order]
        rare = int(np.searchsorted(np.cumsum(expected), 20.0)) + 1
        observed = np.array([counts[:rare].sum(), *counts[rare:]])
        means = np.array([expected[:rare].sum(), *expected[rare:]])
        statistic += float(((observed - means) ** 2 / np.maximum(means, 1e-9)).sum())
        degrees += len(means) - 1
    # Wilson and Hilferty.
    return ((statistic / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees))


def by_argmax(
    target: mx.array, draft: mx.array, drafts: mx.array, uniform: mx.array, gumbel: mx.array
) -> tuple[mx.array, mx.array]:
    """Biased: a sampled draft is accepted if it is the model's best token."""
    right = mx.cumprod((drafts == mx.argmax(target[:NUM_DRAFTS], axis=-1)).astype(mx.int32)).sum()
    return right, mx.argmax(mx.take(target, right, axis=0) + gumbel)


def without_residual(
    target: mx.array, draft: mx.array, drafts: mx.array, uniform: mx.array, gumbel: mx.array
) -> tuple[mx.array, mx.array]:
    """Biased: accepts by the right probability, but a sample of the target follows a rejected draft."""
    accepted, _ = accept(target, draft, drafts, uniform, gumbel)
    return accepted, mx.argmax(mx.take(target, accepted, axis=0) + gumbel)


def check(places: list[Place], temperature: float, name: str, num_keys: int, rules: dict[str, Rule]) -> None:
    params = replace(FILTERS[name], temperature=temperature)
    each = math.ceil(num_keys / len(places))
    cells: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {rule: [] for rule in rules}
    for place in places:
        for rule, tables in outcomes(place, params, range(each), rules).items():
            cells[rule] += [table for table in tables if table[0].sum() > 0]
    for rule in rules:
        if rule == "accept":
            assert deviations(cells[rule]) < LIMIT
        else:
            assert deviations(cells[rule]) > BIASED, rule


RIGHT: dict[str, Rule] = {"accept": accept}
ALL: dict[str, Rule] = {"accept": accept, "by argmax": by_argmax, "without residual": without_residual}


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("name", FILTERS)
def test_rejection_keeps_nanos_distribution(places: list[Place], name: str, temperature: float) -> None:
    """The fifteen together use over 100,000 keys."""
    check(places, temperature, name, 7000, ALL if temperature == 1 and name == "top-k" else RIGHT)


@pytest.mark.exhaustive
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("name", FILTERS)
def test_rejection_keeps_nanos_distribution_under_many_keys(
    places: list[Place], name: str, temperature: float
) -> None:
    check(places, temperature, name, 100_000, ALL)


def test_noise_for_many_seeds_is_that_of_each() -> None:
    uniform, gumbel = noise(range(5), 40, 64)
    for seed in range(5):
        assert mx.array_equal(uniform[seed], Noise(seed).uniform("accept", 40, NUM_DRAFTS))
        assert mx.array_equal(gumbel[seed], Noise(seed).gumbel("residual", range(40, 41), 64)[0])


def test_a_round_of_the_chooser_is_what_was_tested(places: list[Place]) -> None:
    """`Chooser.verify` gives the tokens of `accept` under the noise of its seed and position."""
    params = SamplingParams(1.0, top_k=20)
    for place in places:
        target, draft = distributions(place, params)
        drafts = mx.argmax(draft, axis=-1)
        uniform, gumbel = noise(range(9, 10), place.position, target.shape[1])
        accepted, token = accept(target, draft, drafts, uniform[0], gumbel[0])
        outcome = Chooser(params, 9).verify(place.target, Proposal(drafts, draft), place.position).tolist()
        num = int(accepted.item())
        assert outcome[: num + 2] == [num, *drafts[:num].tolist(), token.item()]


def test_rejection_accepts_most_and_independent_samples_least(recordings: list[Recorded]) -> None:
    rates = acceptance(recordings)
    for rejection, shared, independent in zip(*rates.values(), strict=True):
        assert 1 >= rejection >= shared >= independent > 0


def test_acceptance_by_shared_noise_is_what_drawing_gives() -> None:
    generator = np.random.default_rng(5)
    p, q = (generator.dirichlet(np.full(12, 0.5)) for _ in range(2))
    gumbel = generator.gumbel(size=(200_000, 12))
    drawn = ((np.log(p) + gumbel).argmax(1) == (np.log(q) + gumbel).argmax(1)).mean()
    assert shared_noise(p, q) == pytest.approx(drawn, abs=0.005)
