"""Answers in OpenAI's dialect: chat completions and legacy completions, whole and streamed."""

import codecs
from collections.abc import Mapping, Sequence
from typing import Any

from mlx_step35.api.failures import Failure
from mlx_step35.api.sse import DONE, event
from mlx_step35.api.types import Choice, Identity, TokenLogprob, Usage
from mlx_step35.chat.output import ContentDelta, Delta, ReasoningDelta, ToolCallArguments, ToolCallStart

# What an impossible token's log-probability is called: JSON has no infinity.
MIN_LOGPROB = -9999.0


def chat_completion(identity: Identity, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
    """A whole answer of chat completions."""
    return {
        "id": identity.id,
        "object": "chat.completion",
        "created": identity.created,
        "model": identity.model,
        "choices": [
            {
                "index": index,
                "message": _message(choice),
                "logprobs": _chat_logprobs(choice.logprobs),
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(choices)
        ],
        "usage": usage_json(usage),
    }


def text_completion(
    identity: Identity, choices: Sequence[Choice], usage: Usage, echoes: Sequence[str] = ()
) -> dict[str, Any]:
    """A whole answer of legacy completions; `echoes` are the prompts to repeat, one per choice."""
    entries = []
    for index, choice in enumerate(choices):
        text = (echoes[index] if echoes else "") + (choice.output.content or "")
        logprobs = _text_logprobs(choice.logprobs, _Offset())
        entries.append(
            {"text": text, "index": index, "logprobs": logprobs, "finish_reason": choice.finish_reason}
        )
    return {
        "id": identity.id,
        "object": "text_completion",
        "created": identity.created,
        "model": identity.model,
        "choices": entries,
        "usage": usage_json(usage),
    }


def usage_json(usage: Usage) -> dict[str, Any]:
    """OpenAI's usage with our extension."""
    extension = {} if usage.speculation is None else {"step35": dict(usage.speculation)}
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        **extension,
    }


class ChatWriter:
    """Streams chat completions."""

    # Codex 0.40 to 0.94 and StepDeepResearch ignore the error and believe a stream that ends cleanly.
    must_break_off = True

    def __init__(self, identity: Identity, num_choices: int = 1, *, includes_usage: bool = False) -> None:
        self._identity = identity
        self._num_choices = num_choices
        self._includes_usage = includes_usage
        # Log-probabilities of tokens whose text is still held back.
        self._logprobs: list[list[TokenLogprob]] = [[] for _ in range(num_choices)]

    def start(self, usage: Usage) -> bytes:
        delta = {"role": "assistant", "content": ""}
        return b"".join(self._chunk(index, delta) for index in range(self._num_choices))

    def keepalive(self) -> bytes:
        return self._chunk(0, {})

    def write(self, index: int, deltas: Sequence[Delta], logprobs: Sequence[TokenLogprob]) -> bytes:
        self._logprobs[index] += logprobs
        return b"".join(self._chunk(index, _delta(delta)) for delta in deltas)

    def finish(self, index: int, choice: Choice) -> bytes:
        return self._chunk(index, {}, choice.finish_reason)

    def close(self, usage: Usage) -> bytes:
        last = self._event([], usage=usage_json(usage)) if self._includes_usage else b""
        return last + DONE

    def fail(self, failure: Failure, request_id: str) -> bytes:
        return event(failure.body("openai"))

    def _chunk(self, index: int, delta: Mapping[str, Any], finish_reason: str | None = None) -> bytes:
        logprobs = _chat_logprobs(self._logprobs[index])
        self._logprobs[index] = []
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return self._event([choice])

    def _event(self, choices: Sequence[Any], **more: Any) -> bytes:
        identity = self._identity
        return event(
            {
                "id": identity.id,
                "object": "chat.completion.chunk",
                "created": identity.created,
                "model": identity.model,
                "choices": choices,
                **more,
            }
        )


class CompletionWriter:
    """Streams legacy completions."""

    must_break_off = True

    def __init__(
        self, identity: Identity, echoes: Sequence[str] = (), *, includes_usage: bool = False
    ) -> None:
        self._identity = identity
        self._echoes = echoes
        self._includes_usage = includes_usage
        self._offsets: dict[int, _Offset] = {}

    def start(self, usage: Usage) -> bytes:
        if not self._echoes:
            return self._chunk(0, "")
        return b"".join(self._chunk(index, text) for index, text in enumerate(self._echoes))

    def keepalive(self) -> bytes:
        return self._chunk(0, "")

    def write(self, index: int, deltas: Sequence[Delta], logprobs: Sequence[TokenLogprob]) -> bytes:
        text = "".join(delta.text for delta in deltas if isinstance(delta, ContentDelta))
        return self._chunk(index, text, logprobs) if text or logprobs else b""

    def finish(self, index: int, choice: Choice) -> bytes:
        return self._chunk(index, "", (), choice.finish_reason)

    def close(self, usage: Usage) -> bytes:
        last = self._event([], usage=usage_json(usage)) if self._includes_usage else b""
        return last + DONE

    def fail(self, failure: Failure, request_id: str) -> bytes:
        return event(failure.body("openai"))

    def _chunk(
        self, index: int, text: str, logprobs: Sequence[TokenLogprob] = (), finish_reason: str | None = None
    ) -> bytes:
        shown = _text_logprobs(logprobs, self._offsets.setdefault(index, _Offset()))
        return self._event(
            [{"text": text, "index": index, "logprobs": shown, "finish_reason": finish_reason}]
        )

    def _event(self, choices: Sequence[Any], **more: Any) -> bytes:
        identity = self._identity
        return event(
            {
                "id": identity.id,
                "object": "text_completion",
                "created": identity.created,
                "model": identity.model,
                "choices": choices,
                **more,
            }
        )


def _message(choice: Choice) -> dict[str, Any]:
    output = choice.output
    message: dict[str, Any] = {"role": "assistant", "content": output.content, "refusal": None}
    # An answer has a text, also an empty one, unless it is nothing but calls.
    if output.content is None and not output.tool_calls:
        message["content"] = ""
    if output.reasoning is not None:
        message |= {"reasoning_content": output.reasoning, "reasoning": output.reasoning}
    if output.tool_calls:
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in output.tool_calls
        ]
    return message


