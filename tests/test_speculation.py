"""Speculative decoding is exact: token by token where it is deterministic, else in distribution."""

import itertools
import random
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.models import step3p5

from mlx_step35.cache import DEFAULT_SLACK
from mlx_step35.checkpoint import load_checkpoint, resolve_model
from mlx_step35.decoding import prepare
from mlx_step35.model import Model
from mlx_step35.mtp_state import DraftState
from mlx_step35.sampling import SamplingParams
from tests.drafters import GREEDY, KnowingDrafter, assert_fresh, prompt_of, run
from tests.tiny import VOCAB_SIZE, WINDOW

DEPTHS: tuple[Any, ...] = (1, 2, 3, "auto")
ERRORS = {"always wrong": 1.0, "half wrong": 0.5, "perfect": 0.0, "trained": None}


class Oracle:
    """What mlx-lm's `generate_step` says to a prompt of a given length, over the same float32 arrays."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._reference = oracle(model)
        self._texts: dict[tuple[int, int], list[int]] = {}

    def text(self, length: int, num_tokens: int) -> list[int]:
        """The prompt and its greedy continuation."""
        if (length, num_tokens) not in self._texts:
            prompt = prompt_of(length, self._model.config.vocab_size)
            steps = generate_step(mx.array(prompt), self._reference, max_tokens=num_tokens)
            self._texts[length, num_tokens] = prompt + [int(token) for token, _ in steps]
        return self._texts[length, num_tokens]


def oracle(model: Model) -> Any:
    """mlx-lm's model over the same arrays."""
    reference = step3p5.Model(step3p5.ModelArgs.from_dict(dict(model.config.raw)))
    arrays = tree_flatten(model.parameters())
    reference.load_weights([item for item in arrays if not item[0].startswith("mtp.")], strict=True)
    return reference


@pytest.fixture(scope="session")
def nano_oracle(nano: Model) -> Oracle:
    return Oracle(nano)


@pytest.fixture(scope="module")
def tiny_oracle(tiny_model: Model) -> Oracle:
    return Oracle(tiny_model)


def lengths(window: int) -> list[int]:
    return [1, 5, *range(window - 3, window + 4), 2 * window, 400]


def pairwise(*factors: Sequence[Any]) -> list[tuple[Any, ...]]:
    """A small selection of combinations in which every pair of values of two factors occurs."""
    needed = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(range(len(factors)), 2)
        for x in range(len(factors[a]))
        for y in range(len(factors[b]))
    }
    rows: list[tuple[Any, ...]] = []
    generator = random.Random(0)
    while needed:
        candidates = [tuple(generator.randrange(len(f)) for f in factors) for _ in range(60)]

        def pairs(row: tuple[int, ...]) -> set[Any]:
            return set(itertools.combinations(enumerate(row), 2))

        best = max(candidates, key=lambda row: len(pairs(row) & needed))
        if pairs(best) & needed:
            needed -= pairs(best)
            rows.append(tuple(factor[index] for factor, index in zip(factors, best, strict=True)))
    return rows


def check_greedy(
    model: Model, oracle: Oracle, length: int, mtp: Any, lookup: bool, drafter: str, num_tokens: int
) -> None:
    """One cell of the matrix."""
    text, error = oracle.text(length, num_tokens), ERRORS[drafter]
    knowing = None
    if error is not None:
        knowing = KnowingDrafter(text, model.config.vocab_size, error, seed=length)
    tokens = run(model, text[:length], num_tokens, mtp=mtp, lookup=lookup, drafter=knowing)
    assert tokens == text[length:]


TINY_MATRIX = (lengths(WINDOW), DEPTHS, (False, True), tuple(ERRORS))


@pytest.mark.parametrize(("length", "mtp", "lookup", "drafter"), pairwise(*TINY_MATRIX))
def test_greedy_tokens_are_those_of_mlx_lm(
    tiny_model: Model, tiny_oracle: Oracle, length: int, mtp: Any, lookup: bool, drafter: str
) -> None:
    check_greedy(tiny_model, tiny_oracle, length, mtp, lookup, drafter, num_tokens=40)


