"""What decode promises around its edges: where it stops, what the caches hold then, what it refuses."""

import random
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_step35.cache import ModelCache
from mlx_step35.checkpoint import load_checkpoint
from mlx_step35.decoding import DecodeOptions, DecodeStats, decode, decoder
from mlx_step35.depth import PLAIN, Plan
from mlx_step35.errors import PromptTooLongError, RequestError
from mlx_step35.model import Model
from mlx_step35.sampling import CustomSampling, SamplingParams
from tests.drafters import GREEDY, KnowingDrafter, assert_fresh, check_cache, prompt_of, run
from tests.tiny import VOCAB_SIZE, tiny_config, tiny_weights, write_checkpoint

PROMPT = prompt_of(11, VOCAB_SIZE)
WAYS: list[dict[str, Any]] = [{"mtp": "off"}, {"mtp": 2}, {"mtp": 3}, {"mtp": "auto", "lookup": True}]
IDS = ["plain", "depth 2", "depth 3", "auto and lookup"]


@pytest.fixture(scope="module")
def text(tiny_model: Model) -> list[int]:
    """The prompt and 60 greedy tokens."""
    return PROMPT + run(tiny_model, PROMPT, 60)


@pytest.mark.parametrize("way", WAYS, ids=IDS)
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 17])
def test_max_tokens_is_exact(
    tiny_model: Model, text: list[int], way: dict[str, Any], num_tokens: int
) -> None:
    stats = DecodeStats()
    tokens = run(tiny_model, PROMPT, num_tokens, stats=stats, **way)
    assert tokens == text[len(PROMPT) :][:num_tokens]
    assert stats.generated_tokens == num_tokens


@pytest.mark.parametrize("error", [0.0, 0.4])
@pytest.mark.parametrize("stop", range(1, 13))
def test_closing_inside_an_accepted_block_ends_there(
    tiny_model: Model, text: list[int], stop: int, error: float
) -> None:
    cache, stats = tiny_model.make_cache(), DecodeStats()
    drafter = KnowingDrafter(text, VOCAB_SIZE, error, seed=stop)
    stream = decode(
        tiny_model, PROMPT, cache, GREEDY, DecodeOptions(50, 3, False), drafter=drafter, stats=stats
    )
    tokens = [next(stream) for _ in range(stop)]
    stream.close()
    assert [item.token for item in tokens] == text[len(PROMPT) :][:stop]
    check_cache(cache, text[: len(PROMPT) + stop])
    assert stats.generated_tokens == stop
    assert sum(stats.accepted.get("mtp", [])) == sum(item.from_draft for item in tokens)
    # And another turn continues as if nothing had happened.
    turn = prompt_of(5, VOCAB_SIZE, seed=9)
    expected = run(tiny_model, [*text[: len(PROMPT) + stop], *turn], 20)
    assert run(tiny_model, turn, 20, cache=cache, mtp=2) == expected


@pytest.mark.parametrize("way", WAYS, ids=IDS)
def test_a_turn_after_a_turn_equals_a_cold_run(tiny_model: Model, way: dict[str, Any]) -> None:
    cache, known = tiny_model.make_cache(), list[int]()
    for turn in range(4):
        prompt = prompt_of(3 + 5 * turn, VOCAB_SIZE, seed=turn)
        known += prompt
        expected = run(tiny_model, known, 9 + turn)
        known += run(tiny_model, prompt, 9 + turn, cache=cache, **way)
        assert known[-9 - turn :] == expected


def test_an_empty_turn_goes_on_from_the_pending_token(tiny_model: Model, text: list[int]) -> None:
    cache = tiny_model.make_cache()
    run(tiny_model, PROMPT, 10, cache=cache, mtp=3)
    assert run(tiny_model, [], 10, cache=cache, mtp=1) == text[len(PROMPT) + 10 :][:10]


