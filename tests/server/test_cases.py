"""The shared server cases: what a client sends, what the model writes, what must come back."""

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_step35.api.anthropic import parse_messages
from mlx_step35.api.openai import parse_chat
from tests.server.running import MODEL, Running, chat_body, running

CASES = {
    case["id"]: case
    for case in map(
        json.loads, (Path(__file__).parents[1] / "data" / "server.jsonl").read_text().splitlines()
    )
}
CHAT = "/v1/chat/completions"


def events(server: Running, path: str, body: dict[str, Any]) -> list[Any]:
    """Data of every event of a stream, "[DONE]" as it is."""
    with server.client.stream("POST", path, json={**body, "stream": True}) as response:
        lines = [line for line in response.iter_lines() if line.startswith("data: ")]
    return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


def rendered(server: Running, body: dict[str, Any]) -> str:
    prompt = server.preparer.prompt(parse_chat({"model": MODEL, **body}))
    return server.preparer.tokenizer.decode(prompt.ids)


def test_arguments_as_text_or_object_and_missing_content_are_one_prompt(server: Running) -> None:
    case = CASES["CASE01"]
    body = case["input"]["body"]
    text = rendered(server, body)
    # The bundled template prints a thinking block in front of the call, empty here; others print none.
    _, _, expected = case["expected"]["rendered_prompt_contains"].partition("<|im_start|>assistant\n")
    assert expected in text
    call = body["messages"][1]
    as_object = json.loads(json.dumps(body))
    function = as_object["messages"][1]["tool_calls"][0]["function"]
    function["arguments"] = json.loads(function["arguments"])
    assert rendered(server, as_object) == text
    for content in ({}, {"content": ""}):
        bare = {key: value for key, value in call.items() if key != "content"} | content
        messages = [body["messages"][0], bare, body["messages"][2]]
        assert rendered(server, {**body, "messages": messages}) == text
    assert server.post(CHAT, {"model": MODEL, **body}).status_code == 200


def test_developer_messages_are_system_text(server: Running) -> None:
    text = rendered(server, CASES["CASE04"]["input"])
    bos = server.preparer.tokenizer.bos_token or ""
    assert text == CASES["CASE04"]["expected"]["prompt"].replace("{bos}", bos)
    refused = server.post(CHAT, {"model": MODEL, "messages": [{"role": "foo", "content": "x"}]})
    assert refused.status_code == 400 and refused.json()["error"]["type"] == "invalid_request_error"


