"""Failures as HTTP responses in the dialect of the caller."""

from collections.abc import Mapping

from starlette.responses import Response
from starlette.types import Scope

from mlx_step35.api.failures import Dialect, Failure
from mlx_step35.api.sse import to_json


def dialect_of(path: str, headers: Mapping[str, str]) -> Dialect:
    """Which dialect a caller speaks; the version header decides where the path says nothing."""
    if path.startswith("/v1/messages"):
        return "anthropic"
    if path.startswith(("/v1/chat/", "/v1/completions", "/v1/responses")):
        return "openai"
    return "anthropic" if "anthropic-version" in headers else "openai"


def error_response(failure: Failure, dialect: Dialect, scope: Scope) -> Response:
    """The response for a failure."""
    request_id = scope.get("state", {}).get("request_id", "")
    headers = {}
    if failure.retry_after_s is not None:
        headers["retry-after"] = str(failure.retry_after_s)
    if failure.status == 401:
        headers["www-authenticate"] = "Bearer"
    return Response(
        to_json(failure.body(dialect, request_id)),
        status_code=failure.status_for(dialect),
        headers=headers,
        media_type="application/json",
    )