@pytest.mark.parametrize("drafter", ERRORS)
@pytest.mark.parametrize(("length", "mtp", "lookup"), [(61, 3, False), (64, 2, True), (130, "auto", True)])
def test_greedy_tokens_of_nano_are_those_of_mlx_lm(
    nano: Model, nano_oracle: Oracle, length: int, mtp: Any, lookup: bool, drafter: str
) -> None:
    check_greedy(nano, nano_oracle, length, mtp, lookup, drafter, num_tokens=40)


@pytest.mark.exhaustive
@pytest.mark.parametrize("drafter", ERRORS)
@pytest.mark.parametrize("lookup", [False, True])
@pytest.mark.parametrize("mtp", DEPTHS)
@pytest.mark.parametrize("length", lengths(64))
def test_whole_greedy_matrix(
    nano: Model, nano_oracle: Oracle, length: int, mtp: Any, lookup: bool, drafter: str
) -> None:
    check_greedy(nano, nano_oracle, length, mtp, lookup, drafter, num_tokens=300)


@pytest.mark.exhaustive
@pytest.mark.parametrize("drafter", ERRORS)
@pytest.mark.parametrize("lookup", [False, True])
@pytest.mark.parametrize("mtp", DEPTHS)
@pytest.mark.parametrize("length", lengths(WINDOW))
def test_whole_greedy_matrix_of_the_tiny_model(
    tiny_model: Model, tiny_oracle: Oracle, length: int, mtp: Any, lookup: bool, drafter: str
) -> None:
    check_greedy(tiny_model, tiny_oracle, length, mtp, lookup, drafter, num_tokens=300)


def test_rejections_fall_on_every_offset_around_the_wrap(tiny_model: Model) -> None:
    prompt = prompt_of(5, VOCAB_SIZE)
    expected = run(tiny_model, prompt, 110)
    drafter = KnowingDrafter(prompt + expected, VOCAB_SIZE, 0.5)
    assert run(tiny_model, prompt, 110, mtp=3, drafter=drafter) == expected
    # The buffer of a sliding layer is compacted at the latest every window + slack tokens.
    period = WINDOW + tiny_model.make_cache().slack
    assert {position % period for position in drafter.errors} == set(range(period))


@pytest.mark.parametrize("mtp", DEPTHS)
@pytest.mark.parametrize("length", [1, WINDOW, 30])
def test_seeded_tokens_do_not_depend_on_the_depth(tiny_model: Model, mtp: Any, length: int) -> None:
    sampling = SamplingParams(temperature=1.0, top_p=0.95, seed=length - 40)
    prompt = prompt_of(length, VOCAB_SIZE)
    expected = run(tiny_model, prompt, 30, sampling)
    assert run(tiny_model, prompt, 30, sampling, mtp=mtp) == expected
    assert run(tiny_model, prompt, 30, sampling, mtp=mtp, lookup=True) == expected


def test_seeded_tokens_go_on_over_turns(tiny_model: Model) -> None:
    sampling = SamplingParams(temperature=1.0, seed=8)
    prompt = prompt_of(9, VOCAB_SIZE)
    whole = run(tiny_model, prompt, 40, sampling)
    cache = tiny_model.make_cache()
    parts = run(tiny_model, prompt, 15, sampling, cache=cache, mtp=3)
    assert parts + run(tiny_model, [], 25, sampling, cache=cache, mtp=2) == whole


def likeliest(logits: mx.array, _: Sequence[mx.array]) -> tuple[mx.array, None]:
    return mx.argmax(logits, axis=-1), None


