"""Answers in every dialect: a stream joins to the whole answer, whatever pieces it came in."""

import json
from typing import Any

import pytest
from anthropic.types import ErrorResponse
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.responses import Response

from mlx_step35.api import anthropic_answers, openai_answers, responses_answers
from mlx_step35.api.failures import Failure
from mlx_step35.api.responses import parse_response
from mlx_step35.api.sse import to_json
from mlx_step35.api.types import Choice, Identity, TokenLogprob, Usage
from mlx_step35.chat.output import (
    ContentDelta,
    Delta,
    ParsedOutput,
    ReasoningDelta,
    ToolCall,
    ToolCallArguments,
    ToolCallStart,
)

IDENTITY = Identity("id_1", "m", 1)
USAGE = Usage(10, 5, 4, 2)
TEXT = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=5)


@st.composite
def answers(draw: st.DrawFn) -> tuple[ParsedOutput, list[Delta]]:
    """An answer and the deltas it may come in."""
    thoughts, texts = draw(st.lists(TEXT, max_size=3)), draw(st.lists(TEXT, max_size=3))
    arguments = draw(st.lists(st.dictionaries(TEXT, TEXT, max_size=2), max_size=2))
    deltas: list[Delta] = [*map(ReasoningDelta, thoughts), *map(ContentDelta, texts)]
    calls = []
    for index, values in enumerate(arguments):
        text = json.dumps(values)
        cut = draw(st.integers(0, len(text)))
        calls.append(ToolCall(f"call_{index}", "f", text))
        deltas.append(ToolCallStart(index, f"call_{index}", "f"))
        deltas += [ToolCallArguments(index, piece) for piece in (text[:cut], text[cut:])]
    reason = "tool_calls" if calls else "stop"
    output = ParsedOutput("".join(texts) or None, "".join(thoughts) or None, tuple(calls), reason)
    return output, deltas


def data_of(stream: bytes) -> list[Any]:
    lines = [line for line in stream.decode().split("\n") if line.startswith("data: ")]
    return [json.loads(line[6:]) for line in lines if line != "data: [DONE]"]


def written(writer: Any, output: ParsedOutput, deltas: list[Delta]) -> list[Any]:
    choice = Choice(output, output.finish_reason)  # type: ignore[arg-type]
    parts = [writer.start(USAGE), *(writer.write(0, [delta], ()) + writer.keepalive() for delta in deltas)]
    return data_of(b"".join([*parts, writer.finish(0, choice), writer.close(USAGE)]))


@settings(max_examples=60, deadline=None)
@given(answers())
def test_chat_streams_join_to_the_whole(answer: tuple[ParsedOutput, list[Delta]]) -> None:
    output, deltas = answer
    chunks = written(openai_answers.ChatWriter(IDENTITY, includes_usage=True), output, deltas)
    parts = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    choice = Choice(output, output.finish_reason)  # type: ignore[arg-type]
    whole = openai_answers.chat_completion(IDENTITY, [choice], USAGE)["choices"][0]["message"]
    assert "".join(part.get("content", "") for part in parts) == (whole["content"] or "")
    assert "".join(part.get("reasoning", "") for part in parts) == whole.get("reasoning", "")
    calls: list[dict[str, Any]] = []
    for part in parts:
        for piece in part.get("tool_calls", ()):
            if "id" in piece:
                calls.append({"id": piece["id"], "name": piece["function"]["name"], "arguments": ""})
            calls[piece["index"]]["arguments"] += piece["function"]["arguments"]
    assert calls == [{"id": call["id"], **call["function"]} for call in whole.get("tool_calls", ())]
    assert chunks[-1]["usage"]["total_tokens"] == 15


@settings(max_examples=60, deadline=None)
@given(answers(), st.booleans())
def test_message_streams_join_to_the_whole(answer: tuple[ParsedOutput, list[Delta]], shows: bool) -> None:
    output, deltas = answer
    events = written(anthropic_answers.MessageWriter(IDENTITY, shows_thinking=shows), output, deltas)
    blocks: list[dict[str, Any]] = []
    for event in events:
        if event["type"] == "content_block_start":
            assert event["index"] == len(blocks)
            blocks.append({**event["content_block"], "json": ""})
        elif event["type"] == "content_block_delta":
            delta, block = event["delta"], blocks[event["index"]]
            for name in ("text", "thinking", "signature"):
                if name in delta:
                    block[name] += delta[name]
            block["json"] += delta.get("partial_json", "")
    for block in blocks:
        arguments = block.pop("json")
        if block["type"] == "tool_use":
            block["input"] = json.loads(arguments)
    choice = Choice(output, output.finish_reason)  # type: ignore[arg-type]
    whole = anthropic_answers.message(IDENTITY, choice, USAGE, shows_thinking=shows)
    assert blocks == whole["content"]
    assert events[-2]["usage"] == whole["usage"] and events[-1]["type"] == "message_stop"


