"""Failures as HTTP answers: a status, and a body in the dialect of the endpoint."""

from dataclasses import dataclass
from typing import Any, Literal

from mlx_step35.errors import PromptTooLongError, RequestError, quoted

Dialect = Literal["openai", "anthropic"]

RETRY_AFTER_S = 5
# Templates and schema compilers quote what they dislike, and the path of a field may hold its name.
MAX_MESSAGE = 1000
MAX_FIELD = 200

_OPENAI_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    408: "server_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "server_error",
    529: "server_error",
}
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a request failed. `field` and `code` as in RequestError."""

    status: int
    message: str
    field: str | None = None
    code: str | None = None
    retry_after_s: int | None = None

    def status_for(self, dialect: Dialect) -> int:
        """Overload is 529 in Anthropic's dialect; in OpenAI's 503, because 429 ends Codex at once."""
        return 529 if self.status == 503 and dialect == "anthropic" else self.status

    def body(self, dialect: Dialect, request_id: str = "") -> dict[str, Any]:
        """The JSON body."""
        message = _cut(self.message, MAX_MESSAGE)
        if dialect == "anthropic":
            kind = _ANTHROPIC_TYPES.get(self.status, "invalid_request_error")
            error = {"type": kind, "message": message}
            return {"type": "error", "error": error, "request_id": request_id}
        kind = _OPENAI_TYPES.get(self.status, "invalid_request_error")
        field = self.field and _cut(self.field, MAX_FIELD)
        return {"error": {"message": message, "type": kind, "param": field, "code": self.code}}


class FailureError(Exception):
    """Raised where a request ends with something else than an answer."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


INTERNAL = Failure(500, "the server failed on this request; its log says why", code="internal_error")


def bad_request(error: RequestError, dialect: Dialect) -> Failure:
    """The caller's fault, in words that clients recognise."""
    if not isinstance(error, PromptTooLongError):
        return Failure(400, str(error), error.field, error.code)
    if dialect == "anthropic":
        message = f"prompt is too long: {error.num_tokens} tokens > {error.limit} maximum"
    else:
        message = (
            f"This model's maximum context length is {error.limit} tokens. However, your messages "
            f"resulted in {error.num_tokens} tokens. Please reduce the length of the messages."
        )
    return Failure(400, message, error.field, error.code)


def overload(reason: str) -> Failure:
    """No room, or no time left; the same request may succeed a little later."""
    return Failure(503, f"overloaded: {reason}", code="overloaded", retry_after_s=RETRY_AFTER_S)


def unknown_model(name: str) -> Failure:
    return Failure(404, f"model: there is no model named {quoted(name)} here", "model", "model_not_found")


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]}..."
