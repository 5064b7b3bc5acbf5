"""Rendering: the model's structure, the traps that templates keep silent about, and text that stays text."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_step35.chat.messages import normalize_messages
from mlx_step35.chat.output import parse_output
from mlx_step35.chat.segments import Controls
from mlx_step35.chat.template import ChatTemplate
from mlx_step35.chat.tokenizer import Tokenizer
from mlx_step35.errors import CheckpointError, RequestError
from tests.chat.conftest import BOS, PLAIN, SPECIAL

GENERATION = "<|im_start|>assistant\n<think>\n"
READ_FILE = {
    "type": "function",
    "function": {
        "name": "read_file",
        "description": "",
        "parameters": {
            "type": "object",
            "properties": {"path": {"type": "string"}, "limit": {"type": "integer"}},
            "required": ["path"],
        },
    },
}


def call(name: str, arguments: Any, call_id: str = "c1") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def test_arguments_as_text_or_object_and_every_empty_content(template: ChatTemplate) -> None:
    texts = set()
    for arguments in (
        '{"path": "a.py", "limit": 5}',
        '{"path":"a.py","limit":5}',
        {"path": "a.py", "limit": 5},
    ):
        for content in ({"content": None}, {}, {"content": ""}, {"content": "\n"}):
            messages = [
                user("hi"),
                {"role": "assistant", **content, "tool_calls": [call("read_file", arguments)]},
                {"role": "tool", "tool_call_id": "c1", "content": "X"},
            ]
            texts.add(template.render(messages, [READ_FILE]).text)
    (text,) = texts
    assert text.endswith(
        "<tool_call>\n<function=read_file>\n<parameter=path>\na.py\n</parameter>\n<parameter=limit>\n5\n"
        "</parameter>\n</function>\n</tool_call><|im_end|>\n<|im_start|>tool_response\n"
        "<tool_response>X</tool_response><|im_end|>\n" + GENERATION
    )


def written(name: str, **values: str) -> str:
    parameters = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"


@pytest.mark.parametrize(
    "raw",
    [
        "Look.\n</think>\n" + written("read_file", path="a.py"),
        "Look.\n\n</think>\nText:\n"
        + written("read_file", path="\n x \n")
        + written("read_file", path="b", limit="3"),
        "a\n</think>\n\n\nBody\n",
        "a\n</think>\n```\n<tool_call>\n```\nx",
    ],
)
def test_what_was_parsed_renders_to_the_same_bytes(template: ChatTemplate, raw: str) -> None:
    history = [user("read it")]
    parsed = parse_output(raw, [READ_FILE])
    message: dict[str, Any] = {
        "role": "assistant",
        "content": parsed.content,
        "reasoning_content": parsed.reasoning,
        "tool_calls": [call(item.name, item.arguments, item.id) for item in parsed.tool_calls],
    }
    before = template.render(history, [READ_FILE]).text
    after = template.render([*history, message], [READ_FILE], add_generation_prompt=False).text
    assert after == before + raw + "<|im_end|>\n"


def test_developer_joins_the_system_message(template: ChatTemplate) -> None:
    messages = [{"role": "system", "content": "S"}, {"role": "developer", "content": "D"}, user("hi")]
    assert template.render(messages).text == (
        f"{BOS}<|im_start|>system\nS\n\nD<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n{GENERATION}"
    )
    later = [user("a"), {"role": "developer", "content": [{"type": "text", "text": "D"}]}, user("b")]
    assert "<|im_start|>system\nD<|im_end|>\n" in template.render(later).text


def test_thoughts_under_both_names(template: ChatTemplate) -> None:
    texts = set()
    for name in ("reasoning", "reasoning_content"):
        messages = [
            user("q"),
            {"role": "assistant", "content": "", name: "KEEP", "tool_calls": [call("read_file", "{}")]},
            {"role": "tool", "tool_call_id": "c1", "content": "R"},
        ]
        texts.add(template.render(messages).text)
    (text,) = texts
    assert (
        "<|im_start|>assistant\n<think>\nKEEP\n</think>\n<tool_call>\n<function=read_file>\n</function>\n"
        "</tool_call><|im_end|>" in text
    )
    assert "KEEP" not in template.render([*messages, {"role": "assistant", "content": "A"}, user("n")]).text


def test_a_closer_in_the_answer_does_not_cut_it(template: ChatTemplate) -> None:
    messages = [user("q"), {"role": "assistant", "content": "The tag </think> ends it."}, user("n")]
    assert "<|im_start|>assistant\nThe tag </think> ends it.<|im_end|>" in template.render(messages).text


def test_results_follow_the_order_of_their_calls(template: ChatTemplate) -> None:
    messages = [
        user("q"),
        {"role": "assistant", "tool_calls": [call("read_file", {}, "a"), call("read_file", {}, "b")]},
        {"role": "tool", "tool_call_id": "b", "content": "second"},
        {"role": "tool", "tool_call_id": "x", "content": "orphan"},
        {"role": "tool", "tool_call_id": "a", "content": "first"},
    ]
    assert (
        "<tool_response>first</tool_response><tool_response>second</tool_response>"
        "<tool_response>orphan</tool_response><|im_end|>" in template.render(messages).text
    )


def test_a_list_is_its_text(template: ChatTemplate) -> None:
    parts = [
        {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}},
        {"type": "input_text", "text": "b"},
    ]
    assert template.render([user(parts)]).text == template.render([user("ab")]).text


def test_an_image_in_a_result_is_named(template: ChatTemplate) -> None:
    image = {"type": "image", "source": {"type": "base64", "data": "iVBORw0KGgo="}}
    odd = {"type": "tool_reference", "name": "x"}
    messages = [user("q"), {"role": "tool", "content": [{"type": "text", "text": "see "}, image, odd]}]
    assert "<tool_response>see [image omitted][tool_reference omitted]</tool_response>" in (
        template.render(messages).text
    )


IMAGE = [{"type": "text", "text": "x"}, {"type": "image_url"}]
PART = "messages[0].content[0]"
CALL = "messages[0].tool_calls[0].function"


def assistant(**fields: Any) -> list[dict[str, Any]]:
    return [{"role": "assistant", **fields}]


@pytest.mark.parametrize(
    ("messages", "field", "code"),
    [
        ([], "messages", "empty_array"),
        (None, "messages", "invalid_type"),
        ("x", "messages", "invalid_type"),
        ([5], "messages[0]", "invalid_type"),
        ([{"role": "foo", "content": "x"}], "messages[0].role", "invalid_value"),
        ([{"content": "x"}], "messages[0].role", "invalid_value"),
        ([user("a"), user(IMAGE)], "messages[1].content[1]", "unsupported_content_type"),
        ([user([{"type": "input_audio"}])], PART, "unsupported_content_type"),
        ([user([{"type": "nonsense"}])], PART, "unsupported_content_type"),
        ([user([{"type": ["text"]}])], PART, "unsupported_content_type"),
        ([user(5)], "messages[0].content", "invalid_type"),
        ([user([{"type": "text", "text": 5}])], f"{PART}.text", "invalid_type"),
        (assistant(tool_calls=[call("f", "{")]), f"{CALL}.arguments", "invalid_value"),
        (assistant(tool_calls=[call("f", "[1]")]), f"{CALL}.arguments", "invalid_type"),
        (assistant(tool_calls=[{}]), CALL, "invalid_type"),
        (assistant(tool_calls="x"), "messages[0].tool_calls", "invalid_type"),
        (assistant(function_call={"name": "f"}), "messages[0].function_call", "unsupported_parameter"),
    ],
)
def test_what_is_refused_is_named(messages: Any, field: str, code: str) -> None:
    with pytest.raises(RequestError) as caught:
        normalize_messages(messages)
    assert caught.value.field == field
    assert caught.value.code == code
    assert field in str(caught.value)


def test_nulls_and_unknown_keys_are_ignored(template: ChatTemplate) -> None:
    messages = [
        {"id": None, "role": "system", "content": "s", "tool_calls": [], "extra_info": None},
        {"role": "user", "content": "hi", "name": "bob"},
        {
            "role": "assistant",
            "content": None,
            "reasoning": "r",
            "function_call": None,
            "tool_calls": [call("f", "")],
        },
        {"role": "tool", "tool_call_id": "c1", "content": None},
    ]
    assert "<tool_response></tool_response>" in template.render(messages).text


def test_switching_thinking_off(template: ChatTemplate) -> None:
    on = template.render([user("q")])
    assert on.starts_in_reasoning
    assert on.text.endswith("<think>\n")
    for switch in ({"enable_thinking": False}, {"reasoning_effort": "none"}):
        off = template.render([user("q")], variables=switch)
        assert off.text == on.text + "\n</think>\n"
        assert not off.starts_in_reasoning
    assert template.render([user("q")], variables={"reasoning_effort": "high"}).text == on.text


def test_a_template_that_knows_the_switch_prints_it_itself() -> None:
    knowing = ChatTemplate(
        "{{ messages[0].content }}{{ reasoning_effort }}<think>\n"
        "{% if enable_thinking is false %}off</think>\n{% endif %}",
        {},
    )
    assert knowing.variables >= {"enable_thinking", "reasoning_effort"}
    assert (
        knowing.render([user("q")], variables={"enable_thinking": False, "reasoning_effort": "low"}).text
        == "qlow<think>\noff</think>\n"
    )
    assert (
        knowing.render([user("q")], variables={"reasoning_effort": "none"}).text
        == "qnone<think>\noff</think>\n"
    )


def test_conventions_of_transformers() -> None:
    source = (
        "{% for m in messages %}\n    {% if loop.index > 1 %}{% break %}{% endif %}\n"
        "{% generation %}{{ m.content | tojson }}{% endgeneration %}\n{% endfor %}\n"
        "{{ strftime_now('%Y')[:2] }}"
    )
    text = ChatTemplate(source, {}).render([user("<é&'>"), user("b")]).text
    assert text == '"<é&\'>"20'
    with pytest.raises(RequestError, match="no tools here"):
        ChatTemplate("{{ raise_exception('no tools here') }}", {}).render([user("q")])
    with pytest.raises(RequestError):
        ChatTemplate("{{ messages.__class__.__mro__[1].__subclasses__() }}", {}).render([user("q")])
    with pytest.raises(CheckpointError, match="cannot be read"):
        ChatTemplate("{% if %}", {})


# Text safety


def control_ids(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    names = {tokenizer.token_id(text): text for text in [*SPECIAL, *PLAIN]}
    return [names[token] for token in ids if token in names]


PIECES = st.sampled_from(
    [
        *SPECIAL,
        *PLAIN,
        "<|im_",
        "end|>",
        "<",
        ">",
        "</think",
        "<tool_response",
        "/",
        "\n",
        " ",
        "hi",
        "你",
        "\ue000",
        "\ud800",
    ]
)
TEXTS = st.lists(PIECES, max_size=6).map("".join)


def conversation(texts: list[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    a, b, c, d, e, f, g, h = texts
    messages = [
        {"role": "system", "content": a},
        user([{"type": "text", "text": b}, {"type": "text", "text": c}]),
        {
            "role": "assistant",
            "content": d,
            "reasoning_content": e,
            "tool_calls": [call("n" + f, {"k" + g: h, "list": [a, {b: c}]}), call("m", {"z": d})],
        },
        {"role": "tool", "tool_call_id": "c1", "content": g},
        {"role": "tool", "tool_call_id": "c1", "content": h},
    ]
    tools = [
        {
            "type": "function",
            "function": {"name": "t", "description": a, "parameters": {"properties": {f: {}}}},
        }
    ]
    return messages, tools


@settings(max_examples=100, deadline=None)
@given(st.lists(TEXTS, min_size=8, max_size=8))
def test_supplied_text_never_becomes_control_tokens(
    template: ChatTemplate, tokenizer: Tokenizer, texts: list[str]
) -> None:
    messages, tools = conversation(texts)
    rendered = template.render(messages, tools)
    ids = tokenizer.encode_rendered(rendered)
    assert tokenizer.decode(ids) == rendered.text
    quiet_messages, quiet_tools = conversation(["x"] * 8)
    quiet = tokenizer.encode(template.render(quiet_messages, quiet_tools).text)
    assert control_ids(tokenizer, ids) == control_ids(tokenizer, quiet)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(max_size=20), min_size=8, max_size=8))
def test_other_text_is_tokenised_as_a_whole(
    template: ChatTemplate, tokenizer: Tokenizer, texts: list[str]
) -> None:
    messages, tools = conversation(texts)
    rendered = template.render(messages, tools)
    if not any(control in text for control in [*SPECIAL, *PLAIN] for text in texts):
        assert tokenizer.encode_rendered(rendered) == tokenizer.encode(rendered.text)


def test_text_around_a_control_string_keeps_its_merges(template: ChatTemplate, tokenizer: Tokenizer) -> None:
    rendered = template.render([user("The fox <|im_end|> jumps")])
    assert rendered.text.count("The fox <|im_end|> jumps<|im_end|>\n") == 1
    ids = tokenizer.encode_rendered(rendered)
    start = tokenizer.encode(f"{BOS}<|im_start|>")
    middle = tokenizer.encode_text("user\nThe fox <|im_end|> jumps")
    end = tokenizer.encode("<|im_end|>\n" + GENERATION)
    assert ids == start + middle + end


def test_a_wrapped_user_message_still_counts_as_a_result(template: ChatTemplate) -> None:
    plain = ChatTemplate(template.source, {"bos_token": BOS})
    messages = [
        user("q"),
        {"role": "assistant", "content": "", "reasoning_content": "KEEP"},
        user("<tool_response>R</tool_response>"),
    ]
    assert template.render(messages).text == plain.render(messages).text
    assert "KEEP" in template.render(messages).text


def test_json_strings_in_tools_are_printed_as_given(template: ChatTemplate) -> None:
    tool = {"type": "function", "function": {"name": "f", "description": 'é <b> "q" \'', "parameters": {}}}
    assert (
        "\n" + json.dumps(tool, ensure_ascii=False) + "\n</tools>"
        in template.render([user("q")], [tool]).text
    )


def test_the_longest_control_string_is_the_one_that_counts() -> None:
    strings = ["<a", "<a>", "<a><b>", "<c>", "x"]
    pattern = Controls(strings).pattern
    assert [match[0] for match in pattern.finditer("<a <a> <a><b <a><b> <c>x <")] == [
        "<a", "<a>", "<a>", "<a><b>", "<c>", "x",
    ]  # fmt: skip


def test_an_observation_keeps_its_role(template: ChatTemplate) -> None:
    messages = [user("q"), {"role": "system", "name": "observation", "content": "O"}]
    assert "<|im_start|>observation\nO<|im_end|>\n" in template.render(messages).text
