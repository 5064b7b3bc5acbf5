"""Access, limits, load and faults over a real socket."""

import concurrent.futures
import contextlib
import json
import socket
import threading
import time
from typing import Any

import httpx
import pytest
from anthropic.types import ErrorResponse, GatewayTimeoutError
from fastapi.testclient import TestClient

from mlx_step35.api.openai_answers import ChatWriter
from mlx_step35.engine.engine import Engine
from mlx_step35.engine.runner import Runner
from mlx_step35.http.app import create_app
from mlx_step35.http.preparing import Preparer
from mlx_step35.http.settings import GenerationDefaults
from tests.server.running import KEY, MODEL, Running, chat_body, running, settings
from tests.server.scripted import nano_texts, scripted_runner

CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"


def raw_request(body: bytes, *, length: int | None = None) -> bytes:
    """A chat request as bytes; `length` lies about its size."""
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body) if length is None else length}\r\n\r\n"
    )
    return head.encode() + body


def test_foreign_hosts_and_web_pages_are_refused(server: Running) -> None:
    for headers in ({"host": "evil.example"}, {"origin": "https://evil.example"}, {"origin": "null"}):
        for path in (CHAT, "/health"):
            assert server.client.request("GET", path, headers=headers).status_code == 403
    for headers in ({"origin": "http://["}, {"origin": "http://[::1"}, {"host": "[::1"}, {"host": "[::1]x"}):
        for path in (CHAT, MESSAGES, "/health"):
            assert server.client.request("GET", path, headers=headers).status_code == 403
    for host in ("localhost:1", "127.0.0.1", "[::1]:8080", "app.localhost"):
        assert server.get("/health", headers={"host": host}).status_code == 200
    answer = server.post(CHAT, chat_body("hi"), headers={"origin": "http://localhost:3000"})
    assert answer.headers["access-control-allow-origin"] == "http://localhost:3000"


def test_a_page_that_is_allowed_gets_its_preflight() -> None:
    with running(cors_origins=frozenset({"https://ui.example"})) as server:
        headers = {"origin": "https://ui.example", "access-control-request-method": "POST"}
        answer = httpx.options(server.base + CHAT, headers=headers, verify=False)
        assert answer.status_code == 204
        assert answer.headers["access-control-allow-origin"] == "https://ui.example"
        assert "access-control-allow-private-network" not in answer.headers
        headers["access-control-request-private-network"] = "true"
        answer = httpx.options(server.base + CHAT, headers=headers, verify=False)
        assert answer.headers["access-control-allow-private-network"] == "true"
        answer = server.post(CHAT, {}, headers={"origin": "https://ui.example"})
        exposed = answer.headers["access-control-expose-headers"].split(", ")
        assert {"retry-after", "request-id"} <= set(exposed)


def test_what_can_be_read_can_be_probed(server: Running) -> None:
    for path in ("/", "/health", "/metrics", "/v1/models", f"/v1/models/{MODEL}"):
        answer = server.client.head(path)
        assert answer.status_code == 200 and not answer.content


def test_beyond_loopback_the_key_is_enough() -> None:
    with running(is_loopback=False) as server:
        assert server.post(CHAT, chat_body("hi"), headers={"host": "mac.example"}).status_code == 200
        keyless = httpx.post(server.base + CHAT, json=chat_body("hi"), verify=False)
        assert keyless.status_code == 401


def test_errors_name_the_request(server: Running) -> None:
    answer = server.post(MESSAGES, {"model": MODEL})
    assert answer.json()["request_id"] == answer.headers["request-id"]


