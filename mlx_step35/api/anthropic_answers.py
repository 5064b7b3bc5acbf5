"""Answers in Anthropic's dialect, whole and streamed."""

import json
from collections.abc import Sequence
from typing import Any

from mlx_step35.api.failures import Failure
from mlx_step35.api.sse import event
from mlx_step35.api.types import Choice, Identity, TokenLogprob, Usage
from mlx_step35.chat.output import ContentDelta, Delta, ReasoningDelta, ToolCallArguments, ToolCallStart

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def message(identity: Identity, choice: Choice, usage: Usage, *, shows_thinking: bool) -> dict[str, Any]:
    """A whole answer."""
    output = choice.output
    content: list[dict[str, Any]] = []
    if output.reasoning and shows_thinking:
        signature = _signature(identity)
        content.append({"type": "thinking", "thinking": output.reasoning, "signature": signature})
    # A message without any block is more than clients expect.
    if output.content or not (output.tool_calls or content):
        content.append({"type": "text", "text": output.content or ""})
    content += [
        {"type": "tool_use", "id": call.id, "name": call.name, "input": json.loads(call.arguments)}
        for call in output.tool_calls
    ]
    return {
        **_message(identity, usage),
        "content": content,
        "stop_reason": _stop_reason(choice),
        "stop_sequence": choice.stop_sequence,
    }


def usage_json(usage: Usage) -> dict[str, Any]:
    """The three kinds of input tokens add up to the prompt."""
    extension = {} if usage.speculation is None else {"step35": dict(usage.speculation)}
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        **extension,
    }


class MessageWriter:
    """Streams a message: blocks one after the other, never overlapping."""

    # An error event says enough: without message_stop nobody takes the text for an answer.
    must_break_off = False

    def __init__(self, identity: Identity, *, shows_thinking: bool) -> None:
        self._identity = identity
        self._shows_thinking = shows_thinking
        self._num_blocks = 0
        self._open: str | None = None
        self._stop: dict[str, str | None] = {}

    def start(self, usage: Usage) -> bytes:
        first = {**_message(self._identity, usage), "content": [], "stop_reason": None, "stop_sequence": None}
        return _event("message_start", message=first) + self.keepalive()

    def keepalive(self) -> bytes:
        return _event("ping")

    def write(self, index: int, deltas: Sequence[Delta], logprobs: Sequence[TokenLogprob]) -> bytes:
        return b"".join(self._write(delta) for delta in deltas)

    def finish(self, index: int, choice: Choice) -> bytes:
        end = self._end_block()
        if not self._num_blocks:
            end = self._begin_block("text", {"type": "text", "text": ""}) + self._end_block()
        self._stop = {"stop_reason": _stop_reason(choice), "stop_sequence": choice.stop_sequence}
        return end

    def close(self, usage: Usage) -> bytes:
        # Some clients read the input's tokens here, others at the start.
        last = _event("message_delta", delta=self._stop, usage=usage_json(usage))
        return last + _event("message_stop")

    def fail(self, failure: Failure, request_id: str) -> bytes:
        return event(failure.body("anthropic", request_id), "error")

    def _write(self, delta: Delta) -> bytes:
        match delta:
            case ReasoningDelta(text):
                if not self._shows_thinking:
                    return b""
                thinking = {"type": "thinking", "thinking": "", "signature": ""}
                return self._enter("thinking", thinking) + self._delta("thinking_delta", thinking=text)
            case ContentDelta(text):
                begin = self._enter("text", {"type": "text", "text": ""})
                return begin + self._delta("text_delta", text=text)
            case ToolCallStart(_, call_id, name):
                block: dict[str, Any] = {"type": "tool_use", "id": call_id, "name": name, "input": {}}
                return self._end_block() + self._begin_block("tool_use", block)
            case ToolCallArguments(_, text):
                return self._delta("input_json_delta", partial_json=text)

    def _enter(self, kind: str, block: dict[str, Any]) -> bytes:
        """Begin a block unless one of its kind is open."""
        return b"" if self._open == kind else self._end_block() + self._begin_block(kind, block)

    def _begin_block(self, kind: str, block: dict[str, Any]) -> bytes:
        self._open = kind
        self._num_blocks += 1
        return _event("content_block_start", index=self._num_blocks - 1, content_block=block)

    def _end_block(self) -> bytes:
        if self._open is None:
            return b""
        signed = b""
        if self._open == "thinking":
            signed = self._delta("signature_delta", signature=_signature(self._identity))
        self._open = None
        return signed + _event("content_block_stop", index=self._num_blocks - 1)

    def _delta(self, kind: str, **values: Any) -> bytes:
        return _event("content_block_delta", index=self._num_blocks - 1, delta={"type": kind, **values})


def _event(name: str, **values: Any) -> bytes:
    return event({"type": name, **values}, name)


def _message(identity: Identity, usage: Usage) -> dict[str, Any]:
    return {
        "id": identity.id,
        "type": "message",
        "role": "assistant",
        "model": identity.model,
        "usage": usage_json(usage),
    }


def _stop_reason(choice: Choice) -> str:
    return "stop_sequence" if choice.stop_sequence is not None else _STOP_REASONS[choice.finish_reason]


def _signature(identity: Identity) -> str:
    """Nothing is signed here; clients echo the string and some need one that is not empty."""
    return f"step35-{identity.id}"
