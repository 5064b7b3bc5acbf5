"""One answer on its way to one client: events in, bytes out, and an end as soon as the client is gone."""

import asyncio
import time
from collections.abc import Sequence
from typing import Generic

from starlette.background import BackgroundTask
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mlx_step35.api.failures import INTERNAL, RETRY_AFTER_S, Failure, bad_request, overload
from mlx_step35.api.sse import to_json
from mlx_step35.api.types import ChatRequest, TokenLogprob
from mlx_step35.api.writer import Writer
from mlx_step35.engine.engine import OverloadedError, Submission
from mlx_step35.engine.request import Event, Failed, Finished, Started, Token
from mlx_step35.errors import CapacityError, RequestError
from mlx_step35.http.access import Record, StreamBrokenError
from mlx_step35.http.collecting import Collector
from mlx_step35.http.endpoints import Endpoint, R
from mlx_step35.http.errors import error_response
from mlx_step35.http.metrics import Metrics
from mlx_step35.http.preparing import Preparer
from mlx_step35.http.settings import ServerSettings

# How long the first event may wait for the engine to say how much of the prompt is cached.
START_WAIT_S = 0.25
TIMEOUT = Failure(504, "the request took longer than the server allows", code="timeout")
STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # Proxies such as nginx would collect events before passing them on.
    (b"x-accel-buffering", b"no"),
]


