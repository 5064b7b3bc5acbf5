"""The routes, and what happens to requests before and after the engine."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from mlx_step35.api.anthropic import parse_messages
from mlx_step35.api.failures import Failure, FailureError, bad_request, overload, unknown_model
from mlx_step35.api.models import anthropic_list, openai_list
from mlx_step35.api.schema import SCHEMAS
from mlx_step35.api.sse import to_json
from mlx_step35.api.types import GenerationRequest
from mlx_step35.engine import request as engine_request
from mlx_step35.engine.engine import Engine, OverloadedError
from mlx_step35.errors import PromptTooLongError, RequestError, quoted
from mlx_step35.http.access import AccessLog
from mlx_step35.http.answering import Answer
from mlx_step35.http.body import parse_json, read_body
from mlx_step35.http.endpoints import CHAT, COMPLETIONS, MESSAGES, RESPONSES, Endpoint, R
from mlx_step35.http.errors import dialect_of, error_response
from mlx_step35.http.gate import Gate
from mlx_step35.http.metrics import Metrics
from mlx_step35.http.preparing import Preparer
from mlx_step35.http.settings import ServerSettings
from mlx_step35.http.threads import in_thread

COUNT_PATH = "/v1/messages/count_tokens"


def create_app(engine: Engine, preparer: Preparer, settings: ServerSettings) -> FastAPI:
    """The application; it starts the engine with the first request cycle and stops it at shutdown."""
    server = Server(engine, preparer, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine.start()
        yield
        await asyncio.to_thread(engine.stop)

    app = FastAPI(title="mlx_step35", lifespan=lifespan, docs_url=None, redoc_url=None)
    _add(app, CHAT.path, "POST", server.generation(CHAT))
    _add(app, COMPLETIONS.path, "POST", server.generation(COMPLETIONS))
    _add(app, MESSAGES.path, "POST", server.generation(MESSAGES))
    _add(app, RESPONSES.path, "POST", server.generation(RESPONSES))
    _add(app, COUNT_PATH, "POST", server.count_tokens)
    readable = {
        "/v1/models": server.list_models,
        "/v1/models/{name:path}": server.get_model,
        "/health": server.health,
        "/metrics": server.show_metrics,
        "/": server.hello,
        "/api/hello": server.hello,
    }
    for path, handler in readable.items():
        _add(app, path, "GET", handler)
        _add(app, path, "HEAD", handler)
    app.add_exception_handler(HTTPException, server.http_failure)
    app.add_exception_handler(RequestError, server.request_failure)
    app.add_exception_handler(FailureError, server.failure)
    app.add_exception_handler(OverloadedError, server.overload)
    app.add_middleware(Gate, settings=settings)
    app.add_middleware(AccessLog, metrics=server.metrics)
    return app


class Server:
    """The handlers."""

    def __init__(self, engine: Engine, preparer: Preparer, settings: ServerSettings) -> None:
        self.metrics = Metrics(engine)
        self._engine = engine
        self._preparer = preparer
        self._settings = settings

    def generation(self, endpoint: Endpoint[R]) -> Callable[[Request], Any]:
        """The handler of an endpoint that generates."""

        async def generate(request: Request) -> Response:
            request.state.record.details["endpoint"] = endpoint.name
            body = await read_body(request, self._settings.max_body_bytes)
            # Long prompts take a while to parse and tokenise, and the loop serves everybody.
            parsed, job = await in_thread(self._prepare, endpoint, body, _client(request))
            self.metrics.note_unknown(endpoint.name, parsed.unknown_fields)
            submission = self._engine.submit(job)
            return Answer(endpoint, parsed, submission, self._preparer, self._settings, self.metrics)

        generate.__name__ = endpoint.name
        return generate

    async def count_tokens(self, request: Request) -> Response:
        request.state.record.details["endpoint"] = "count_tokens"
        body = await read_body(request, self._settings.max_body_bytes)
        return _json({"input_tokens": await in_thread(self._count, body)})

    async def list_models(self, request: Request) -> Response:
        served = self._settings.served
        is_anthropic = dialect_of(request.url.path, request.headers) == "anthropic"
        return _json(anthropic_list(served) if is_anthropic else openai_list(served))

    async def get_model(self, request: Request) -> Response:
        name, served = request.path_params["name"], self._settings.served
        if not served.knows(name):
            raise FailureError(unknown_model(name))
        is_anthropic = dialect_of(request.url.path, request.headers) == "anthropic"
        return _json(served.anthropic(name) if is_anthropic else served.openai(name))

    async def health(self, request: Request) -> Response:
        """200 when ready; 503 with the reason before and after."""
        engine = self._engine
        state = {
            "status": engine.state,
            "model": self._settings.served.name,
            "open_requests": engine.num_open,
            "waiting_requests": engine.num_waiting,
        }
        if engine.load_error is not None:
            state["error"] = str(engine.load_error)
        return _json(state, 200 if engine.state == "ready" else 503)

    async def show_metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def hello(self, request: Request) -> Response:
        """Clients probe the root before they start."""
        return _json({"name": "mlx_step35", "model": self._settings.served.name})

    async def http_failure(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        method, path = request.method, request.url.path
        messages = {404: f"there is no {quoted(path)} here", 405: f"{quoted(path)} does not take {method}"}
        failure = Failure(error.status_code, messages.get(error.status_code, str(error.detail)))
        return self._refuse(request, failure)

    async def request_failure(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestError)
        return self._refuse(request, bad_request(error, dialect_of(request.url.path, request.headers)))

    async def failure(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, FailureError)
        return self._refuse(request, error.failure)

    async def overload(self, request: Request, error: Exception) -> Response:
        return self._refuse(request, overload(str(error)))

    def _refuse(self, request: Request, failure: Failure) -> Response:
        record = request.state.record
        record.details["refused"] = failure.code or failure.field
        dialect = dialect_of(request.url.path, request.headers)
        return error_response(failure, dialect, request.scope)

    def _prepare(self, endpoint: Endpoint[R], body: bytes, client: str) -> tuple[R, engine_request.Request]:
        """Runs on a thread of its own."""
        parsed = endpoint.parse(parse_json(body))
        self._check_model(parsed)
        try:
            return parsed, endpoint.prepare(self._preparer, parsed, client)
        except PromptTooLongError as error:
            error.field = endpoint.prompt_field
            raise

    def _count(self, body: bytes) -> int:
        """Runs on a thread of its own."""
        parsed = parse_messages(parse_json(body), needs_max_tokens=False)
        self._check_model(parsed)
        self.metrics.note_unknown("count_tokens", parsed.unknown_fields)
        return len(self._preparer.prompt(parsed).ids)

    def _check_model(self, parsed: GenerationRequest) -> None:
        if not self._settings.served.knows(parsed.model):
            raise FailureError(unknown_model(parsed.model))


def _add(app: FastAPI, path: str, method: str, handler: Callable[[Request], Any]) -> None:
    app.add_api_route(
        path,
        handler,
        methods=[method],
        response_model=None,
        include_in_schema=method != "HEAD",
        openapi_extra=dict(SCHEMAS.get(path, {})),
    )


def _client(request: Request) -> str:
    """Who asks, for the queue's fairness: an agent's session, or else the program."""
    headers = request.headers
    names = ("x-claude-code-session-id", "session-id", "session_id", "x-session-id", "user-agent")
    return next((headers[name] for name in names if name in headers), "")


def _json(value: Mapping[str, Any], status: int = 200) -> Response:
    return Response(to_json(value), status_code=status, media_type="application/json")