@settings(max_examples=60, deadline=None)
@given(answers())
def test_response_streams_end_with_the_whole(answer: tuple[ParsedOutput, list[Delta]]) -> None:
    output, deltas = answer
    request = parse_response({"model": "m", "input": "hi"})
    events = written(responses_answers.ResponseWriter(IDENTITY, request), output, deltas)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    last = events[-1]["response"]
    assert last["output"] == done and last["status"] == "completed"
    choice = Choice(output, output.finish_reason)  # type: ignore[arg-type]
    whole = responses_answers.response(IDENTITY, request, choice, USAGE)
    assert last["output"] == whole["output"]
    Response.model_validate(whole, strict=True)


def test_the_item_that_a_limit_cuts_is_incomplete() -> None:
    request = parse_response({"model": "m", "input": "hi"})
    kinds = {"reasoning": "a", "content": "b"}
    for num_kinds, statuses in ((0, ["incomplete"]), (1, ["incomplete"]), (2, ["completed", "incomplete"])):
        parts: dict[str, Any] = {"reasoning": None, "content": None} | dict([*kinds.items()][:num_kinds])
        output = ParsedOutput(parts["content"], parts["reasoning"], (), "length")
        whole = responses_answers.response(IDENTITY, request, Choice(output, "length"), USAGE)
        validated = Response.model_validate(whole)
        assert validated.status == "incomplete"
        assert [item.status for item in validated.output if hasattr(item, "status")] == statuses


def test_a_response_says_again_what_was_asked() -> None:
    schema = {"type": "object", "properties": {}}
    formats: list[Any] = [
        {"type": "json_object"},
        {"type": "json_schema", "name": "n", "schema": schema, "strict": True},
    ]
    for form in formats:
        asked = {
            "instructions": "Be brief.",
            "metadata": {"key": "value"},
            "reasoning": {"effort": "low", "summary": "auto"},
            "text": {"format": form, "verbosity": "low"},
        }
        request = parse_response({"model": "m", "input": "hi", **asked})
        choice = Choice(ParsedOutput("{}", None, (), "stop"), "stop")
        response = Response.model_validate(responses_answers.response(IDENTITY, request, choice, USAGE))
        said = response.model_dump(by_alias=True, include=set(asked), exclude_unset=True)
        assert said == asked


def test_input_tokens_add_up_in_anthropics_usage() -> None:
    usage = anthropic_answers.usage_json(USAGE)
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == 10


def test_failures_speak_the_dialect_of_the_stream() -> None:
    failure = Failure(500, "broken")
    assert (
        data_of(openai_answers.ChatWriter(IDENTITY).fail(failure, "req_1"))[0]["error"]["message"] == "broken"
    )
    writer = anthropic_answers.MessageWriter(IDENTITY, shows_thinking=True)
    last = writer.fail(failure, "req_1")
    assert last.startswith(b"event: error\n") and not writer.must_break_off
    assert ErrorResponse.model_validate(data_of(last)[0]).request_id == "req_1"
    response = responses_answers.ResponseWriter(IDENTITY, parse_response({"model": "m", "input": "hi"}))
    assert data_of(response.fail(failure, "req_1"))[0]["response"]["error"]["message"] == "broken"


@pytest.mark.parametrize(("status", "dialect", "expected"), [(503, "openai", 503), (503, "anthropic", 529)])
def test_overload_has_the_status_that_clients_retry(status: int, dialect: Any, expected: int) -> None:
    assert Failure(status, "full").status_for(dialect) == expected


def test_impossible_tokens_and_lone_surrogates_are_valid_json() -> None:
    choice = Choice(ParsedOutput("a", None, (), "stop"), "stop", None, (TokenLogprob(b"a", float("-inf")),))
    body = to_json(openai_answers.chat_completion(IDENTITY, [choice], USAGE))
    assert b"Infinity" not in body and b"-9999.0" in body
    assert json.loads(to_json({"a": "\ud800"})) == {"a": "?"}
