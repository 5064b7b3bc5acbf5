"""What clients make of earlier turns, brought to one spelling, so that the next turn is the same prompt."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mlx_step35.api.types import Message

# Claude Code's first system line: it changes with every session, some builds change it with every request.
BILLING_HEADER = "x-anthropic-billing-header:"
_BILLING_LINE = re.compile(rf"^{BILLING_HEADER}[^\n]*\n*", re.MULTILINE)

_THINK, _END_THINK = "<think>", "</think>"


def without_billing_headers(messages: Sequence[Message]) -> list[Message]:
    """Normalised messages, those of the system without Claude Code's billing line."""
    kept = []
    for message in messages:
        if message["role"] != "system" or BILLING_HEADER not in message["content"]:
            kept.append(message)
        elif content := _BILLING_LINE.sub("", message["content"]):
            kept.append({**message, "content": content})
    return kept


def on_its_own_line(part: Any) -> Any:
    """A part of a system message; a billing header gets its own line, since parts are joined as they are."""
    text = part.get("text") if isinstance(part, Mapping) else None
    if isinstance(text, str) and text.startswith(BILLING_HEADER) and not text.endswith("\n"):
        return {**part, "text": f"{text}\n"}
    return part


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


def split_thoughts(content: str) -> tuple[str, str]:
    """Thoughts that a client keeps inline in an assistant's text, and the text behind them."""
    if not content.lstrip().startswith(_THINK):
        return "", content
    thoughts, closer, text = content.lstrip().removeprefix(_THINK).partition(_END_THINK)
    return (thoughts.strip("\n"), text.lstrip("\n")) if closer else ("", content)
