"""What a request means and what its answer was, whatever dialect they are spoken in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mlx_step35.chat.output import ParsedOutput

FinishReason = Literal["stop", "length", "tool_calls"]
Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Whether the model may, must or must not call; `name` is set for one named tool."""

    mode: Literal["auto", "none", "required", "named"] = "auto"
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Sampling:
    """What a caller asked for; None is the server's default."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Thinking:
    """`is_on`: a thinking block, else an empty one. `is_shown`: whether the caller gets to see it."""

    is_on: bool = True
    is_shown: bool = True
    budget: int | None = None


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What every endpoint that generates has in common.

    `max_tokens` None is the rest of the context; `top_logprobs` None is no log-probabilities.
    """

    model: str
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    max_tokens: int | None = None
    num_choices: int = 1
    is_stream: bool = False
    includes_usage: bool = False
    top_logprobs: int | None = None
    # Fields that nobody knows: ignored, but not in secret.
    unknown_fields: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ChatRequest(GenerationRequest):
    """A conversation to continue; messages and tools in the form of chat completions.

    `schema` is what the answer has to follow, None for free text.
    """

    messages: Sequence[Message] = ()
    tools: Sequence[Mapping[str, Any]] = ()
    # Names of tools whose whole schema has to be enforced; no part of the prompt.
    strict_tools: frozenset[str] = frozenset()
    tool_choice: ToolChoice = field(default_factory=ToolChoice)
    has_parallel_calls: bool = True
    schema: Mapping[str, Any] | None = None
    thinking: Thinking = field(default_factory=Thinking)
    template_variables: Mapping[str, Any] = field(default_factory=dict)
    # What an answer of the Responses API says again, as it was given.
    repeated: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CompletionRequest(GenerationRequest):
    """Text or token ids to continue, as they are."""

    prompts: Sequence[str | tuple[int, ...]] = ()
    echoes_prompt: bool = False


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request; `speculation` is our own extension."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    speculation: Mapping[str, Any] | None = None

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token's log-probability, and those of the likeliest tokens in its place.

    Tokens are their bytes, which may be part of a character.
    """

    token: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Choice:
    """A finished answer. `stop_sequence` is the caller's string that ended it."""

    output: ParsedOutput
    finish_reason: FinishReason
    stop_sequence: str | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Identity:
    """What all events of one answer share."""

    id: str
    model: str
    created: int