class TestDraftState:
    """Drafts after any history equal those of a fresh run over the same tokens."""

    @pytest.mark.parametrize("compiled", [False, True], ids=["as written", "compiled"])
    def test_after_random_histories(self, tiny_path: Any, compiled: bool) -> None:
        model = load_checkpoint(tiny_path)
        if compiled:
            prepare(model)
        generator = random.Random(1)
        tokens = prompt_of(30, VOCAB_SIZE)
        cache, state = model.make_cache(), DraftState(model.mtp, model.embed)
        state.extend(model.hidden(mx.array([tokens[:-1]]), cache), 0)
        for number in range(55 if compiled else 200):
            # Now and then no layer, or only the first, is used for longer than the window.
            depth = generator.choice([0, 1] if number % 50 > 30 else [0, 1, 2, 3, 3])
            drafts: list[int] = []
            # Always after a layer was left behind, else now and then: fresh runs take most of the time.
            if depth and (number % 50 < 5 or number % 3 == 0):
                drafts = assert_fresh(model, state, tokens, depth)
            elif depth:
                drafts = state.propose(depth, tokens, likeliest).tokens.tolist()
            accepted = generator.randint(0, depth)
            # What follows the accepted drafts is not the next draft.
            excluded = drafts[accepted] if accepted < depth else -1
            correction = generator.choice([t for t in range(VOCAB_SIZE) if t != excluded])
            at = cache.offset
            hidden = model.hidden(mx.array([[tokens[-1], *drafts]]), cache)
            cache.rollback(depth - accepted)
            state.settle(accepted)
            state.extend(hidden[:, : accepted + 1], at)
            tokens += [*drafts[:accepted], correction]
            assert state.end == cache.offset == len(tokens) - 1

    @pytest.mark.parametrize("num_rows", [1, 5, DEFAULT_SLACK])
    def test_after_going_back(self, tiny_model: Model, num_rows: int) -> None:
        """Only the rows to keep were given, and layers start again on fewer than before."""
        tokens = prompt_of(80, VOCAB_SIZE)
        hidden = tiny_model.hidden(mx.array([tokens[:-1]]))
        for depth in (1, 2, 3):
            for is_used in (False, True):
                state = DraftState(tiny_model.mtp, tiny_model.embed)
                first = hidden.shape[1] - state.num_kept_rows
                state.extend(hidden[:, first:], first)
                if is_used:
                    assert_fresh(tiny_model, state, tokens, 2)
                state.rollback(num_rows)
                assert_fresh(tiny_model, state, [*tokens[: -1 - num_rows], 7], depth)

    def test_rows_that_are_missing(self, tiny_model: Model) -> None:
        """Too few are left by many steps back or an interrupted prompt: drafts come all the same."""
        generator, hidden = random.Random(4), mx.zeros((1, 400, tiny_model.config.hidden_size))
        for _ in range(60):
            state = DraftState(tiny_model.mtp, tiny_model.embed)
            state.extend(hidden[:, :30], 0)
            at = generator.randint(20, 200)
            state.extend(hidden[:, : generator.randint(1, 40)], at)
            for _ in range(12):
                if generator.random() < 0.5 and state.end > at + 1:
                    state.rollback(generator.randint(1, min(state.end - at - 1, DEFAULT_SLACK)))
                else:
                    state.extend(hidden[:, : generator.randint(1, 9)], state.end)
                state.propose(generator.randint(1, 3), [1] * (state.end + 1), likeliest)
                state.settle(generator.randint(0, 3))
        # With enough rows again drafts are exact again.
        tokens = prompt_of(150, VOCAB_SIZE)
        hidden = tiny_model.hidden(mx.array([tokens[:-1]]))
        state = DraftState(tiny_model.mtp, tiny_model.embed)
        state.extend(hidden[:, 60:63], 60)
        state.propose(3, tokens[:64], likeliest)
        state.settle(0)
        state.extend(hidden[:, 63:], 63)
        assert_fresh(tiny_model, state, tokens)

    @pytest.mark.parametrize("depth", [1, 2, 3])
    def test_only_the_useful_rows_matter(self, tiny_model: Model, depth: int) -> None:
        """d drafts see the newest row and d * (window - 1) before it, not one more, and all of these."""
        tokens = prompt_of(60, VOCAB_SIZE)
        hidden = tiny_model.hidden(mx.array([tokens[:-1]]))
        oldest = len(tokens) - 2 - depth * (WINDOW - 1)

        def logits(poisoned: int) -> list[mx.array]:
            state = DraftState(tiny_model.mtp, tiny_model.embed)
            rows = mx.arange(hidden.shape[1])[:, None]
            state.extend(mx.where(rows == poisoned, 100.0, hidden), 0)
            seen: list[mx.array] = []
            forced = iter([3, 4, 5])

            def choose(logits: mx.array, _: Any) -> tuple[mx.array, None]:
                seen.append(logits[0])
                return mx.array([next(forced)], dtype=mx.uint32), None

            state.propose(depth, tokens, choose)
            return seen

        clean = logits(-1)
        assert all(map(mx.array_equal, clean, logits(oldest - 1)))
        # The last draft is the one that reaches furthest.
        assert not mx.array_equal(clean[-1], logits(oldest)[-1])

    def test_nothing_older_is_kept(self, tiny_model: Model) -> None:
        state = DraftState(tiny_model.mtp, tiny_model.embed)
        assert state.num_useful_rows == 3 * (WINDOW - 1) + 1
        for at in range(0, 1000, 4):
            state.extend(mx.zeros((1, 4, tiny_model.config.hidden_size)), at)
        assert state.num_kept_rows == state.num_useful_rows + DEFAULT_SLACK
        assert state.snapshot().nbytes == state.num_kept_rows * 4 * tiny_model.config.hidden_size

    def test_a_snapshot_is_the_state(self, tiny_model: Model) -> None:
        tokens = prompt_of(60, VOCAB_SIZE)
        state = DraftState(tiny_model.mtp, tiny_model.embed)
        state.extend(tiny_model.hidden(mx.array([tokens[:-1]])), 0)
        copy = DraftState.from_snapshot(tiny_model.mtp, tiny_model.embed, state.snapshot())

        def drafts(of: DraftState) -> list[int]:
            def choose(logits: mx.array, _: Any) -> tuple[mx.array, None]:
                return mx.argmax(logits, axis=-1), None

            return of.propose(3, tokens, choose).tokens.tolist()  # type: ignore[no-any-return]

        assert copy.end == state.end and drafts(copy) == drafts(state)

    def test_heads_are_separate(self, tiny_path: Any) -> None:
        """lm_head plays no part in drafting, and each head only in its own draft."""
        model = load_checkpoint(tiny_path)
        tokens = prompt_of(40, VOCAB_SIZE)

        def logits() -> list[mx.array]:
            state = DraftState(model.mtp, model.embed)
            state.extend(model.hidden(mx.array([tokens[:-1]])), 0)
            seen: list[mx.array] = []

            def choose(logits: mx.array, _: Any) -> tuple[mx.array, None]:
                seen.append(logits[0])
                return mx.array([7], dtype=mx.uint32), None

            state.propose(3, tokens, choose)
            mx.eval(seen)
            return seen

        clean = logits()
        model.lm_head.weight = model.lm_head.weight + 1
        assert all(map(mx.array_equal, clean, logits()))
        for k in range(3):
            output = model.mtp.layers[k].shared_head.output
            weight, output.weight = output.weight, output.weight + 1
            assert [bool(mx.array_equal(a, b)) for a, b in zip(clean, logits(), strict=True)] == [
                index != k for index in range(3)
            ]
            output.weight = weight


