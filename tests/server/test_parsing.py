"""Requests of three dialects become one kind of request, or a refusal that names the field."""

from typing import Any

import pytest
from anthropic.types import (
    DocumentBlockParam,
    SearchResultBlockParam,
    ToolReferenceBlockParam,
)
from anthropic.types import message_create_params as message_params
from openai.types import completion_create_params as completion_params
from openai.types.chat import completion_create_params as chat_params
from openai.types.responses import response_create_params as response_params

from mlx_step35.api.anthropic import parse_messages
from mlx_step35.api.failures import bad_request, unknown_model
from mlx_step35.api.openai import parse_chat, parse_completion
from mlx_step35.api.responses import parse_response
from mlx_step35.api.sse import to_json
from mlx_step35.api.tables import CHAT, COMPLETIONS, MESSAGES, RESPONSES, FieldTable
from mlx_step35.api.types import Sampling, Thinking, ToolChoice
from mlx_step35.errors import RequestError
from mlx_step35.http.body import MAX_DEPTH, parse_json

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "d", "parameters": SCHEMA}}
HELLO = [{"role": "user", "content": "hi"}]


def chat(**fields: Any) -> Any:
    return parse_chat({"model": "m", "messages": HELLO, **fields})


def messages(**fields: Any) -> Any:
    return parse_messages({"model": "m", "max_tokens": 9, "messages": HELLO, **fields})


def response(**fields: Any) -> Any:
    return parse_response({"model": "m", "input": "hi", **fields})


def test_one_conversation_in_three_dialects_is_one_request() -> None:
    arguments = {"city": "Paris"}
    from_chat = chat(
        messages=[
            {"role": "system", "content": "Be brief."},
            *HELLO,
            {
                "role": "assistant",
                "content": "Let me see.",
                "reasoning": "A tool.",
                "tool_calls": [
                    {
                        "id": "1",
                        "type": "function",
                        "function": {"name": "get_weather", "arguments": '{"city":"Paris"}'},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": "1", "content": "18C"},
        ],
        tools=[TOOL],
    )
    from_messages = messages(
        system=[{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "A tool.", "signature": "s"},
                    {"type": "text", "text": "Let me see."},
                    {"type": "tool_use", "id": "1", "name": "get_weather", "input": arguments},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "18C"}]}
                ],
            },
        ],
        tools=[{"name": "get_weather", "description": "d", "input_schema": SCHEMA}],
    )
    from_response = response(
        instructions="Be brief.",
        input=[
            {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "A tool."}], "content": None},
            {
                "type": "message",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "Let me see."}],
            },
            {
                "type": "function_call",
                "call_id": "1",
                "name": "get_weather",
                "arguments": '{"city": "Paris"}',
            },
            {"type": "function_call_output", "call_id": "1", "output": "18C"},
        ],
        tools=[{"type": "function", **TOOL["function"], "strict": False}],
    )
    assert from_chat.messages == from_messages.messages == from_response.messages
    assert from_chat.tools == from_messages.tools == from_response.tools