@pytest.mark.parametrize("step", [1, 3, 7, 8, 64])
def test_chunks_and_boundaries_do_not_matter(tiny_model: Model, text: list[int], step: int) -> None:
    prompt = text[:45]
    calls: list[tuple[int, int]] = []
    offsets: list[int] = []
    cache = tiny_model.make_cache()

    def on_prefill(done: int, total: int) -> None:
        calls.append((done, total))
        offsets.append(cache.offset)
        assert cache.tokens == prompt[: cache.offset]

    options = DecodeOptions(15, 3, False, step, prefill_boundaries=(20, 5, 44))
    stream = decode(tiny_model, prompt, cache, GREEDY, options, on_prefill=on_prefill)
    tokens = [item.token for item in stream]
    assert tokens == text[45:60]
    assert calls[0] == (0, 45) and calls[-1] == (45, 45)
    assert {0, 5, 20, 44, 45} <= set(offsets)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_a_prefill_that_is_interrupted_can_be_taken_up(tiny_model: Model, text: list[int]) -> None:
    cache, prompt = tiny_model.make_cache(), text[:40]

    class Cancelled(Exception):
        pass

    def on_prefill(done: int, total: int) -> None:
        if done == 24:
            raise Cancelled

    stream = decode(
        tiny_model, prompt, cache, GREEDY, DecodeOptions(9, prefill_step_size=8), on_prefill=on_prefill
    )
    with pytest.raises(Cancelled):
        next(stream)
    assert cache.tokens == prompt[:24] and cache.pending == []
    assert run(tiny_model, prompt[24:], 9, cache=cache, mtp=3) == text[40:49]


class TestRefusals:
    def test_an_empty_prompt(self, tiny_model: Model) -> None:
        with pytest.raises(RequestError, match="empty"):
            run(tiny_model, [], 3)

    def test_a_prompt_that_fills_the_context(self, tiny_model: Model) -> None:
        cache = tiny_model.make_cache()
        with pytest.raises(PromptTooLongError) as caught:
            run(tiny_model, [1] * 4096, 3, cache=cache)
        assert (caught.value.num_tokens, caught.value.limit) == (4096, 4095)
        assert cache.offset == 0

    @pytest.mark.parametrize("mtp", [0, 4, -1, "on", True, 1.5])
    def test_other_depths(self, mtp: Any) -> None:
        with pytest.raises(RequestError) as caught:
            DecodeOptions(mtp=mtp)
        assert caught.value.field == "mtp"

    @pytest.mark.parametrize("max_tokens", [0, -2])
    def test_other_limits(self, max_tokens: int) -> None:
        with pytest.raises(RequestError) as caught:
            DecodeOptions(max_tokens)
        assert caught.value.field == "max_tokens"

    def test_a_depth_without_heads(self, headless: Model) -> None:
        with pytest.raises(RequestError, match="MTP layers") as caught:
            run(headless, PROMPT, 3, mtp=1)
        assert caught.value.field == "mtp"

    def test_a_cache_of_unknown_tokens(self, tiny_model: Model) -> None:
        cache = tiny_model.make_cache()
        tiny_model(mx.array([[1, 2, 3]]), cache=cache)
        with pytest.raises(RequestError) as caught:
            run(tiny_model, PROMPT, 3, cache=cache)
        assert caught.value.field == "prompt_cache"


