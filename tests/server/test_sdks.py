"""The official SDKs over a real socket: a question, a tool call, its result, an answer, streamed and not."""

import json
from typing import Any

import anthropic
import openai
import pytest

from tests.server.running import KEY, MODEL, Running

SCHEMA: Any = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
QUESTION = '[tool get_weather {"city": "Paris"}]'


@pytest.fixture
def openai_client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.base + "/v1", api_key=KEY, max_retries=0)


@pytest.fixture
def anthropic_client(server: Running) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.base, api_key=KEY, max_retries=0)


@pytest.mark.parametrize("is_stream", [False, True])
def test_openai_chat_with_a_tool(openai_client: openai.OpenAI, is_stream: bool) -> None:
    tools: Any = [{"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}}]
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    create = openai_client.chat.completions.create
    if is_stream:
        with openai_client.chat.completions.stream(model=MODEL, messages=messages, tools=tools) as stream:
            message = stream.get_final_completion().choices[0].message
    else:
        message = create(model=MODEL, messages=messages, tools=tools).choices[0].message
    assert message.tool_calls
    [call] = message.tool_calls
    assert call.type == "function" and json.loads(call.function.arguments) == {"city": "Paris"}
    messages += [
        message.model_dump(exclude_none=True, exclude={"parsed"}),
        {"role": "tool", "tool_call_id": call.id, "content": "18C"},
        {"role": "user", "content": "[say It is 18C.]"},
    ]
    for one in messages[1].get("tool_calls", ()):
        one["function"].pop("parsed_arguments", None)
    answer = create(model=MODEL, messages=messages, tools=tools)
    assert answer.choices[0].message.content == "It is 18C."
    assert answer.usage and answer.usage.prompt_tokens_details
    assert answer.usage.prompt_tokens_details.cached_tokens


@pytest.mark.parametrize("is_stream", [False, True])
def test_openai_responses_with_a_tool(openai_client: openai.OpenAI, is_stream: bool) -> None:
    tools: Any = [{"type": "function", "name": "get_weather", "parameters": SCHEMA, "strict": False}]
    history: list[Any] = [{"role": "user", "content": QUESTION}]
    if is_stream:
        with openai_client.responses.stream(model=MODEL, input=history, tools=tools) as stream:
            response: Any = stream.get_final_response()
    else:
        response = openai_client.responses.create(model=MODEL, input=history, tools=tools)
    calls = [item for item in response.output if item.type == "function_call"]
    assert json.loads(calls[0].arguments) == {"city": "Paris"}
    dumped = [item.model_dump(exclude_none=True, exclude={"parsed_arguments"}) for item in response.output]
    history += [
        *dumped,
        {"type": "function_call_output", "call_id": calls[0].call_id, "output": "18C"},
        {"role": "user", "content": "[say It is 18C.]"},
    ]
    answer = openai_client.responses.create(model=MODEL, input=history, tools=tools)
    assert answer.output_text == "It is 18C." and answer.status == "completed"


@pytest.mark.parametrize("is_stream", [False, True])
def test_anthropic_messages_with_a_tool(anthropic_client: anthropic.Anthropic, is_stream: bool) -> None:
    tools: Any = [{"name": "get_weather", "input_schema": SCHEMA}]
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    thinking: Any = {"type": "enabled", "budget_tokens": 1024}
    options: Any = {"model": MODEL, "max_tokens": 2000, "tools": tools, "thinking": thinking}
    if is_stream:
        with anthropic_client.messages.stream(messages=messages, **options) as stream:
            message = stream.get_final_message()
    else:
        message = anthropic_client.messages.create(messages=messages, **options)
    kinds = [block.type for block in message.content]
    assert kinds == ["thinking", "tool_use"] and message.stop_reason == "tool_use"
    call: Any = message.content[-1]
    assert call.input == {"city": "Paris"}
    messages += [
        {"role": "assistant", "content": [block.model_dump(exclude_none=True) for block in message.content]},
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": call.id, "content": "18C"},
                {"type": "text", "text": "[say It is 18C.]"},
            ],
        },
    ]
    answer = anthropic_client.messages.create(messages=messages, **options)
    text: Any = answer.content[-1]
    assert text.text == "It is 18C." and answer.usage.cache_read_input_tokens
    count = anthropic_client.messages.count_tokens(model=MODEL, messages=messages, tools=tools)
    assert count.input_tokens == answer.usage.input_tokens + answer.usage.cache_read_input_tokens


def test_errors_reach_the_sdks(openai_client: openai.OpenAI, anthropic_client: anthropic.Anthropic) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        openai_client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "x"}], temperature=9
        )
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        openai_client.chat.completions.create(model="nope", messages=[{"role": "user", "content": "x"}])
    with pytest.raises(anthropic.BadRequestError):
        anthropic_client.messages.create(model=MODEL, max_tokens=5, messages=[])
    with pytest.raises(openai.APIError):
        messages: Any = [{"role": "user", "content": "[fail]"}]
        list(openai_client.chat.completions.create(model=MODEL, messages=messages, stream=True))
    assert [model.id for model in openai_client.models.list()] == [MODEL]
    assert [model.id for model in anthropic_client.models.list()] == [MODEL]