def _delta(delta: Delta) -> dict[str, Any]:
    match delta:
        case ReasoningDelta(text):
            # Codex and StepDeepResearch read the one name, everybody else the other; nobody adds them up.
            return {"reasoning_content": text, "reasoning": text}
        case ContentDelta(text):
            return {"content": text}
        case ToolCallStart(index, call_id, name):
            function = {"name": name, "arguments": ""}
            return {"tool_calls": [{"index": index, "id": call_id, "type": "function", "function": function}]}
        case ToolCallArguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}


def _chat_logprobs(logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
    if not logprobs:
        return None
    content = [
        {
            **_token(one.token, one.logprob),
            "top_logprobs": [_token(token, logprob) for token, logprob in one.top],
        }
        for one in logprobs
    ]
    return {"content": content, "refusal": None}


def _token(token: bytes, logprob: float) -> dict[str, Any]:
    return {"token": _name(token), "logprob": max(logprob, MIN_LOGPROB), "bytes": list(token)}


def _name(token: bytes) -> str:
    """A token's text; parts of characters, which have none, are told apart by their bytes."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


class _Offset:
    """The length of a text that grows token by token."""

    def __init__(self) -> None:
        self._length = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def take(self, token: bytes) -> int:
        """Where the token begins: inside a character, where that one does."""
        start = self._length
        self._length += len(self._decoder.decode(token))
        return start


def _text_logprobs(logprobs: Sequence[TokenLogprob], offset: _Offset) -> dict[str, Any] | None:
    if not logprobs:
        return None
    return {
        "tokens": [_name(one.token) for one in logprobs],
        "token_logprobs": [max(one.logprob, MIN_LOGPROB) for one in logprobs],
        "top_logprobs": [
            {_name(token): max(logprob, MIN_LOGPROB) for token, logprob in one.top} for one in logprobs
        ],
        "text_offset": [offset.take(one.token) for one in logprobs],
    }
