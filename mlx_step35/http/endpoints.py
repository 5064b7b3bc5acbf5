"""The endpoints that generate, as data: how each reads a request and writes an answer."""

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from mlx_step35.api import anthropic_answers, openai_answers, responses_answers
from mlx_step35.api.anthropic import parse_messages
from mlx_step35.api.failures import Dialect
from mlx_step35.api.openai import parse_chat, parse_completion
from mlx_step35.api.responses import parse_response
from mlx_step35.api.types import ChatRequest, Choice, CompletionRequest, GenerationRequest, Identity, Usage
from mlx_step35.api.writer import Writer
from mlx_step35.engine.request import Request
from mlx_step35.http.preparing import Preparer

R = TypeVar("R", bound=GenerationRequest)


@dataclass(frozen=True, slots=True)
class Endpoint(Generic[R]):
    """One endpoint. `prompt_field` is what a prompt that is too long is called there."""

    name: str
    path: str
    dialect: Dialect
    id_prefix: str
    prompt_field: str
    parse: Callable[[Mapping[str, Any]], R]
    prepare: Callable[[Preparer, R, str], Request]
    writer: Callable[[Preparer, Identity, R], Writer]
    whole: Callable[[Preparer, Identity, R, Sequence[Choice], Usage], Mapping[str, Any]]

    def identity(self, model: str) -> Identity:
        """A new answer's name."""
        return Identity(f"{self.id_prefix}{uuid.uuid4().hex[:24]}", model, int(time.time()))


CHAT: Endpoint[ChatRequest] = Endpoint(
    name="chat",
    path="/v1/chat/completions",
    dialect="openai",
    id_prefix="chatcmpl-",
    prompt_field="messages",
    parse=parse_chat,
    prepare=lambda preparer, request, client: preparer.chat(request, "call_", client),
    writer=lambda preparer, identity, request: openai_answers.ChatWriter(
        identity, request.num_choices, includes_usage=request.includes_usage
    ),
    whole=lambda preparer, identity, request, choices, usage: openai_answers.chat_completion(
        identity, choices, usage
    ),
)

COMPLETIONS: Endpoint[CompletionRequest] = Endpoint(
    name="completions",
    path="/v1/completions",
    dialect="openai",
    id_prefix="cmpl-",
    prompt_field="prompt",
    parse=parse_completion,
    prepare=lambda preparer, request, client: preparer.completion(request, client),
    writer=lambda preparer, identity, request: openai_answers.CompletionWriter(
        identity, preparer.echoes(request), includes_usage=request.includes_usage
    ),
    whole=lambda preparer, identity, request, choices, usage: openai_answers.text_completion(
        identity, choices, usage, preparer.echoes(request)
    ),
)

MESSAGES: Endpoint[ChatRequest] = Endpoint(
    name="messages",
    path="/v1/messages",
    dialect="anthropic",
    id_prefix="msg_",
    prompt_field="messages",
    parse=parse_messages,
    prepare=lambda preparer, request, client: preparer.chat(request, "toolu_", client),
    writer=lambda preparer, identity, request: anthropic_answers.MessageWriter(
        identity, shows_thinking=request.thinking.is_shown
    ),
    whole=lambda preparer, identity, request, choices, usage: anthropic_answers.message(
        identity, choices[0], usage, shows_thinking=request.thinking.is_shown
    ),
)

RESPONSES: Endpoint[ChatRequest] = Endpoint(
    name="responses",
    path="/v1/responses",
    dialect="openai",
    id_prefix="resp_",
    prompt_field="input",
    parse=parse_response,
    prepare=lambda preparer, request, client: preparer.chat(request, "call_", client),
    writer=lambda preparer, identity, request: responses_answers.ResponseWriter(identity, request),
    whole=lambda preparer, identity, request, choices, usage: responses_answers.response(
        identity, request, choices[0], usage
    ),
)