@pytest.mark.parametrize(
    ("fields", "field", "code"),
    [
        ({"messages": None}, "messages", "missing_required_parameter"),
        ({"messages": "hi"}, "messages", "invalid_type"),
        ({"messages": []}, "messages", "empty_array"),
        ({"messages": [{"role": "robot", "content": ""}]}, "messages[0].role", "invalid_value"),
        ({"temperature": 2.1}, "temperature", "decimal_above_max_value"),
        ({"temperature": -1}, "temperature", "decimal_below_min_value"),
        ({"temperature": True}, "temperature", "invalid_type"),
        ({"max_tokens": 1.5}, "max_tokens", "invalid_type"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "integer_below_min_value"),
        ({"max_tokens": -(10**5000)}, "max_tokens", "integer_below_min_value"),
        ({"n": 0}, "n", "integer_below_min_value"),
        ({"stop": ["a"] * 5}, "stop", "array_above_max_length"),
        ({"stop": [""]}, "stop", "invalid_value"),
        ({"stop": 5}, "stop", "invalid_type"),
        ({"stream": "yes"}, "stream", "invalid_type"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "decimal_above_max_value"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]},
         "tools[0].function.parameters", "invalid_function_parameters"),
        ({"tools": [{"type": "function", "function": {"name": "f>"}}]},
         "tools[0].function.name", "invalid_value"),
        ({"tools": [{"type": "custom"}]}, "tools[0].type", "invalid_value"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": [TOOL]},
         "tool_choice", "invalid_value"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}},
         "response_format.json_schema.schema", "missing_required_parameter"),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
    ],
)  # fmt: skip
def test_chat_refusals_name_the_field(fields: dict[str, Any], field: str, code: str) -> None:
    with pytest.raises(RequestError) as caught:
        chat(**fields)
    assert (caught.value.field, caught.value.code) == (field, code)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages.0.content.0"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"tools": [{"name": "f"}]}, "tools.0.input_schema"),
        ({"tools": [{"name": "f", "input_schema": {"type": "array"}}]}, "tools.0.input_schema"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0.type"),
        ({"stop_sequences": "x"}, "stop_sequences"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"thinking": {"type": "always"}}, "thinking.type"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
    ],
)
def test_message_refusals_name_the_field(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError) as caught:
        messages(**fields)
    assert caught.value.field == field and field in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"input": [{"type": {"a": 1}}]}, "input[0].type"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"conversation": "c"}, "conversation"),
    ],
)
def test_response_refusals_name_the_field(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError) as caught:
        response(**fields)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("table", "name"),
    [(table, name) for table in (CHAT, COMPLETIONS, MESSAGES, RESPONSES) for name in table.refused],
)
def test_what_is_refused_is_refused_by_name(table: Any, name: str) -> None:
    with pytest.raises(RequestError, match=name):
        table.sort({name: {"set": 1}})
    for harmless in (None, *table.refused[name]):
        assert table.sort({name: harmless}) == ()


def test_unknown_fields_are_reported_and_known_ones_are_not() -> None:
    assert chat(zzz=1, store=True, metadata={}, prompt_cache_key="k").unknown_fields == ("zzz",)
    assert messages(zzz=1, context_management={}, safeguards=[]).unknown_fields == ("zzz",)
    assert response(zzz=1, include=[], client_metadata={}).unknown_fields == ("zzz",)


@pytest.mark.parametrize(
    ("table", "official"),
    [
        (CHAT, chat_params.CompletionCreateParamsBase),
        (COMPLETIONS, completion_params.CompletionCreateParamsBase),
        (MESSAGES, message_params.MessageCreateParamsBase),
        (RESPONSES, response_params.ResponseCreateParamsBase),
    ],
)
def test_every_official_field_is_in_a_table(table: FieldTable, official: Any) -> None:
    assert table.sort(dict.fromkeys(official.__annotations__)) == ()
    unnamed = official.__annotations__.keys() - table.served - table.ignored - table.refused.keys()
    assert not unnamed


def test_what_one_endpoint_serves_is_no_secret_to_another() -> None:
    every = (CHAT, COMPLETIONS, MESSAGES, RESPONSES)
    for name in frozenset[str]().union(*(table.served for table in every)):
        assert all(table.sort({name: None}) == () for table in every), name
    with pytest.raises(RequestError, match="max_tokens"):
        response(max_tokens=5)
    for parse in (chat, messages, response):
        for name in ("guided_json", "min_tokens", "stop_token_ids"):
            with pytest.raises(RequestError, match=name):
                parse(**{name: [7]})


def test_sampling_is_the_same_everywhere() -> None:
    asked: dict[str, Any] = {
        "temperature": 0.5,
        "top_p": 0.4,
        "top_k": 3,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": -0.3,
        "logit_bias": {"5": -10},
        "seed": 7,
    }
    expected = Sampling(**{**asked, "logit_bias": {5: -10.0}})
    completion = parse_completion({"model": "m", "prompt": "a", **asked, "max_completion_tokens": 4})
    for request in (chat(**asked), messages(**asked), response(**asked), completion):
        assert request.sampling == expected and not request.unknown_fields
    assert completion.max_tokens == 4
    assert response(stop="END").stop == chat(stop=["END"]).stop == ("END",)


