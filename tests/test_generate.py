"""The Python API: mlx-lm's names and behaviour."""

import dataclasses
import inspect
import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.generate import GenerationResponse as TheirResponse
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

import mlx_step35
from mlx_step35 import GenerationResponse, generate, load, stream_generate
from mlx_step35.errors import RequestError
from mlx_step35.model import Model

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]

Loaded = tuple[Model, TokenizerWrapper]


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    # Uncompiled: these tests decode a few tokens each.
    model, tokenizer = load("nano", dtype="float32", lazy=True)
    return model, tokenizer


def reference(loaded: Loaded) -> Any:
    """mlx-lm's model over the same arrays."""
    from tests.test_speculation import oracle

    return oracle(loaded[0])


def test_responses_equal_those_of_mlx_lm(loaded: Loaded) -> None:
    model, tokenizer = loaded
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)
    theirs = list(mlx_lm.stream_generate(reference(loaded), tokenizer, prompt, max_tokens=30))
    ours = list(stream_generate(model, tokenizer, prompt, max_tokens=30))
    for our, their in zip(ours, theirs, strict=True):
        for name in ("text", "token", "prompt_tokens", "generation_tokens", "finish_reason"):
            assert getattr(our, name) == getattr(their, name), name
        assert mx.abs(our.logprobs - their.logprobs).max().item() < 1e-3
    assert ours[0].prompt_tps > 0 and ours[-1].generation_tps > 0 and ours[-1].peak_memory > 0


def test_responses_have_all_of_mlx_lms_fields() -> None:
    ours = {field.name for field in dataclasses.fields(GenerationResponse)}
    assert {field.name for field in dataclasses.fields(TheirResponse)} < ours


def test_options_of_mlx_lm_are_served_or_refused_by_name(loaded: Loaded) -> None:
    model, tokenizer = loaded
    theirs = set(inspect.signature(mlx_lm.generate.__globals__["generate_step"]).parameters)
    ours = set(inspect.signature(stream_generate).parameters)
    # A stream is chosen with mx.stream; the first two are positional in both.
    for name in theirs - ours - {"stream"}:
        with pytest.raises(RequestError) as caught:
            stream_generate(model, tokenizer, "hi", **{name: 8})
        assert caught.value.field == name


@pytest.mark.parametrize("name", ["draft_model", "max_kv_size", "kv_bits"])
def test_what_is_not_served_says_why(loaded: Loaded, name: str) -> None:
    with pytest.raises(RequestError, match=f"{name} is not served: .+"):
        generate(*loaded, "hi", **{name: 4})
    # mlx-lm's own default may be passed on.
    generate(*loaded, "hi", max_tokens=1, **{name: None})


def test_unknown_options_are_a_type_error(loaded: Loaded) -> None:
    with pytest.raises(TypeError, match="temprature"):
        generate(*loaded, "hi", temprature=1.0)


def test_text_token_ids_and_arrays_are_prompts(loaded: Loaded) -> None:
    _, tokenizer = loaded
    text = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
    ids = tokenizer.encode(text, add_special_tokens=False)
    answers = {generate(*loaded, prompt, max_tokens=8) for prompt in (text, ids, mx.array(ids))}
    assert len(answers) == 1


def test_a_plain_transformers_tokenizer_is_wrapped(loaded: Loaded) -> None:
    model, tokenizer = loaded
    # Its detokenizer is mlx-lm's slow one, which keeps a leading space.
    text = generate(model, tokenizer._tokenizer, "hello", max_tokens=6)
    assert text.strip() == generate(model, tokenizer, "hello", max_tokens=6).strip()


def test_mlx_lm_samplers_and_processors_run(loaded: Loaded) -> None:
    # The names that a script for mlx-lm passes.
    text = generate(
        *loaded,
        prompt="hello",
        max_tokens=12,
        sampler=make_sampler(temp=0.8, top_p=0.9, top_k=5),
        logits_processors=make_logits_processors(logit_bias={5: 1.0}, repetition_penalty=1.1),
        prompt_progress_callback=lambda done, total: None,
        prefill_step_size=4,
    )
    assert isinstance(text, str)


def test_unseeded_sampling_follows_mlx_random_seed(loaded: Loaded) -> None:
    texts = []
    for seed in (1, 1, 2):
        mx.random.seed(seed)
        texts.append(generate(*loaded, "def", max_tokens=20, temperature=1.0, mtp="off"))
    assert texts[0] == texts[1] != texts[2]


def test_a_seed_makes_depths_equal(loaded: Loaded) -> None:
    texts = {
        generate(*loaded, "def", max_tokens=20, temperature=1.0, seed=4, mtp=mtp) for mtp in ("off", 1, 3)
    }
    assert len(texts) == 1


def test_a_prompt_cache_takes_only_new_tokens(loaded: Loaded) -> None:
    model, tokenizer = loaded
    # mlx-lm's helper asks the model.
    cache = make_prompt_cache(model)
    first, second = tokenizer.encode("def first(", add_special_tokens=False), [7, 8, 9]
    tokens = [r.token for r in stream_generate(model, tokenizer, first, max_tokens=10, prompt_cache=cache)]
    again = [r.token for r in stream_generate(model, tokenizer, second, max_tokens=10, prompt_cache=cache)]
    cold = [*first, *tokens, *second]
    assert again == [r.token for r in stream_generate(model, tokenizer, cold, max_tokens=10)]


def test_another_cache_is_refused(loaded: Loaded) -> None:
    with pytest.raises(RequestError) as caught:
        generate(*loaded, "hi", prompt_cache=[None])
    assert caught.value.field == "prompt_cache"