class Answer(Response, Generic[R]):
    """The response of an endpoint that generates."""

    def __init__(
        self,
        endpoint: Endpoint[R],
        request: R,
        submission: Submission,
        preparer: Preparer,
        settings: ServerSettings,
        metrics: Metrics,
    ) -> None:
        self.background: BackgroundTask | None = None
        self._endpoint = endpoint
        self._request = request
        self._submission = submission
        self._preparer = preparer
        self._settings = settings
        self._metrics = metrics
        self._identity = endpoint.identity(request.model)
        self._collector = Collector(submission.request, request.num_choices, preparer.tokenizer)
        self._started_s = time.perf_counter()
        self._num_left = len(submission.request.candidates)
        self._has_text = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer, unless the client leaves first."""
        deliver = self._stream if self._request.is_stream else self._send_whole
        delivery = asyncio.create_task(deliver(scope, receive, send))
        departure = asyncio.create_task(_departure(receive))
        record: Record = scope["state"]["record"]
        try:
            await asyncio.wait({delivery, departure}, return_when=asyncio.FIRST_COMPLETED)
            if delivery.done():
                await delivery
            else:
                self._metrics.abandoned.labels(self._endpoint.name).inc()
                record.details["abandoned"] = True
        finally:
            self._submission.cancel()
            delivery.cancel()
            departure.cancel()
            await asyncio.gather(delivery, departure, return_exceptions=True)
            # Work was done for these, too, though nobody is left to read them.
            for event in self._submission.take_rest():
                self._observe(event)
            self._note(record)

    async def _send_whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        failure = None
        while self._num_left and failure is None:
            for event in await self._submission.take(self._time_left()):
                failure = failure or self._failure(event)
                self._observe(event)
            if self._num_left and self._time_left() <= 0:
                failure = failure or TIMEOUT
        if failure is not None:
            await self._refuse(failure, scope, receive, send)
            return
        collector = self._collector
        body = self._endpoint.whole(
            self._preparer, self._identity, self._request, collector.choices, collector.usage
        )
        await Response(to_json(body), media_type="application/json")(scope, receive, send)

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        writer = self._endpoint.writer(self._preparer, self._identity, self._request)
        events = await self._submission.take(START_WAIT_S)
        failure = next(filter(None, map(self._failure, events)), None)
        if failure is not None:
            await self._refuse(failure, scope, receive, send)
            return
        for event in [event for event in events if isinstance(event, Started)]:
            # Known before the first event is written, so that it can tell.
            self._observe(event)
            events.remove(event)
        await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
        await _send_part(send, writer.start(self._collector.usage))
        sent_s = time.perf_counter()
        while True:
            data, failure = self._encode(writer, events)
            if failure is None and self._num_left and self._time_left() <= 0:
                failure = TIMEOUT
            if failure is not None:
                await self._break_off(failure, writer, data, scope["state"]["record"], send)
                return
            if not self._num_left:
                last = writer.close(self._collector.usage)
                await send({"type": "http.response.body", "body": data + last, "more_body": False})
                return
            quiet_s = time.perf_counter() - sent_s
            if not data and quiet_s >= self._settings.keepalive_s:
                data = writer.keepalive()
            if data:
                await _send_part(send, data)
                sent_s, quiet_s = time.perf_counter(), 0.0
            wait_s = min(self._settings.keepalive_s - quiet_s, self._time_left())
            events = await self._submission.take(max(wait_s, 0.001))

    async def _refuse(self, failure: Failure, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with a failure, nothing having been sent."""
        scope["state"]["record"].details["error"] = _code(failure)
        await error_response(failure, self._endpoint.dialect, scope)(scope, receive, send)

    async def _break_off(
        self, failure: Failure, writer: Writer, data: bytes, record: Record, send: Send
    ) -> None:
        """End a stream with a failure; its status has been sent, so that only these tell of it."""
        self._metrics.failed_streams.labels(self._endpoint.name, _code(failure)).inc()
        record.details["error"] = _code(failure)
        await _send_part(send, data + writer.fail(failure, record.request_id))
        if writer.must_break_off:
            raise StreamBrokenError(failure.message)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _encode(self, writer: Writer, events: Sequence[Event]) -> tuple[bytes, Failure | None]:
        """The events on the wire, up to a failure."""
        parts: list[bytes] = []
        for event in events:
            failure = self._failure(event)
            if failure is not None:
                return b"".join(parts), failure
            logprobs = self._observe(event)
            if isinstance(event, Token | Finished):
                parts.append(writer.write(event.index, event.deltas, logprobs))
            if isinstance(event, Finished):
                parts.append(writer.finish(event.index, self._collector.choices[event.index]))
        return b"".join(parts), None

    def _observe(self, event: Event) -> Sequence[TokenLogprob]:
        """Take note of an event; returns a token's log-probabilities."""
        if isinstance(event, Token | Finished) and event.deltas and not self._has_text:
            self._has_text = True
            seconds = time.perf_counter() - self._started_s
            self._metrics.first_token.labels(self._endpoint.name).observe(seconds)
        match event:
            case Started():
                self._collector.start(event)
                self._metrics.note_started(event.reuse)
                self._preparer.explain(event.reuse)
            case Token():
                self._collector.count(event)
                self._metrics.note_token(event)
                return self._collector.logprobs(event.index, event.logprobs)
            case Finished():
                self._num_left -= 1
                logprobs = self._collector.logprobs(event.index, event.logprobs)
                self._collector.finish(event)
                if isinstance(self._request, ChatRequest):
                    self._preparer.remember(self._submission.request.candidates[event.index], event)
                self._metrics.note_finished(event)
                return logprobs
        return ()

    def _failure(self, event: Event) -> Failure | None:
        if not isinstance(event, Failed):
            return None
        if isinstance(event.error, RequestError):
            return bad_request(event.error, self._endpoint.dialect)
        if isinstance(event.error, OverloadedError):
            return overload(str(event.error))
        if isinstance(event.error, CapacityError):
            return Failure(503, str(event.error), code="out_of_memory", retry_after_s=RETRY_AFTER_S)
        return INTERNAL

    def _time_left(self) -> float:
        return self._settings.request_timeout_s - (time.perf_counter() - self._started_s)

    def _note(self, record: Record) -> None:
        seconds = time.perf_counter() - self._started_s
        self._metrics.duration.labels(self._endpoint.name).observe(seconds)
        usage = self._collector.usage
        record.details |= {
            "model": self._request.model[:100],
            "stream": self._request.is_stream,
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "completion_tokens": usage.completion_tokens,
            "finish": [choice.finish_reason for choice in self._collector.choices],
        }


def _code(failure: Failure) -> str:
    """A failure's name in log and metrics."""
    return failure.code or str(failure.status)


async def _departure(receive: Receive) -> None:
    """Returns when the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send_part(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": True})
