"""What clients make of earlier turns, brought to one spelling, so that the next turn is the same prompt."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mlx_step35.api.types import Message

# Claude Code's first system line: it changes with every session, some builds change it with every request.
BILLING_HEADER = "x-anthropic-billing-header:"

_THINK, _END_THINK = "<think>", "</think>"


def without_billing_headers(messages: Sequence[Message]) -> list[Message]:
    """The messages, those of the system without Claude Code's billing line."""
    return [_without_billing_header(message) for message in messages]


def readable_arguments(arguments: Any) -> Any:
    """Arguments of an echoed call; what is no JSON object is kept as text under one name.

    Codex 0.40 glues the arguments of two calls together. A refusal would come back with every later request,
    because the history keeps them.
    """
    if arguments is None or isinstance(arguments, Mapping):
        return arguments
    if isinstance(arguments, str):
        if not arguments.strip():
            return {}
        try:
            value = json.loads(arguments)
        except (ValueError, RecursionError):
            return {"arguments": arguments}
        if value is None or isinstance(value, Mapping):
            return value
    return {"arguments": arguments}


def _without_billing_header(message: Message) -> Message:
    content = message.get("content")
    if message.get("role") not in ("system", "developer"):
        return message
    if isinstance(content, str):
        return {**message, "content": _drop_header(content)}
    if isinstance(content, list):
        return {**message, "content": [_drop_part_header(part) for part in content]}
    return message


def _drop_part_header(part: Any) -> Any:
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return {**part, "text": _drop_header(part["text"])}
    return part


def _drop_header(text: str) -> str:
    if not text.startswith(BILLING_HEADER):
        return text
    _, _, rest = text.partition("\n")
    return rest.lstrip("\n")


def split_thoughts(content: str) -> tuple[str, str]:
    """Thoughts that a client keeps inline in an assistant's text, and the text behind them."""
    if not content.lstrip().startswith(_THINK):
        return "", content
    thoughts, closer, text = content.lstrip().removeprefix(_THINK).partition(_END_THINK)
    return (thoughts.strip("\n"), text.lstrip("\n")) if closer else ("", content)
