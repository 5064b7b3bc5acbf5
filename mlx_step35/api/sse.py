"""Server-sent events on the wire."""

import json
from typing import Any

DONE = b"data: [DONE]\n\n"


def to_json(value: Any) -> bytes:
    """Compact JSON in UTF-8; a lone surrogate, which UTF-8 cannot hold, becomes a question mark."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")


def event(data: Any, name: str | None = None) -> bytes:
    """One event. The space behind `data:` is needed: StepDeepResearch looks for it."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + to_json(data) + b"\n\n"
