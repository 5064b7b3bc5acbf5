"""Recorded requests of real clients: every answer, or event of one, validates against the SDKs' types."""

import json
from pathlib import Path
from typing import Any

import pytest
from anthropic.types import Message, MessageTokensCount, RawMessageStreamEvent
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from tests.server.running import KEY, MODEL, Running

RECORDINGS = sorted((Path(__file__).parents[1] / "clients" / "requests").glob("*.json"))
WHOLE: dict[str, Any] = {
    "/v1/chat/completions": ChatCompletion,
    "/v1/completions": Completion,
    "/v1/messages": Message,
    "/v1/messages/count_tokens": MessageTokensCount,
    "/v1/responses": Response,
}
EVENTS: dict[str, Any] = {
    "/v1/chat/completions": ChatCompletionChunk,
    "/v1/messages": RawMessageStreamEvent,
    "/v1/responses": ResponseStreamEvent,
}
# What this server refuses, or does not have, and why that is right.
REFUSED = {
    "anthropic-python-2.14.0_6": 400,  # an image
    "openai-python-1.0.0_2": 400,  # legacy functions
    "openai-python-3.57.0_6": 400,  # an image
    "openai-python-3.57.0_9": 404,  # embeddings
}


@pytest.mark.parametrize("file", RECORDINGS, ids=lambda file: file.stem)
def test_recorded_request(server: Running, file: Path) -> None:
    recorded = json.loads(file.read_text())
    path = recorded["path"].partition("?")[0]
    headers = {
        name: f"Bearer {KEY}" if name == "authorization" else KEY if name == "x-api-key" else value
        for name, value in recorded["headers"].items()
        if name not in ("content-type", "accept-encoding")
    }
    body = recorded["body"]
    if body is not None and "model" in body and not body["model"].startswith("claude-"):
        body["model"] = MODEL
    answer = server.client.request(recorded["method"], recorded["path"], json=body, headers=headers)
    assert answer.status_code == REFUSED.get(file.stem, 200), answer.text
    if answer.status_code != 200 or body is None:
        return
    if not body.get("stream"):
        TypeAdapter(WHOLE[path]).validate_python(answer.json())
        return
    adapter = TypeAdapter(EVENTS[path])
    for line in answer.text.splitlines():
        if line.startswith("data: {") and '"type":"ping"' not in line:
            adapter.validate_python(json.loads(line[6:]))
