"""What the server was started with."""

from dataclasses import dataclass

from mlx_step35.api.models import Served
from mlx_step35.decoding import MTPChoice


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What holds where a request says nothing. `max_tokens` None is the rest of the context.

    `keeps_billing_header`: whether Claude Code's billing line, which changes, stays in the prompt.
    """

    temperature: float = 1.0
    top_p: float = 0.95
    max_tokens: int | None = None
    mtp: MTPChoice = "auto"
    lookup: bool = True
    keeps_billing_header: bool = False


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Limits and access.

    `is_loopback`: only programs of this machine can connect. `shutdown_s`: how long answers under way may go
    on after a signal.
    """

    served: Served
    defaults: GenerationDefaults = GenerationDefaults()
    api_key: str | None = None
    is_loopback: bool = True
    cors_origins: frozenset[str] = frozenset()
    max_body_bytes: int = 32 * 2**20
    keepalive_s: float = 10.0
    request_timeout_s: float = 3600.0
    shutdown_s: float = 10.0