@pytest.fixture(scope="module")
def headless(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A checkpoint without MTP layers."""
    raw = tiny_config(num_nextn_predict_layers=0)
    path = write_checkpoint(tmp_path_factory.mktemp("headless") / "model", raw, tiny_weights(raw, mtp=False))
    return load_checkpoint(path)


def test_auto_without_heads_is_plain_and_says_why(headless: Model) -> None:
    stats = DecodeStats()
    run(headless, PROMPT, 10, mtp="auto", stats=stats)
    assert stats.reason_off == headless.mtp_reason is not None
    assert stats.rounds == {PLAIN: 10}


def test_off_says_so(tiny_model: Model) -> None:
    stats = DecodeStats()
    run(tiny_model, PROMPT, 3, mtp="off", stats=stats)
    assert stats.reason_off == "it was turned off"


def test_the_context_ends_the_text(tmp_path: Any) -> None:
    raw = tiny_config(max_seq_len=40, max_position_embeddings=40)
    model = load_checkpoint(write_checkpoint(tmp_path / "model", raw))
    expected = run(model, PROMPT, 100)
    assert len(expected) == 40 - len(PROMPT)
    assert run(model, PROMPT, -1, mtp=3) == expected


def test_statistics_count_what_was_given(tiny_model: Model, text: list[int]) -> None:
    stats = DecodeStats()
    drafter = KnowingDrafter(text, VOCAB_SIZE, 0.0)
    # The first token comes with the prompt, then 4 per round, the last round cut short.
    run(tiny_model, PROMPT, 15, mtp=3, drafter=drafter, stats=stats)
    assert stats.rounds == {PLAIN: 1, Plan("mtp", 3): 3, Plan("mtp", 1): 1}
    assert stats.forward_passes == 5
    assert stats.drafted == {"mtp": [4, 3, 3]} and stats.accepted == {"mtp": [4, 3, 3]}
    assert stats.tokens_per_pass == 3.0
    assert stats.as_json()["depths"] == {"mtp-1": 1, "mtp-3": 3, "plain-0": 1}


def test_one_blocking_read_per_round(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []

    def read(ids: mx.array) -> list[int]:
        reads.append(ids.size)
        return ids.tolist()  # type: ignore[no-any-return]

    monkeypatch.setattr(decoder, "_read", read)
    for way in WAYS:
        reads.clear()
        stats = DecodeStats()
        run(tiny_model, PROMPT, 30, stats=stats, **way)
        assert len(reads) == stats.forward_passes


class Recording:
    """Allows one of three sets of tokens, by the number of tokens before; keeps what it was told."""

    def __init__(self, history: Sequence[int] = ()) -> None:
        self.history = list(history)

    def mask(self) -> np.ndarray | None:
        phase = sum(self.history) % 4
        if phase == 3:
            return None
        return np.array([token % 3 == phase for token in range(VOCAB_SIZE - 2)])

    def advance(self, token: int) -> None:
        self.history.append(token)

    def rollback(self, num_tokens: int) -> None:
        del self.history[len(self.history) - num_tokens :]


@pytest.mark.parametrize(
    "sampling", [GREEDY, SamplingParams(temperature=1.0, seed=3)], ids=["greedy", "seeded"]
)
@pytest.mark.parametrize("way", WAYS, ids=IDS)
def test_a_constraint_sees_the_right_history_at_every_position(
    tiny_model: Model, way: dict[str, Any], sampling: SamplingParams
) -> None:
    constraint = Recording()
    tokens = run(tiny_model, PROMPT, 40, sampling, constraint=constraint, **way)
    assert constraint.history == tokens
    for index, token in enumerate(tokens):
        mask = Recording(tokens[:index]).mask()
        assert mask is None or mask[token]
    assert tokens == run(tiny_model, PROMPT, 40, sampling, constraint=Recording(), mtp="off")


def test_a_constraint_keeps_the_distribution_legal_under_rejection(tiny_model: Model) -> None:
    mx.random.seed(2)
    for _ in range(5):
        constraint = Recording()
        tokens = run(tiny_model, PROMPT, 30, SamplingParams(temperature=1.0), constraint=constraint, mtp=3)
        assert constraint.history == tokens
        masks = [Recording(tokens[:index]).mask() for index in range(30)]
        assert all(mask is None or mask[token] for mask, token in zip(masks, tokens, strict=True))


class Forcing:
    """Says a fixed text, then lets go: how a thinking budget is enforced."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = list(tokens)
        self._position = 0

    def mask(self) -> np.ndarray | None:
        if self._position >= len(self._tokens):
            return None
        return np.arange(VOCAB_SIZE) == self._tokens[self._position]

    def advance(self, token: int) -> None:
        self._position += 1

    def rollback(self, num_tokens: int) -> None:
        self._position -= num_tokens


@pytest.mark.parametrize("way", WAYS, ids=IDS)
def test_tokens_can_be_forced(tiny_model: Model, way: dict[str, Any]) -> None:
    forced = [5, 4, 9, 9, 1]
    tokens = run(tiny_model, PROMPT, 12, constraint=Forcing(forced), **way)
    assert tokens == forced + run(tiny_model, PROMPT + forced, 7)


@pytest.mark.parametrize("way", WAYS[1:], ids=IDS[1:])
def test_penalties_and_processors_equal_plain_decoding(tiny_model: Model, way: dict[str, Any]) -> None:
    def processor(tokens: mx.array, logits: mx.array) -> mx.array:
        # Depends on all of the history.
        return logits + mx.arange(VOCAB_SIZE) * ((tokens.sum() % 5) * 0.1)

    sampling = CustomSampling(
        SamplingParams(repetition_penalty=1.4, frequency_penalty=0.3, presence_penalty=0.2),
        processors=(processor,),
    )
    assert run(tiny_model, PROMPT, 40, sampling, **way) == run(tiny_model, PROMPT, 40, sampling)


@pytest.mark.parametrize("way", WAYS[1:], ids=IDS[1:])
def test_an_opaque_sampler_is_obeyed(tiny_model: Model, way: dict[str, Any]) -> None:
    def third_best(logprobs: mx.array) -> mx.array:
        return mx.argsort(-logprobs, axis=-1)[:, 2]

    sampling = CustomSampling(sampler=third_best)
    assert run(tiny_model, PROMPT, 40, sampling, **way) == run(tiny_model, PROMPT, 40, sampling)


@pytest.mark.parametrize("way", WAYS, ids=IDS)
def test_logprobs_are_the_models(tiny_model: Model, way: dict[str, Any]) -> None:
    cache = tiny_model.make_cache()
    items = list(
        decode(
            tiny_model,
            PROMPT,
            cache,
            SamplingParams(temperature=0.7, top_p=0.5),
            DecodeOptions(20, way["mtp"], way.get("lookup", False)),
        )
    )
    tokens = PROMPT + [item.token for item in items]
    logits = tiny_model(mx.array([tokens]))[0, len(PROMPT) - 1 : -1]
    expected = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    for row, item in enumerate(items):
        assert item.logprobs.shape == (VOCAB_SIZE,)
        assert mx.abs(item.logprobs - expected[row]).max().item() < 1e-4


def test_a_constraint_is_left_at_the_last_token_given(tiny_model: Model) -> None:
    constraint, cache = Recording(), tiny_model.make_cache()
    stream = decode(tiny_model, PROMPT, cache, GREEDY, DecodeOptions(30, 3), constraint=constraint)
    tokens = [next(stream).token for _ in range(6)]
    stream.close()
    assert constraint.history == tokens


def test_random_closings_and_turns_keep_every_offset_equal(tiny_model: Model) -> None:
    generator = random.Random(4)
    cache: ModelCache = tiny_model.make_cache()
    known: list[int] = []
    for turn in range(12):
        prompt = prompt_of(generator.randrange(1, 20), VOCAB_SIZE, seed=turn)
        options = DecodeOptions(30, generator.choice(["auto", "off", 1, 2, 3]), generator.random() < 0.5)
        stream = decode(tiny_model, prompt, cache, SamplingParams(temperature=1.0, seed=turn), options)
        given = [next(stream).token for _ in range(generator.randrange(1, 25))]
        stream.close()
        known += prompt + given
        assert [*cache.tokens, *cache.pending] == known
        assert {layer.offset for layer in cache} == {len(known) - 1}


class Broken(Exception):
    pass


@pytest.mark.parametrize("way", WAYS, ids=IDS)
@pytest.mark.parametrize("calls", [0, 1, 4, 5, 9])
def test_after_an_exception_the_cache_is_at_the_tokens_given(
    tiny_model: Model, way: dict[str, Any], calls: int
) -> None:
    left = calls

    def processor(tokens: mx.array, logits: mx.array) -> mx.array:
        nonlocal left
        left -= 1
        if left < 0:
            raise Broken
        return logits

    cache, tokens = tiny_model.make_cache(), list[int]()
    options = DecodeOptions(30, way["mtp"], way.get("lookup", False))
    sampling = CustomSampling(processors=(processor,))
    with pytest.raises(Broken):
        tokens.extend(item.token for item in decode(tiny_model, PROMPT, cache, sampling, options))
    known = [*cache.tokens, *cache.pending]
    assert known[: len(PROMPT)] == PROMPT and known[len(PROMPT) :] == tokens
    assert {layer.offset for layer in cache} == {len(cache.tokens)}
    turn = [4, 5, 6]
    assert run(tiny_model, turn, 15, cache=cache, mtp=3) == run(tiny_model, known + turn, 15)


def test_a_chunk_that_broke_off_leaves_an_empty_cache(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tiny_model.make_cache()
    run(tiny_model, PROMPT, 5, cache=cache)

    def breaks(x: mx.array, *rest: Any) -> mx.array:
        raise Broken

    with monkeypatch.context() as patch:
        patch.setattr(type(tiny_model.layers[4]), "__call__", _after(4, breaks, tiny_model))
        with pytest.raises(Broken):
            run(tiny_model, prompt_of(80, VOCAB_SIZE), 5, cache=cache)
    assert cache.offset == 0 and cache.tokens == [] and cache.pending == []
    assert run(tiny_model, PROMPT, 8, cache=cache) == run(tiny_model, PROMPT, 8)


def _after(index: int, other: Any, model: Model) -> Any:
    """A layer call that becomes another one from a layer on."""
    original = type(model.layers[0]).__call__

    def call(layer: Any, *arguments: Any) -> Any:
        return other(*arguments) if layer is model.layers[index] else original(layer, *arguments)

    return call


def test_rolling_a_cache_back_takes_its_drafts_along(tiny_model: Model) -> None:
    cache = tiny_model.make_cache()
    run(tiny_model, PROMPT, 30, mtp=3, cache=cache)
    length = len(cache.tokens)
    cache.rollback(6)
    assert cache.offset == len(cache.tokens) == cache.mtp.end == length - 6 and cache.pending == []
    assert_fresh(tiny_model, cache.mtp, [*cache.tokens, 7])
    # Tokens the draft state did not see, up to the same length.
    list(decode(tiny_model, [7, 8, 9], cache, GREEDY, DecodeOptions(4, "off")))
    assert len(cache.tokens) == length != cache.mtp.end