def test_several_choices_share_the_prompt(server: Running) -> None:
    answer = server.chat("[say three]", n=3, seed=1)
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert texts == ["three"] * 3 and [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    usage = answer["usage"]
    assert usage["prompt_tokens"] == server.chat("[say three]")["usage"]["prompt_tokens"]
    with server.client.stream("POST", CHAT, json={**chat_body("[say x]"), "n": 2, "stream": True}) as stream:
        lines = [line[6:] for line in stream.iter_lines() if line.startswith("data: {")]
    ends = [choice for line in lines for choice in json.loads(line)["choices"] if choice["finish_reason"]]
    assert [choice["index"] for choice in ends] == [0, 1]


def test_logprobs_are_those_of_the_answer(server: Running) -> None:
    choice = server.chat("[say one two]", logprobs=True, top_logprobs=2)["choices"][0]
    entries = choice["logprobs"]["content"]
    assert "".join(entry["token"] for entry in entries).strip() == "one two"
    assert all(len(entry["top_logprobs"]) == 2 and entry["logprob"] < 0 for entry in entries)
    assert server.chat("hi")["choices"][0]["logprobs"] is None
    body = {**chat_body("[say one two]"), "logprobs": True, "stream": True}
    with server.client.stream("POST", CHAT, json=body) as stream:
        chunks = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: {")]
    streamed = [
        entry["token"]
        for chunk in chunks
        for choice in chunk["choices"]
        for entry in (choice["logprobs"] or {"content": ()})["content"]
    ]
    assert streamed == [entry["token"] for entry in entries]


def test_completions_continue_texts(server: Running) -> None:
    body = {"model": MODEL, "prompt": ["a", "b"], "max_tokens": 5, "echo": True, "n": 2}
    answer = server.post("/v1/completions", body).json()
    assert [choice["text"][0] for choice in answer["choices"]] == ["a", "a", "b", "b"]
    assert answer["usage"]["completion_tokens"] == 20
    refused = server.post("/v1/completions", {**body, "suffix": "x"})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "suffix"
    body = {"model": MODEL, "prompt": "a", "max_tokens": 3, "stream": True}
    with server.client.stream("POST", "/v1/completions", json=body) as stream:
        lines = [line for line in stream.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"


@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES])
def test_forced_calls_and_schemas_are_enforced(server: Running, path: str) -> None:
    schema = {"type": "object", "properties": {"city": {"enum": ["Paris"]}}, "required": ["city"]}
    tools: Any = [{"name": "f", "input_schema": schema}]
    choice: Any = {"type": "any"}
    if path == CHAT:
        tools, choice = [{"type": "function", "function": {"name": "f", "parameters": schema}}], "required"
    elif path == RESPONSES:
        tools, choice = [{"type": "function", "name": "f", "parameters": schema}], "required"
    body = {"model": MODEL, "max_tokens": 200, "messages": chat_body("hi")["messages"]}
    if path == RESPONSES:
        body = {"model": MODEL, "input": "hi"}
    answer = server.post(path, {**body, "tools": tools, "tool_choice": choice})
    assert answer.status_code == 200 and "Paris" in answer.text, answer.text


def test_thinking_is_cut_at_its_budget(server: Running) -> None:
    answer = server.chat("[say done]", max_thinking_tokens=2)
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] <= 6
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_requests_past_the_queue_are_told_to_come_back() -> None:
    with running(max_queue=1) as server, concurrent.futures.ThreadPoolExecutor() as pool:
        slow = pool.submit(server.chat, "[slow 1.5]")
        while not server.engine.num_open:
            time.sleep(0.01)
        openai = server.post(CHAT, chat_body("hi"))
        anthropic = server.post(MESSAGES, {**chat_body("hi"), "max_tokens": 5})
        assert (openai.status_code, anthropic.status_code) == (503, 529)
        assert openai.headers["retry-after"] and anthropic.headers["retry-after"]
        assert slow.result()["choices"]
        server.wait_until_idle()


def test_a_request_that_takes_too_long_ends() -> None:
    with running(request_timeout_s=0.5) as server:
        answer = server.post(CHAT, chat_body("[slow 60]"))
        assert answer.status_code == 504 and answer.json()["error"]["type"] == "server_error"
        answer = server.post(MESSAGES, {**chat_body("[slow 60]"), "max_tokens": 9})
        error = ErrorResponse.model_validate(answer.json()).error
        assert answer.status_code == 504 and isinstance(error, GatewayTimeoutError)
        body = {
            "model": MODEL,
            "max_tokens": 9,
            "messages": chat_body("[slow 60]")["messages"],
            "stream": True,
        }
        assert "event: error" in server.post(MESSAGES, body).text
        server.wait_until_idle()


def test_a_slow_reader_holds_up_nobody(server: Running) -> None:
    body = json.dumps({**chat_body("[long 3000]"), "stream": True}).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as reader:
        reader.sendall(raw_request(body))
        time.sleep(0.3)
        assert server.chat("hi")["choices"]
        received = bytearray()
        while b"[DONE]" not in received[-100:]:
            received += reader.recv(1 << 20)
    assert received.count(b'"content":') > 3000


def test_half_closed_and_lying_sockets_are_survived(server: Running) -> None:
    body = json.dumps(chat_body("[slow 30]")).encode()
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(raw_request(body))
        client.shutdown(socket.SHUT_WR)
        time.sleep(0.2)
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(raw_request(body, length=len(body) + 10))
    server.wait_until_idle()
    assert server.chat("hi")["choices"]


def test_bodies_at_the_edge(server: Running) -> None:
    big = chat_body("x" * 10_000_000)
    answer = server.post(CHAT, big)
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"
    deep = b'{"model":"step-3.5-flash","messages":' + b"[" * 2000 + b"]" * 2000 + b"}"
    for body in (deep, b'{"a":"\xff"}'):
        answer = server.client.post(CHAT, content=body)
        assert answer.status_code == 400 and answer.json()["error"]["type"] == "invalid_request_error"


def test_metrics_and_health(server: Running) -> None:
    server.chat("hi", zzz=1)
    text = server.get("/metrics").text
    for name in (
        'tokens_total{kind="generated"}',
        "first_token_seconds_bucket",
        "unknown_fields_total",
        'memory_bytes{kind="active"}',
        "open_requests",
        "prompt_reuse_total",
        "requests_total",
    ):
        assert f"mlx_step35_{name}" in text
    health = server.get("/health").json()
    assert health["status"] == "ready" and health["open_requests"] == 0
    assert httpx.get(server.base + "/metrics", verify=False).status_code == 401


