"""The real server on a scripted engine, on a real socket, in a thread of the test process."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import httpx
import uvicorn

from mlx_step35.api.models import Served
from mlx_step35.engine.engine import Engine
from mlx_step35.http.app import create_app
from mlx_step35.http.preparing import Preparer
from mlx_step35.http.settings import GenerationDefaults, ServerSettings
from tests.server.scripted import Script, nano_texts, obey, scripted_runner

MODEL = "step-3.5-flash"
KEY = "sk-test"
CONTEXT_LENGTH = 131072


@dataclass(frozen=True)
class Running:
    """A server that listens."""

    base: str
    port: int
    engine: Engine
    preparer: Preparer
    client: httpx.Client

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.client.post(path, json=body, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.client.get(path, **options)

    def chat(self, text: str, **fields: Any) -> Any:
        """A whole answer to one message."""
        response = self.post("/v1/chat/completions", {**chat_body(text), **fields})
        assert response.status_code == 200, response.text
        return response.json()

    def wait_until_idle(self, seconds: float = 5) -> None:
        end = time.monotonic() + seconds
        while self.engine.num_open and time.monotonic() < end:
            time.sleep(0.01)
        assert self.engine.num_open == 0


def chat_body(text: str) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": text}]}


def settings(**changes: Any) -> ServerSettings:
    served = Served(MODEL, frozenset({"nano"}), CONTEXT_LENGTH, 1_760_000_000)
    return replace(ServerSettings(served, api_key=KEY, keepalive_s=0.5), **changes)


@contextlib.contextmanager
def running(
    script: Script = obey, *, max_queue: int = 32, token_s: float = 0.0, **changes: Any
) -> Iterator[Running]:
    """Serve until the block is left."""
    tokenizer, template = nano_texts()
    chosen = settings(**changes)
    context_length = chosen.served.context_length
    preparer = Preparer(tokenizer, template, GenerationDefaults(), context_length)
    engine = Engine(lambda: scripted_runner(tokenizer, context_length, script, token_s), max_queue)
    listener = socket.create_server(("127.0.0.1", 0))
    app = create_app(engine, preparer, chosen)
    server = uvicorn.Server(
        uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=2)
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    port = listener.getsockname()[1]
    try:
        while not (server.started and engine.state == "ready"):
            assert thread.is_alive() and engine.load_error is None, engine.load_error
            time.sleep(0.01)
        base = f"http://127.0.0.1:{port}"
        headers = {"authorization": f"Bearer {KEY}"}
        # Without verification no certificates are read, which takes longer than most requests.
        with httpx.Client(base_url=base, headers=headers, timeout=60, verify=False) as client:
            yield Running(base, port, engine, preparer, client)
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()
        assert not thread.is_alive()
