"""The outermost layer: a name for every request, one log line without prompts or keys, no unhandled bug."""

import asyncio
import json
import logging
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_step35.api.failures import INTERNAL, Failure, overload
from mlx_step35.http.errors import dialect_of, error_response
from mlx_step35.http.metrics import Metrics

logger = logging.getLogger("mlx_step35.access")
errors = logging.getLogger(__name__)


class StreamBrokenError(Exception):
    """Makes the server close a socket without the last chunk, so that the stream is no whole answer."""


@dataclass(slots=True)
class Record:
    """What is known of a request when it ends."""

    request_id: str
    started_s: float = field(default_factory=time.perf_counter)
    status: int = 0
    details: dict[str, Any] = field(default_factory=dict)


class AccessLog:
    """Middleware around everything else."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = Record(f"req_{uuid.uuid4().hex[:24]}")
        scope.setdefault("state", {}).update(record=record, request_id=record.request_id)

        async def send_and_note(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                name = record.request_id.encode()
                message["headers"] = [
                    *message.get("headers", []),
                    (b"request-id", name),
                    (b"x-request-id", name),
                ]
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        except StreamBrokenError:
            raise
        except asyncio.CancelledError:
            # A body that does not come, or a reader that does not read, has outlasted the server's shutdown.
            await self._fail(overload("the server is shutting down"), scope, record, receive, send_and_note)
        except Exception:  # A bug in a handler: the caller gets a 500 in his dialect, the log the traceback.
            errors.exception("%s %s failed", scope["method"], scope["path"])
            await self._fail(INTERNAL, scope, record, receive, send_and_note)
        finally:
            self._finish(scope, record)

    async def _fail(
        self, failure: Failure, scope: Scope, record: Record, receive: Receive, send: Send
    ) -> None:
        """Answer with the failure, or cut off an answer that has begun."""
        code = failure.code or str(failure.status)
        record.details["error"] = code
        if record.status:
            self._metrics.failed_streams.labels(_endpoint(record), code).inc()
            raise StreamBrokenError(failure.message) from None
        dialect = dialect_of(scope["path"], Headers(scope=scope))
        await error_response(failure, dialect, scope)(scope, receive, send)

    def _finish(self, scope: Scope, record: Record) -> None:
        seconds = time.perf_counter() - record.started_s
        self._metrics.requests.labels(_endpoint(record), str(record.status)).inc()
        line = {
            "request": record.request_id,
            "method": scope["method"],
            "path": scope["path"][:200],
            "status": record.status,
            "seconds": round(seconds, 4),
            **record.details,
        }
        logger.info("%s", json.dumps(line))


def _endpoint(record: Record) -> str:
    return str(record.details.get("endpoint", "other"))


class QuietBreaks(logging.Filter):
    """Keeps broken-off streams out of uvicorn's error log: they are meant, and already logged."""

    def filter(self, record: logging.LogRecord) -> bool:
        kind = record.exc_info[0] if record.exc_info else None
        return kind is None or not issubclass(kind, StreamBrokenError)
