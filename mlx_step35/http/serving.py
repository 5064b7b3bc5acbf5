"""uvicorn, but signals and shutdown end in ways that processes and clients understand."""

import asyncio
import contextlib
import math
import signal
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from mlx_step35.engine.engine import Engine

# How long the farewells of a shutdown may take to reach their clients.
FAREWELL_S = 2


class HttpServer(uvicorn.Server):
    """One application on uvicorn; a signal ends it with exit code 0.

    Args:
        app: the application.
        engine: what makes its answers.
        grace_s: how long answers under way may go on after a signal.
    """

    def __init__(self, app: ASGIApp, engine: Engine, grace_s: float) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=math.ceil(grace_s + FAREWELL_S),
            )
        )
        self._engine = engine
        self._grace_s = grace_s

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's own version raises the signal again when everything is done."""
        loop = asyncio.get_running_loop()
        signals = (signal.SIGTERM, signal.SIGINT)
        for number in signals:
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Before uvicorn cancels what is left, which no client understands, the engine ends it."""
        timer = asyncio.get_running_loop().call_later(self._grace_s, self._engine.dismiss)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()
