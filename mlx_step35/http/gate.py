"""Who may talk to the server: programs of this machine, and those with the key; web pages only if allowed.

Every web page in a browser can send requests to loopback, so the names of both ends are checked: `Host` must
be a loopback name (a page could have pointed its own name here) and a foreign `Origin` is refused.
"""

import hmac
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_step35.api.failures import Failure
from mlx_step35.http.errors import dialect_of, error_response
from mlx_step35.http.settings import ServerSettings

# Probes of clients and supervisors, which have no key and learn nothing.
OPEN_PATHS = frozenset({"/", "/health", "/api/hello"})


class Gate:
    """Middleware in front of every route."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        is_welcome = origin is not None and self._is_welcome(origin)

        async def send_with_cors(message: Message) -> None:
            if message["type"] == "http.response.start" and is_welcome:
                answer = MutableHeaders(scope=message)
                answer["access-control-allow-origin"] = origin or ""
                answer["access-control-expose-headers"] = "request-id, x-request-id, retry-after"
                answer["vary"] = "Origin"
            await send(message)

        failure = self._refusal(scope, headers, is_welcome)
        if failure is not None:
            dialect = dialect_of(scope["path"], headers)
            await error_response(failure, dialect, scope)(scope, receive, send_with_cors)
        elif scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            await _preflight(headers)(scope, receive, send_with_cors)
        else:
            await self._app(scope, receive, send_with_cors)

    def _refusal(self, scope: Scope, headers: Headers, is_welcome: bool) -> Failure | None:
        if self._settings.is_loopback and not is_loopback(headers.get("host", "")):
            return Failure(403, "this server answers only to loopback names in the Host header")
        if "origin" in headers and not is_welcome:
            return Failure(403, "requests from this web page are not allowed; see --cors-origin")
        is_open = scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS"
        if self._settings.api_key is None or is_open:
            return None
        return self._check_key(headers, self._settings.api_key)

    def _check_key(self, headers: Headers, key: str) -> Failure | None:
        """Claude Code may send both kinds of key at once; one right one is enough."""
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = [token.strip()] if scheme.lower() == "bearer" else []
        if "x-api-key" in headers:
            given.append(headers["x-api-key"])
        if not given:
            return Failure(401, "an API key is needed: Authorization: Bearer KEY, or x-api-key: KEY")
        # Constant time, and every key compared.
        matches = [hmac.compare_digest(one.encode("latin-1"), key.encode()) for one in given]
        return None if any(matches) else Failure(401, "wrong API key", code="invalid_api_key")

    def _is_welcome(self, origin: str) -> bool:
        allowed = self._settings.cors_origins
        return "*" in allowed or origin in allowed or is_loopback(_host(origin))


def is_loopback(host: str) -> bool:
    """Whether a host, with or without port, is a name of this machine for itself."""
    name = host.strip().lower()
    if name.startswith("["):
        address, bracket, port = name[1:].partition("]")
        return address == "::1" and bool(bracket) and (not port or port.startswith(":"))
    if name == "::1":
        return True
    name = name.rpartition(":")[0] if ":" in name else name
    if name == "localhost" or name.endswith(".localhost"):
        return True
    parts = name.split(".")
    return (
        len(parts) == 4 and parts[0] == "127" and all(part.isascii() and part.isdecimal() for part in parts)
    )


def _host(origin: str) -> str:
    """An origin's host and port; nothing for what is no origin."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


def _preflight(headers: Headers) -> Response:
    answer = {
        "access-control-allow-methods": "GET, HEAD, POST, OPTIONS",
        "access-control-allow-headers": headers.get("access-control-request-headers", "*"),
        "access-control-max-age": "600",
    }
    # A page from the internet that wants to reach loopback; whether it may has been decided.
    if headers.get("access-control-request-private-network") == "true":
        answer["access-control-allow-private-network"] = "true"
    return Response(status_code=204, headers=answer)
