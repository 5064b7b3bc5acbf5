"""Log-probabilities belong to the tokens of the text that the caller gets, byte for byte."""

import json
from typing import Any

import pytest

from mlx_step35.chat.tokenizer import Tokenizer
from tests.server.running import MODEL, Running
from tests.server.scripted import NANO

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TEXT = "naïve 你好 🏳️‍🌈 done"


def choices(server: Running, path: str, body: dict[str, Any]) -> list[Any]:
    """The choices of every event of a stream."""
    with server.client.stream("POST", path, json={**body, "stream": True}) as stream:
        lines = [line[6:] for line in stream.iter_lines() if line.startswith("data: {")]
    return [choice for line in lines for choice in json.loads(line)["choices"]]


def completion(text: str, **fields: Any) -> dict[str, Any]:
    prompt = f"<|im_start|>user\n[say {text}]<|im_end|>\n<|im_start|>assistant\n<think>\n</think>\n"
    return {"model": MODEL, "prompt": prompt, "max_tokens": 100, "logprobs": 2, **fields}


def test_bytes_of_tokens_join_to_the_text() -> None:
    tokenizer = Tokenizer.from_directory(NANO)
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(TEXT))) == TEXT.encode()


@pytest.mark.parametrize("is_stream", [False, True])
def test_completions_tell_bytes_and_places(server: Running, is_stream: bool) -> None:
    body = completion(TEXT)
    parts = (
        choices(server, COMPLETIONS, body) if is_stream else server.post(COMPLETIONS, body).json()["choices"]
    )
    text = "".join(part["text"] for part in parts)
    assert text == TEXT
    shown = [part["logprobs"] for part in parts if part["logprobs"]]
    tokens = [token for one in shown for token in one["tokens"]]
    offsets = [offset for one in shown for offset in one["text_offset"]]
    assert offsets[0] == 0 and offsets == sorted(offsets) and len(offsets) == len(tokens) > 3
    for token, offset in zip(tokens, offsets, strict=True):
        assert token.startswith("bytes:\\x") or text.startswith(token, offset)
    assert all(len(top) == 2 for one in shown for top in one["top_logprobs"])


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
CALL = "<tool_call>\n<function=f>\n<parameter=a>\n你 w3\n</parameter>\n</function>\n</tool_call>"


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(
    ("said", "fields", "content"),
    [
        (TEXT, {}, TEXT),
        (f"你 w3{CALL}", {}, "你 w3"),
        (CALL, {}, ""),
        (f"{CALL}\n", {}, ""),
        (f"{CALL}你 w3 done", {}, "你 w3 done"),
        ("one two STOP three", {"stop": " STOP"}, "one two"),
        ("one two STO", {"stop": "STOP"}, "one two STO"),
        ("😀" * 3, {}, "😀" * 3),
    ],
)
def test_tokens_are_those_of_the_content(
    server: Running, said: str, fields: dict[str, Any], content: str, is_stream: bool
) -> None:
    messages = [{"role": "user", "content": f"[say {said}]"}]
    body = {"model": MODEL, "messages": messages, "tools": TOOLS, "logprobs": True, **fields}
    if is_stream:
        parts = choices(server, CHAT, body)
        text = "".join(part["delta"].get("content") or "" for part in parts)
    else:
        parts = server.post(CHAT, body).json()["choices"]
        text = parts[0]["message"]["content"] or ""
    entries = [entry for part in parts if part["logprobs"] for entry in part["logprobs"]["content"]]
    assert text == content
    assert bytes(byte for entry in entries for byte in entry["bytes"]) == content.encode()
