"""What is asked of the engine, and the events it answers with."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from mlx_step35.chat.output import Delta, ParsedOutput
from mlx_step35.decoding import DecodeStats, MTPChoice
from mlx_step35.engine.session import Reuse
from mlx_step35.sampling import Constraint, SamplingParams


class Output(Protocol):
    """Where accepted tokens go: `chat.text_stream.TextStream`. Called by the worker, knows no arrays."""

    @property
    def stopped(self) -> bool: ...
    @property
    def stop_sequence(self) -> str | None: ...
    @property
    def is_reasoning(self) -> bool: ...
    @property
    def reasoning_tokens(self) -> int: ...
    @property
    def result(self) -> ParsedOutput: ...
    def push(self, token: int) -> list[Delta]: ...
    def content_tokens(self) -> list[int]: ...
    def finish(self, reason: str) -> list[Delta]: ...


@dataclass(frozen=True, slots=True)
class Candidate:
    """One answer to make. `max_tokens` is at least 1; `boundaries` are ends of turns in the prompt."""

    prompt: Sequence[int]
    output: Output
    sampling: SamplingParams
    max_tokens: int
    constraint: Constraint | None = None
    boundaries: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """Answers to make one after the other; those with the same prompt share it through the prompt cache.

    `client` names who asks, so that one client with many requests does not hold up the others.
    """

    candidates: tuple[Candidate, ...]
    mtp: MTPChoice = "auto"
    lookup: bool = True
    # How many of the likeliest tokens to report beside each token; None reports no log-probabilities.
    top_logprobs: int | None = None
    client: str = ""
    cancelled: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True, slots=True)
class Logprobs:
    """A token's log-probability, and the likeliest tokens in its place with theirs."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of arrays: in use, the most so far, and in saved prefixes."""

    active_bytes: int
    peak_bytes: int
    prompt_cache_bytes: int


class CancelledError(Exception):
    """Ends a prefill whose client has left."""


@dataclass(frozen=True, slots=True)
class Started:
    """Work on a candidate begins; `reuse` says how much of its prompt is there already."""

    index: int
    reuse: Reuse


@dataclass(frozen=True, slots=True)
class Progress:
    """So many of the prompt's tokens are done."""

    index: int
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Token:
    """A token was taken, and what became certain with it.

    `is_reasoning`: it is part of the thinking. `logprobs`, if asked for, are those of all tokens that became
    content with this one.
    """

    index: int
    deltas: Sequence[Delta]
    logprobs: Sequence[Logprobs] = ()
    is_reasoning: bool = False


@dataclass(frozen=True, slots=True)
class Finished:
    """A candidate is done, with the last of its text; `tokens` are all that were sampled.

    `logprobs`, if asked for, are those of the tokens that became content with the end.
    """

    index: int
    deltas: Sequence[Delta]
    output: ParsedOutput
    stop_sequence: str | None
    tokens: Sequence[int]
    reasoning_tokens: int
    reuse: Reuse
    stats: DecodeStats
    memory: Memory
    logprobs: Sequence[Logprobs] = ()


@dataclass(frozen=True, slots=True)
class Failed:
    """The request ends here. A RequestError is the caller's fault, anything else has been logged."""

    error: Exception


Event = Started | Progress | Token | Finished | Failed