def test_no_field_is_in_two_tables() -> None:
    for table in (CHAT, COMPLETIONS, MESSAGES, RESPONSES):
        names = [*table.served, *table.ignored, *table.refused]
        assert len(names) == len(set(names))


def test_choices_of_tools_in_three_dialects() -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    assert chat(tools=[TOOL], tool_choice=named).tool_choice == ToolChoice("named", "get_weather")
    tools = [{"name": "get_weather", "input_schema": SCHEMA}]
    choice = {"type": "tool", "name": "get_weather", "disable_parallel_tool_use": True}
    request = messages(tools=tools, tool_choice=choice)
    assert request.tool_choice == ToolChoice("named", "get_weather") and not request.has_parallel_calls
    functions = [{"type": "function", "name": "get_weather", "parameters": SCHEMA}, {"type": "web_search"}]
    request = response(tools=functions, tool_choice="required")
    assert request.tool_choice == ToolChoice("required") and len(request.tools) == 1


def test_thinking_in_three_dialects() -> None:
    assert not chat(reasoning_effort="none").thinking.is_on
    assert not chat(chat_template_kwargs={"enable_thinking": False}).thinking.is_on
    # ccr sends a contradiction; it means thinking.
    assert chat(reasoning={"effort": "high", "enabled": False}).thinking.is_on
    assert chat(max_thinking_tokens=7).thinking.budget == 7
    hidden = messages().thinking
    assert hidden.is_on and not hidden.is_shown
    assert messages(thinking={"type": "enabled", "budget_tokens": 2000}).thinking.budget == 2000
    assert messages(thinking={"type": "adaptive"}).thinking.is_shown
    assert not messages(thinking={"type": "disabled"}).thinking.is_on
    assert not response(reasoning={"effort": "none"}).thinking.is_on
    assert not chat(thinking={"type": "disabled"}).thinking.is_on
    assert chat(thinking={"type": "enabled", "budget_tokens": 9}).thinking == Thinking(budget=9)
    assert not chat(enable_thinking=False).thinking.is_on
    assert chat(enable_thinking=True).template_variables == {"enable_thinking": True}


def test_efforts_reach_the_template() -> None:
    asked = {"reasoning_effort": "low"}
    assert chat(reasoning_effort="low").template_variables == asked
    assert messages(output_config={"effort": "low"}).template_variables == asked
    assert response(reasoning={"effort": "low"}).template_variables == asked
    assert response().template_variables == messages().template_variables == {}


def test_what_a_history_loses_is_reported() -> None:
    items: list[Any] = [
        {"role": "user", "content": "hi"},
        {"type": "web_search_call", "id": "1"},
        {"type": "web_search_call", "id": "2"},
        {"type": "shell_call_output", "call_id": "1", "output": [{"stdout": "out", "stderr": "err"}]},
        {"type": "local_shell_call_output", "id": "2", "output": "text"},
        {"type": "computer_call_output", "call_id": "3", "output": {"type": "computer_screenshot"}},
    ]
    request = response(input=items)
    assert request.unknown_fields == ("input[].web_search_call",)
    results = [message["content"] for message in request.messages if message["role"] == "tool"]
    assert results == ["outerr", "text", "[computer_screenshot omitted]"]
    with pytest.raises(RequestError, match="web_search_call") as caught:
        response(input=items[1:2])
    assert caught.value.field == "input"
    block = {"type": "server_tool_use", "id": "1", "name": "web_search", "input": {}}
    turns = [{"role": "assistant", "content": [block, {"type": "redacted_thinking", "data": "x"}]}]
    assert messages(messages=[*HELLO, *turns]).unknown_fields == ("messages[].content[].server_tool_use",)


