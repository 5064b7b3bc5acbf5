"""A signal while answers are under way: each ends in its own dialect, and the process with 0."""

import concurrent.futures
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
from anthropic.types import ErrorResponse
from openai.types.responses import ResponseFailedEvent

from tests.server.running import KEY, MODEL, chat_body
from tests.server.test_http import CHAT, MESSAGES, RESPONSES, raw_request

ENDLESS = "[long 1000000]"
WHOLE = {
    CHAT: chat_body(ENDLESS),
    MESSAGES: {**chat_body(ENDLESS), "max_tokens": 100_000},
    RESPONSES: {"model": MODEL, "input": ENDLESS},
}


class Scripted:
    """A server as a process of its own; its answers take a second for a hundred tokens."""

    def __init__(self, log: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.base = f"http://127.0.0.1:{self.port}"
        self.log = log
        command = [sys.executable, "-m", "tests.server.scripted_server", "--port", str(self.port)]
        options = ["--shutdown-s", "0.5", "--queue", "20", "--ctx", "200000", "--token-s", "0.01"]
        with log.open("w") as output:
            self.process = subprocess.Popen([*command, *options], stdout=output, stderr=output)
        headers = {"authorization": f"Bearer {KEY}"}
        self.client = httpx.Client(base_url=self.base, headers=headers, timeout=30, verify=False)
        while self._status() != 200:
            assert self.process.poll() is None, log.read_text()
            time.sleep(0.05)

    def wait_for(self, num_open: int) -> None:
        while self.client.get("/health").json()["open_requests"] < num_open:
            time.sleep(0.02)

    def end(self, number: signal.Signals) -> None:
        """Signal it; it must leave with 0 and without a traceback."""
        self.process.send_signal(number)
        assert self.process.wait(20) == 0
        assert "Traceback" not in self.log.read_text()

    def _status(self) -> int:
        try:
            return self.client.get("/health").status_code
        except httpx.ConnectError:
            return 0


@pytest.fixture
def scripted(tmp_path: Path) -> Iterator[Scripted]:
    one = Scripted(tmp_path / "server.log")
    yield one
    one.client.close()
    if one.process.poll() is None:
        one.process.kill()
        one.process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_open_requests_end_in_their_dialect(scripted: Scripted, number: signal.Signals) -> None:
    with concurrent.futures.ThreadPoolExecutor() as pool:
        whole = {path: pool.submit(scripted.client.post, path, json=body) for path, body in WHOLE.items()}
        streamed = {path: pool.submit(read_stream, scripted, path) for path in WHOLE}
        scripted.wait_for(6)
        scripted.end(number)
    answers = {path: future.result() for path, future in whole.items()}
    assert [answers[path].status_code for path in WHOLE] == [503, 529, 503]
    assert all(answer.headers["retry-after"] for answer in answers.values())
    assert answers[CHAT].json()["error"]["type"] == "server_error"
    error = ErrorResponse.model_validate(answers[MESSAGES].json())
    assert error.error.type == "overloaded_error" and error.request_id
    chat, is_cut = streamed[CHAT].result()
    assert json.loads(chat[-1][6:])["error"]["code"] == "overloaded" and is_cut
    messages, is_cut = streamed[MESSAGES].result()
    error = ErrorResponse.model_validate_json(messages[-1][6:])
    assert messages[-2] == "event: error" and error.error.type == "overloaded_error" and not is_cut
    responses, is_cut = streamed[RESPONSES].result()
    assert ResponseFailedEvent.model_validate_json(responses[-1][6:]).response.status == "failed"
    assert not is_cut


def test_the_sdks_see_failures_they_may_retry(scripted: Scripted) -> None:
    messages: Any = chat_body(ENDLESS)["messages"]
    ours = openai.OpenAI(base_url=scripted.base + "/v1", api_key=KEY, max_retries=0)
    theirs = anthropic.Anthropic(base_url=scripted.base, api_key=KEY, max_retries=0)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(ours.chat.completions.create, model=MODEL, messages=messages)
        second = pool.submit(theirs.messages.create, model=MODEL, messages=messages, max_tokens=9999)
        scripted.wait_for(2)
        scripted.end(signal.SIGTERM)
    assert isinstance(first.exception(), openai.InternalServerError)
    assert isinstance(second.exception(), anthropic.InternalServerError | anthropic.APIStatusError)


def test_stuck_clients_do_not_hold_it_up(scripted: Scripted) -> None:
    """One that never sends the rest of its body, one that never reads."""
    with (
        socket.create_connection(("127.0.0.1", scripted.port)) as sender,
        socket.create_connection(("127.0.0.1", scripted.port)) as reader,
    ):
        sender.sendall(raw_request(b'{"model":', length=1000))
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        reader.sendall(raw_request(json.dumps({**chat_body(ENDLESS), "stream": True}).encode()))
        scripted.wait_for(1)
        scripted.end(signal.SIGTERM)
        sender.settimeout(5)
        answer = sender.recv(65536)
        assert answer.startswith(b"HTTP/1.1 503 ") and b'"code":"overloaded"' in answer


def read_stream(scripted: Scripted, path: str) -> tuple[list[str], bool]:
    """The lines of a stream, and whether it was cut off."""
    lines: list[str] = []
    body = {**WHOLE[path], "stream": True}
    with scripted.client.stream("POST", path, json=body) as answer:
        try:
            lines += (line for line in answer.iter_lines() if line)
        except httpx.RemoteProtocolError:
            return lines, True
    return lines, False
