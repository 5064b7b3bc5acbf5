"""Through the real server on a scripted engine: own turns are continued, whatever the client made of them."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.server.running import Running, running

ARGUMENTS = {"path": "a b.txt", "deep": True, "n": 3}
ASK = f"[tool read_file {json.dumps(ARGUMENTS)}]"
SCHEMA = {
    "type": "object",
    "properties": {"path": {"type": "string"}, "deep": {"type": "boolean"}, "n": {"type": "integer"}},
}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as one:
        yield one


def post(server: Running, path: str, body: dict[str, Any]) -> dict[str, Any]:
    response = server.post(path, {"model": "claude-x", **body})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def chat(server: Running, messages: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    tool = {"type": "function", "function": {"name": "read_file", "parameters": SCHEMA}}
    answer = post(server, "/v1/chat/completions", {"messages": messages, "tools": [tool]})
    return answer["choices"][0]["message"], answer["usage"]


def test_a_chat_loop_continues_its_own_turns(server: Running) -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": f"{ASK} in chat"}]
    covered = 0
    for number in range(4):
        message, usage = chat(server, messages)
        assert usage["prompt_tokens_details"]["cached_tokens"] >= covered
        # All but the token that ended the turn, and the newest one before it.
        covered = usage["prompt_tokens"] + usage["completion_tokens"] - 2
        (call,) = message["tool_calls"]
        assert json.loads(call["function"]["arguments"]) == ARGUMENTS
        # As clients do: no thinking, other spelling, other order.
        arguments = json.dumps(dict(reversed(ARGUMENTS.items())), separators=(",", ":"))
        function = {"name": "read_file", "arguments": arguments}
        messages.append(
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{**call, "function": function}],
            }
        )
        messages.append({"role": "tool", "tool_call_id": call["id"], "content": f"line {number}"})


def test_a_loop_of_messages_continues_its_own_turns(server: Running) -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": f"{ASK} in messages"}]
    covered = 0
    for number in range(4):
        body = {
            "max_tokens": 500,
            "system": [
                {"type": "text", "text": f"x-anthropic-billing-header: cc_version=2; cch={number:05x};"},
                {"type": "text", "text": "You are an agent."},
            ],
            "tools": [{"name": "read_file", "input_schema": SCHEMA}],
            "messages": messages,
        }
        answer = post(server, "/v1/messages", body)
        usage = answer["usage"]
        assert usage["cache_read_input_tokens"] >= covered
        covered = usage["input_tokens"] + usage["cache_read_input_tokens"] + usage["output_tokens"] - 2
        calls = [block for block in answer["content"] if block["type"] == "tool_use"]
        assert [call["input"] for call in calls] == [ARGUMENTS]
        messages.append({"role": "assistant", "content": calls})
        result = [{"type": "text", "text": f"line {number}", "cache_control": {"type": "ephemeral"}}]
        messages.append(
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": calls[0]["id"], "content": result}],
            }
        )


def test_a_changed_call_is_rendered_anew(server: Running) -> None:
    question = {"role": "user", "content": f"{ASK} to be changed"}
    message, usage = chat(server, [question])
    function = {"name": "read_file", "arguments": '{"path": "other.txt"}'}
    call = {**message["tool_calls"][0], "function": function}
    changed = {"role": "assistant", "content": "", "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": call["id"], "content": "line"}
    _, second = chat(server, [question, changed, result])
    cached = second["prompt_tokens_details"]["cached_tokens"]
    assert 0 < cached <= usage["prompt_tokens"]


def test_metrics_say_what_limited_the_prefix(server: Running) -> None:
    text = server.get("/metrics").text
    assert "mlx_step35_prompt_reuse_total{limited_by=" in text