@pytest.mark.parametrize("mtp", [1, 3])
def test_quantised_tokens_have_maximal_logits(nano_4bit: Model, mtp: int) -> None:
    """Several rows round otherwise than one, so only nearly equal tokens may change places."""
    prompt = prompt_of(70, 300)
    tokens = run(nano_4bit, prompt, 60, mtp=mtp)
    logits = nano_4bit(mx.array([prompt + tokens]))[0, len(prompt) - 1 : -1]
    given = mx.take_along_axis(logits, mx.array(tokens)[:, None], axis=-1)[:, 0]
    assert (logits.max(axis=-1) - given).max().item() < 1e-3


@pytest.fixture(scope="module")
def nano_4bit(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """nano with 4-bit weights, its heads too."""
    from mlx_step35.convert import convert

    path = tmp_path_factory.mktemp("nano") / "4bit"
    convert(str(resolve_model("nano")), str(path), quantize=True, q_bits=4)
    return load_checkpoint(path)


def test_greedy_is_the_limit_of_temperature(tiny_model: Model) -> None:
    prompt = prompt_of(20, VOCAB_SIZE)
    cold = SamplingParams(temperature=1e-4)
    assert run(tiny_model, prompt, 40, cold, mtp=3) == run(tiny_model, prompt, 40, GREEDY)
