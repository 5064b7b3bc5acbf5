"""What every dialect's writer offers: an answer becomes server-sent events, piece by piece."""

from collections.abc import Sequence
from typing import Protocol

from mlx_step35.api.failures import Failure
from mlx_step35.api.types import Choice, TokenLogprob, Usage
from mlx_step35.chat.output import Delta


class Writer(Protocol):
    """Turns one answer into bytes on the wire. Every method returns whole events, or nothing."""

    # Whether a client could take a stream that ends after an error for a whole answer.
    must_break_off: bool

    def start(self, usage: Usage) -> bytes:
        """The first events, before anything was generated."""

    def keepalive(self) -> bytes:
        """An event that changes nothing; comments do not reset every client's clock."""

    def write(self, index: int, deltas: Sequence[Delta], logprobs: Sequence[TokenLogprob]) -> bytes:
        """What became certain in choice `index`."""

    def finish(self, index: int, choice: Choice) -> bytes:
        """The end of choice `index`."""

    def close(self, usage: Usage) -> bytes:
        """The last events, after all choices."""

    def fail(self, failure: Failure, request_id: str) -> bytes:
        """The last events of an answer that cannot be finished."""