def test_two_calls_stream_in_order() -> None:
    case = CASES["CASE06"]
    with running(lambda conversation: case["input"]["scripted_output"]) as server:
        *chunks, done = events(server, CHAT, {"model": MODEL, **case["input"]["body"]})
    assert done == "[DONE]"
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    kinds = []
    arguments = {0: "", 1: ""}
    for delta in deltas:
        for call in delta.get("tool_calls", ()):
            arguments[call["index"]] += call["function"]["arguments"]
            if "id" in call:
                assert call["type"] == "function" and call["function"]["name"] == "read_file"
                kinds.append(f"call {call['index']}")
        kinds += [name for name in ("role", "reasoning_content") if name in delta]
        if delta.get("content"):
            kinds.append("content")
            assert delta["content"].strip()
            assert "<tool_call" not in delta["content"] and "<function=" not in delta["content"]
    assert kinds == ["role", "reasoning_content", "content", "call 0", "call 1"]
    assert json.loads(arguments[0]) == case["expected"]["arguments_0"]
    assert json.loads(arguments[1]) == case["expected"]["arguments_1"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("name", ["CASE07", "CASE08"])
def test_cut_answers_end_with_length(name: str, is_stream: bool) -> None:
    given = CASES[name]["input"]
    with running(lambda conversation: given["scripted_output"]) as server:
        num_tokens = len(server.preparer.tokenizer.encode(given["scripted_output"]))
        body = {"model": MODEL, **given["body"], "max_tokens": num_tokens}
        if is_stream:
            chunks = events(server, CHAT, body)[:-1]
            deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
            reasoning = "".join(delta.get("reasoning_content", "") for delta in deltas)
            content = "".join(delta.get("content", "") for delta in deltas)
            calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
            finish = chunks[-1]["choices"][0]["finish_reason"]
        else:
            choice = server.post(CHAT, body).json()["choices"][0]
            message = choice["message"]
            reasoning, content = message.get("reasoning_content", ""), message["content"]
            calls, finish = message.get("tool_calls", []), choice["finish_reason"]
        assert server.post(CHAT, body).status_code == 200
    assert finish == "length" and not calls and not content
    if name == "CASE08":
        assert reasoning == CASES[name]["expected"]["reasoning_content"]


def test_characters_of_several_tokens_come_whole(server: Running) -> None:
    text = CASES["CASE10"]["input"]["byte_tokens_of"]
    chunks = events(server, CHAT, chat_body(f"[say {text}]"))[:-1]
    pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
    for max_tokens in range(1, 30):
        choice = server.chat(f"[say {text}]", max_tokens=max_tokens)["choices"][0]
        assert "\ufffd" not in (choice["message"]["content"] or "")[:-1]


def test_usage_comes_once_and_last_if_asked_for(server: Running) -> None:
    asked, silent = CASES["CASE11"]["input"]["bodies"]
    *chunks, done = events(server, CHAT, {"model": MODEL, **asked})
    assert done == "[DONE]" and chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 3
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"
    assert not any(chunk.get("usage") for chunk in chunks[:-1])
    assert not any(chunk.get("usage") for chunk in events(server, CHAT, {"model": MODEL, **silent})[:-1])


def test_limits_of_max_tokens_and_messages(server: Running) -> None:
    for value, status in ((None, 200), (-1, 400), (0, 400), (-5, 400), (10**9, 200), ("abc", 400)):
        response = server.post(CHAT, {**chat_body("hi"), "max_tokens": value})
        assert response.status_code == status, value
    for messages in ([], None):
        response = server.post(CHAT, {"model": MODEL, "messages": messages})
        assert response.status_code == 400 and response.json()["error"]["param"] == "messages"


def test_closed_streams_free_the_engine(server: Running) -> None:
    body = {**chat_body("[long 100000]"), "stream": True}
    for attempt in range(20):
        with server.client.stream("POST", CHAT, json=body) as response:
            lines = response.iter_lines()
            for _ in range(2 * (attempt % 3)):
                next(lines)
        server.chat("hi", max_tokens=2)
    server.wait_until_idle()


def test_billing_header_is_no_part_of_the_prompt(server: Running) -> None:
    case = CASES["CASE16"]["input"]
    fields = {key: case[key] for key in ("system", "messages", "max_tokens")}
    texts = []
    for cch in ("AAAAA", "BBBBB"):
        body = json.loads(json.dumps(fields).replace("AAAAA", cch))
        prompt = server.preparer.prompt(parse_messages({"model": MODEL, **body}))
        texts.append(server.preparer.tokenizer.decode(prompt.ids))
        usage = server.post("/v1/messages", {"model": MODEL, **body}).json()["usage"]
    bos = server.preparer.tokenizer.bos_token or ""
    assert texts == [CASES["CASE16"]["expected"]["prompt"].replace("{bos}", bos)] * 2
    assert usage["cache_read_input_tokens"] > 0


def test_thinking_text_and_call_are_blocks_in_order() -> None:
    given = CASES["CASE18"]["input"]
    body = {"model": MODEL, "max_tokens": 500, "messages": [{"role": "user", "content": "go"}]}
    body |= {"tools": given["tools"], **given["body_extra"]}
    with running(lambda conversation: given["scripted_output"]) as server:
        data = [one for one in events(server, "/v1/messages", body) if one["type"] != "ping"]
    assert data[0]["message"]["usage"]["input_tokens"] > 0 and data[0]["message"]["content"] == []
    blocks = [one["content_block"]["type"] for one in data if one["type"] == "content_block_start"]
    assert blocks == ["thinking", "text", "tool_use"]
    fragments = [one["delta"]["partial_json"] for one in data if one.get("delta", {}).get("partial_json")]
    assert json.loads("".join(fragments)) == {"path": "a"}
    assert data[-2]["delta"]["stop_reason"] == "tool_use" and data[-2]["usage"]["output_tokens"] > 0
    assert data[-1]["type"] == "message_stop"


def test_count_tokens_equals_what_messages_reports(server: Running) -> None:
    body = {"model": MODEL, **CASES["CASE19"]["input"]["body"]}
    count = server.post("/v1/messages/count_tokens", body).json()["input_tokens"]
    usage = server.post("/v1/messages", {**body, "max_tokens": 4}).json()["usage"]
    assert count == usage["input_tokens"] + usage["cache_read_input_tokens"]
    for name in ("tools", "system"):
        fewer = {key: value for key, value in body.items() if key != name}
        assert server.post("/v1/messages/count_tokens", fewer).json()["input_tokens"] < count


def test_reasoning_comes_back_in_under_either_name(server: Running) -> None:
    case = CASES["CASE21"]
    text = rendered(server, case["input"])
    assert case["expected"]["prompt_contains"] in text
    renamed = json.loads(json.dumps(case["input"]).replace('"reasoning"', '"reasoning_content"'))
    assert rendered(server, renamed) == text


@pytest.mark.parametrize("directive", ["[fail-prefill]", "[fail]"])
def test_a_fault_ends_one_request_and_no_other(server: Running, directive: str) -> None:
    failed = server.post(CHAT, chat_body(directive))
    assert failed.status_code == 500 and failed.json()["error"]["code"] == "internal_error"
    assert server.chat("hi")["choices"][0]["message"]["content"] == "Hello there."
    server.wait_until_idle()
