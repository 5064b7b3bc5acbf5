"""The exception tree: what a user can cause derives from Step35Error; all else that escapes is a bug.

Step35Error
├── ConfigError            config.json says something this model cannot be
├── CheckpointError        weights are missing, left over, misshapen or damaged
├── CacheRollbackError     more rows to forget than the cache still holds
├── CapacityError          it does not fit the memory of this machine
└── RequestError           the caller's fault (HTTP 400), with the field's name
    └── PromptTooLongError
"""

_MAX_QUOTED = 100


class Step35Error(Exception):
    """Base of every error the package raises on purpose."""


class ConfigError(Step35Error):
    """A field of config.json is missing, malformed or describes another model."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"config field '{field}': {message}")
        self.field = field


class CheckpointError(Step35Error):
    """The weights on disk are not a complete, undamaged checkpoint of the configured model."""


class CacheRollbackError(Step35Error):
    """A cache no longer holds the rows a rollback would bring back; the cache is unchanged."""


class CapacityError(Step35Error):
    """The request, or the model, does not fit the memory of this machine."""


class RequestError(Step35Error):
    """The caller asked for something invalid: `field` names the parameter, `code` is a stable identifier."""

    def __init__(self, message: str, field: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.field = field
        self.code = code


class PromptTooLongError(RequestError):
    """The prompt has more tokens than the context holds."""

    def __init__(self, num_tokens: int, limit: int) -> None:
        message = f"the prompt has {num_tokens} tokens, the context holds {limit}"
        super().__init__(message, field="prompt", code="context_length_exceeded")
        self.num_tokens = num_tokens
        self.limit = limit


def quoted(text: object) -> str:
    """Something of the caller's for a message, which must not become as long as he likes."""
    shown = repr(text[:_MAX_QUOTED] if isinstance(text, str) else text)
    return shown if len(shown) <= _MAX_QUOTED else f"{shown[:_MAX_QUOTED]}..."