def test_results_keep_what_is_text() -> None:
    content: list[Any] = [
        ToolReferenceBlockParam(type="tool_reference", tool_name="get_weather"),
        SearchResultBlockParam(
            type="search_result", source="s", title="t", content=[{"type": "text", "text": "found"}]
        ),
        DocumentBlockParam(
            type="document", source={"type": "text", "media_type": "text/plain", "data": "page"}
        ),
        {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": ""}},
    ]
    result = {"type": "tool_result", "tool_use_id": "1", "content": content}
    text = messages(messages=[{"role": "user", "content": [result]}]).messages[-1]["content"]
    assert text == "[tool found: get_weather]foundpage[file omitted]"


@pytest.mark.parametrize(
    ("parse", "fields"),
    [
        (chat, {"messages": [{"role": "x" * 9999, "content": ""}]}),
        (chat, {"messages": [{"role": "user", "content": [{"type": "x" * 9999}]}]}),
        (chat, {"messages": [{"role": ["x"] * 9999, "content": ""}]}),
        (chat, {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x" * 9999}}}),
        (chat, {"logit_bias": {"x" * 9999: 1}}),
        (messages, {"messages": [{"role": "user", "content": [{"type": "x" * 9999}]}]}),
        (messages, {"tools": [{"type": "x" * 9999, "name": "f"}]}),
        (response, {"input": [{"type": "x" * 9999}]}),
        (response, {"input": [{"role": "x" * 9999, "content": ""}]}),
    ],
)
def test_refusals_do_not_repeat_long_texts(parse: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        parse(**fields)
    assert len(str(caught.value)) < 300
    assert len(to_json(bad_request(RequestError("x" * 9999, "y" * 9999), "openai").body("openai"))) < 1500


def test_the_name_of_an_unknown_model_is_cut() -> None:
    assert len(unknown_model("x" * 9999).message) < 300


def test_schemas_in_three_dialects() -> None:
    nested = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
    flat = {"type": "json_schema", "name": "a", "schema": SCHEMA}
    assert chat(response_format=nested).schema == SCHEMA
    assert chat(response_format={"type": "json_object"}).schema == {"type": "object"}
    assert messages(output_config={"effort": "high", "format": flat}).schema == SCHEMA
    assert response(text={"format": flat}).schema == SCHEMA
    assert chat(response_format={"type": "text"}).schema is None


def test_history_that_would_wedge_a_session_is_read() -> None:
    glued = '{"command": "a"}{"command": "b"}'
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": glued}}
    request = chat(messages=[*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}])
    assert request.messages[-1]["tool_calls"][0]["function"]["arguments"] == {"arguments": glued}
    inline = {"role": "assistant", "content": "<think>\nold\n</think>\n\nanswer"}
    message = chat(messages=[*HELLO, inline]).messages[-1]
    assert (message["reasoning_content"], message["content"]) == ("old", "answer")
    result = {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "image"}], "is_error": True}
    supplied = messages(messages=[{"role": "user", "content": [result]}]).messages[-1]
    assert supplied["content"] == "Error: [image omitted]"


def test_completions() -> None:
    request = parse_completion({"model": "m", "prompt": ["a", [1, 2]], "echo": True, "n": 2})
    assert request.prompts == ("a", (1, 2)) and request.echoes_prompt and request.max_tokens == 16
    for fields in ({"prompt": []}, {"prompt": [""]}, {"prompt": [[-1]]}, {"suffix": "x"}, {"best_of": 2}):
        with pytest.raises(RequestError):
            parse_completion({"model": "m", "prompt": "a", **fields})


def test_bodies_that_are_no_json_objects() -> None:
    deep = b'{"a":' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}"
    very_deep = b'{"a":' + b"[" * 2000 + b"]" * 2000 + b"}"
    for body in (b"", b"[]", b"null", b"{", b"\xff", b'{"a":NaN}', b"[" * 100_000, deep, very_deep):
        with pytest.raises(RequestError):
            parse_json(body)
    assert parse_json(b'{"a":"\\ud800"}')