def test_an_end_token_ends_the_text_and_is_not_printed(loaded: Loaded) -> None:
    model, tokenizer = loaded
    end = next(iter(model.config.eos_token_ids))

    def end_after_three(tokens: mx.array, logits: mx.array) -> mx.array:
        forced = mx.arange(logits.shape[-1]) == end
        return mx.where(forced, 1e9, logits) if len(tokens) >= len(prompt) + 3 else logits

    prompt = tokenizer.encode("def", add_special_tokens=False)
    for mtp in ("off", 3):
        cache = model.make_cache()
        responses = list(
            stream_generate(
                model,
                tokenizer,
                prompt,
                max_tokens=50,
                mtp=mtp,
                lookup=False,
                logits_processors=[end_after_three],
                prompt_cache=cache,
            )
        )
        assert [r.finish_reason for r in responses] == [None, None, None, "stop"]
        assert responses[-1].token == end and responses[-1].generation_tokens == 4
        assert cache.pending == [end] and cache.offset == len(prompt) + 3
        assert "".join(r.text for r in responses) == tokenizer.decode([r.token for r in responses[:-1]])


def test_leaving_the_loop_early_leaves_the_cache_there(loaded: Loaded) -> None:
    model, tokenizer = loaded
    cache, tokens = model.make_cache(), []
    stream = stream_generate(model, tokenizer, [5, 6, 7], max_tokens=50, prompt_cache=cache, mtp=3)
    for response in stream:
        tokens.append(response.token)
        if len(tokens) == 6:
            break
    stream.close()
    assert [*cache.tokens, *cache.pending] == [5, 6, 7, *tokens]


def test_statistics_come_with_every_response(loaded: Loaded) -> None:
    *_, last = stream_generate(*loaded, "def f(x):", max_tokens=20, mtp=2, lookup=False)
    stats = json.loads(json.dumps(last.stats.as_json()))
    assert stats["forward_passes"] <= 20
    assert len(stats["drafted"]["mtp"]) == 2
    assert stats["mtp_off_reason"] is None
    *_, last = stream_generate(*loaded, "def f(x):", max_tokens=3, mtp="off")
    assert last.stats.reason_off and not last.from_draft


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("mtp", 4),
        ("mtp", -1),
        ("temperature", -1.0),
        ("max_tokens", 0),
        ("top_p", 2.0),
        ("prefill_step_size", 0),
    ],
)
def test_bad_values_are_refused_at_once(loaded: Loaded, option: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        stream_generate(*loaded, "hi", **{option: value})
    assert caught.value.field == option


def test_verbose_prints_text_and_summary(loaded: Loaded, capsys: pytest.CaptureFixture[str]) -> None:
    text = generate(*loaded, "def f(x):", max_tokens=10, mtp=1, lookup=False, verbose=True)
    output = capsys.readouterr().out
    assert text in output
    for word in ("Prompt:", "Generation:", "Passes:", "Drafts (mtp):", "Peak memory:"):
        assert word in output
    # Every pass is a round, and every round of one depth drafted once.
    rounds = dict(part.split() for part in re.findall(r"Rounds by depth: (.*)", output)[0].split(", "))
    assert set(rounds) == {"plain-0", "mtp-1"}
    assert f"Drafts (mtp): {rounds['mtp-1']} by depth" in output


def test_load_gives_the_config_on_request(tiny_path: Path) -> None:
    with pytest.raises(RequestError):
        load(tiny_path / "nothing")
    with pytest.raises(RequestError, match="adapter_path"):
        load("nano", adapter_path="somewhere")
    _, tokenizer, config = load("nano", lazy=True, return_config=True, trust_remote_code=True)
    assert config["model_type"] == "step3p5"
    assert set(config["eos_token_id"]) <= set(tokenizer.eos_token_ids)


def test_generate_is_a_function_whatever_was_imported() -> None:
    import mlx_step35.generate as imported

    assert callable(mlx_step35.generate) and callable(imported)


@pytest.mark.parametrize(
    "prompt", [[0, 5, 2048], [0, 5, -1], [0, 5.7], mx.array([[0, 5]]), mx.array([0.5, 1.0]), ["a"]]
)
def test_prompts_that_are_no_tokens_of_this_model(loaded: Loaded, prompt: Any) -> None:
    """MLX reads beyond the embedding for an unknown id, so it must never get there."""
    model, tokenizer = loaded
    with pytest.raises(RequestError) as error:
        generate(model, tokenizer, prompt, max_tokens=2)
    assert error.value.field == "prompt"


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 2.5},
        {"seed": "a"},
        {"temperature": "1"},
        {"top_k": 1.5},
        {"prefill_step_size": True},
    ],
)
def test_options_of_another_type_are_refused_by_name(loaded: Loaded, options: dict[str, Any]) -> None:
    model, tokenizer = loaded
    with pytest.raises(RequestError) as error:
        generate(model, tokenizer, [0, 5], **options)
    assert [error.value.field] == list(options)


def test_an_unknown_dtype_and_defaults_of_mlx_lm() -> None:
    with pytest.raises(RequestError, match="dtype must be auto"):
        load("nano", dtype="int8")
    model, tokenizer = load("nano", model_config={})
    text = generate(model, tokenizer, [0, 5], max_tokens=2, kv_group_size=64, quantized_kv_start=0)
    assert text == generate(model, tokenizer, [0, 5], max_tokens=2)


def test_a_temperature_next_to_nothing_is_greedy(loaded: Loaded) -> None:
    model, tokenizer = loaded
    texts = {
        generate(model, tokenizer, "Hello", max_tokens=8, temperature=t, seed=1) for t in (0, 1e-45, 1e-7)
    }
    assert len(texts) == 1
