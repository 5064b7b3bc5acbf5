"""What the server does to prompts for the cache's sake, and what it says about reuse."""

import logging
from typing import Any

import pytest

from mlx_step35.api.anthropic import parse_messages
from mlx_step35.api.openai import parse_chat
from mlx_step35.api.responses import parse_response
from mlx_step35.chat.template import ChatTemplate
from mlx_step35.chat.tokenizer import Tokenizer
from mlx_step35.checkpoint import resolve_model
from mlx_step35.engine.session import Reuse
from mlx_step35.http.preparing import Preparer
from mlx_step35.http.settings import GenerationDefaults

HEADER = "x-anthropic-billing-header: cc_version=2.1.112.2d3; cc_entrypoint=cli; cch={};"
PARSERS = {"chat": parse_chat, "messages": parse_messages, "responses": parse_response}


def preparer(**defaults: Any) -> Preparer:
    path = resolve_model("nano")
    tokenizer, template = Tokenizer.from_directory(path), ChatTemplate.from_directory(path)
    return Preparer(tokenizer, template, GenerationDefaults(**defaults), 4096)


def body(dialect: str, cch: str, *, as_list: bool) -> dict[str, Any]:
    """The same request in each dialect, with a header that has this value."""
    texts = [HEADER.format(cch), "You are brief."]
    parts: Any = [{"type": "text", "text": text} for text in texts] if as_list else "\n".join(texts)
    user = {"role": "user", "content": "Hi."}
    if dialect == "messages":
        return {"model": "m", "max_tokens": 8, "system": parts, "messages": [user]}
    if dialect == "chat":
        return {"model": "m", "messages": [{"role": "system", "content": parts}, user]}
    return {"model": "m", "instructions": "\n".join(texts), "input": "Hi."}


@pytest.mark.parametrize("as_list", [True, False])
@pytest.mark.parametrize("dialect", PARSERS)
def test_the_volatile_header_is_left_out(dialect: str, as_list: bool) -> None:
    def ids(prepare: Preparer, cch: str) -> list[int]:
        return prepare.prompt(PARSERS[dialect](body(dialect, cch, as_list=as_list))).ids

    dropping, keeping = preparer(), preparer(keeps_billing_header=True)
    assert ids(dropping, "aaaaa") == ids(dropping, "bbbbb")
    assert "billing" not in dropping.tokenizer.decode(ids(dropping, "aaaaa"))
    assert "You are brief." in dropping.tokenizer.decode(ids(dropping, "aaaaa"))
    assert ids(keeping, "aaaaa") != ids(keeping, "bbbbb")
    assert "cch=bbbbb" in keeping.tokenizer.decode(ids(keeping, "bbbbb"))


def test_reuse_is_explained(caplog: pytest.LogCaptureFixture) -> None:
    prepare = preparer()
    given, found = prepare.tokenizer.encode("blue")[0], prepare.tokenizer.encode("red")[0]
    with caplog.at_level(logging.DEBUG):
        prepare.explain(Reuse(100, 60, 75, found, given, "memory"))
    (record,) = caplog.records
    message = record.getMessage()
    assert "60 reused (memory), limited by boundary; 75 are known" in message
    assert repr(prepare.tokenizer.decode([given])) in message
    assert repr(prepare.tokenizer.decode([found])) in message


@pytest.mark.parametrize(
    ("cached", "common", "expected"),
    [
        (99, 100, "whole prompt"),
        (60, 75, "boundary"),
        (60, 60, "difference"),
        (0, 5, "boundary"),
        (0, 0, "nothing stored"),
    ],
)
def test_what_limited_the_prefix(cached: int, common: int, expected: str) -> None:
    assert Reuse(100, cached, common, None, None, "memory").limited_by == expected