def test_log_lines_hold_neither_prompts_nor_keys(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        server.chat("a very secret prompt")
        server.post(CHAT, {**chat_body("another secret prompt"), "temperature": "hot"})
    lines = [
        json.loads(record.getMessage()) for record in caplog.records if record.name == "mlx_step35.access"
    ]
    asked = [line for line in lines if line["path"] == CHAT]
    assert len(asked) == 2 and asked[0]["completion_tokens"] > 0
    assert "secret" not in caplog.text and KEY not in caplog.text


def metric(server: Running, name: str) -> float:
    lines = server.get("/metrics").text.splitlines()
    return next((float(line.split()[-1]) for line in lines if line.startswith(f"mlx_step35_{name} ")), 0.0)


def last_line(caplog: pytest.LogCaptureFixture, path: str) -> Any:
    """The newest line of the access log about a path, which may be written a little after the answer."""
    for _ in range(100):
        texts = [record.getMessage() for record in caplog.records if record.name == "mlx_step35.access"]
        found = [line for line in map(json.loads, texts) if line["path"] == path]
        if found:
            return found[-1]
        time.sleep(0.02)
    raise AssertionError(f"no line about {path}")


@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES])
def test_a_stream_that_fails_is_no_success(
    server: Running, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    name = {CHAT: "chat", MESSAGES: "messages", RESPONSES: "responses"}[path]
    counter = f'failed_streams_total{{endpoint="{name}",error="internal_error"}}'
    failed, generated = metric(server, counter), metric(server, 'tokens_total{kind="generated"}')
    body: dict[str, Any] = {"model": MODEL, "input": "[fail]"} if path == RESPONSES else chat_body("[fail]")
    if path == MESSAGES:
        body["max_tokens"] = 50
    with caplog.at_level("INFO"):
        stream = server.client.stream("POST", path, json={**body, "stream": True})
        with stream as answer, contextlib.suppress(httpx.RemoteProtocolError):
            answer.read()
        line = last_line(caplog, path)
    # The script gives five tokens before it fails.
    assert line["error"] == "internal_error" and line["completion_tokens"] == 5 and not line["finish"]
    assert metric(server, counter) == failed + 1
    assert metric(server, 'tokens_total{kind="generated"}') == generated + 5


def test_a_bug_in_the_middle_of_a_stream_is_no_success(
    server: Running, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> bytes:
        raise ValueError("a bug")

    monkeypatch.setattr(ChatWriter, "finish", fail)
    counter = 'failed_streams_total{endpoint="chat",error="internal_error"}'
    failed = metric(server, counter)
    stream = server.client.stream("POST", CHAT, json={**chat_body("hi"), "stream": True})
    with caplog.at_level("INFO"), pytest.raises(httpx.RemoteProtocolError), stream as answer:
        answer.read()
    assert last_line(caplog, CHAT)["error"] == "internal_error"
    assert metric(server, counter) == failed + 1


def test_tokens_of_abandoned_answers_count(caplog: pytest.LogCaptureFixture) -> None:
    with running(token_s=0.01) as server, caplog.at_level("INFO"):
        body = {**chat_body("[long 100000]"), "stream": True}
        with server.client.stream("POST", CHAT, json=body) as answer:
            lines = answer.iter_lines()
            for _ in range(60):
                next(lines)
        line = last_line(caplog, CHAT)
        assert line["abandoned"] and line["completion_tokens"] > 10 and line["prompt_tokens"] > 0
        counted = metric(server, 'tokens_total{kind="generated"}')
        assert line["completion_tokens"] == counted
        assert 0 < metric(server, 'tokens_total{kind="reasoning"}') < counted
        assert metric(server, 'tokens_total{kind="prompt"}') == line["prompt_tokens"]


def test_unseen_thinking_is_no_silence() -> None:
    def think_long(conversation: object) -> str:
        return "hm " * 30 + "\n</think>\nDone."

    with running(think_long, token_s=0.05, keepalive_s=0.3) as server:
        body = {**chat_body("hi"), "max_tokens": 500, "stream": True}
        with server.client.stream("POST", MESSAGES, json=body) as stream:
            names = [line[7:] for line in stream.iter_lines() if line.startswith("event: ")]
    assert names.count("ping") >= 4 and names.count("content_block_start") == 1


def test_health_tells_that_the_model_is_loading() -> None:
    tokenizer, template = nano_texts()
    preparer = Preparer(tokenizer, template, GenerationDefaults(), 4096)
    may_load = threading.Event()

    def load() -> Runner:
        may_load.wait(10)
        return scripted_runner(tokenizer, 4096)

    app = create_app(Engine(load), preparer, settings())
    with TestClient(app, base_url="http://127.0.0.1") as client:
        loading = client.get("/health")
        assert (loading.status_code, loading.json()["status"]) == (503, "loading")
        may_load.set()
        answer = client.post(CHAT, json=chat_body("hi"), headers={"x-api-key": KEY})
        assert answer.status_code == 200 and client.get("/health").status_code == 200
