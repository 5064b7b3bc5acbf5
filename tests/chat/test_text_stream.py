"""Tokens to deltas: stop strings across tokens, ends, counts."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_step35.chat.output import ContentDelta, Delta, OutputParser, PlainParser, ReasoningDelta
from mlx_step35.chat.text_stream import TextStream
from mlx_step35.chat.tokenizer import Tokenizer

TOOLS = [
    {
        "type": "function",
        "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}},
    }
]
CALL = "<tool_call>\n<function=f>\n<parameter=a>\nx w7 y\n</parameter>\n</function>\n</tool_call>"


def content(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas if isinstance(delta, ContentDelta))


def run(stream: TextStream, ids: list[int], reason: str = "stop") -> list[Delta]:
    deltas: list[Delta] = []
    for token in ids:
        deltas += stream.push(token)
        if stream.stopped:
            break
    return deltas + stream.finish(reason)


def test_a_stop_string_is_cut_out_wherever_tokens_end(tokenizer: Tokenizer) -> None:
    text = "Think w7.\n</think>\nw5 w6 w7 w8"
    for ids in (
        tokenizer.encode(text),
        [token for character in text for token in tokenizer.encode(character)],
    ):
        if len(ids) == len(text):
            continue
        stream = TextStream(tokenizer, OutputParser(), ["a!", "w7"])
        deltas = run(stream, ids)
        assert content(deltas) == stream.result.content == "w5 w6 "
        assert stream.stop_sequence == "w7"
        assert stream.stopped
        assert stream.result.reasoning == "Think w7."
        assert stream.result.finish_reason == "stop"
        assert stream.push(ids[0]) == []


def test_arguments_are_no_content(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, OutputParser(TOOLS), ["w7"])
    run(stream, tokenizer.encode(f"t\n</think>\nA{CALL}"))
    assert stream.stop_sequence is None
    assert stream.result.finish_reason == "tool_calls"
    assert json.loads(stream.result.tool_calls[0].arguments) == {"a": "x w7 y"}
    assert stream.result.content == "A"


def test_a_call_in_front_of_a_stop_string_counts(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, OutputParser(TOOLS), ["END"])
    deltas = run(stream, tokenizer.encode(f"t\n</think>\n{CALL}more END{CALL}"))
    assert content(deltas) == "more "
    assert stream.result.finish_reason == "tool_calls"
    assert len(stream.result.tool_calls) == 1


def test_what_might_have_been_a_stop_string_is_given_out_at_the_end(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, OutputParser(), ["word"])
    ids = tokenizer.encode("</think>a wor")
    deltas = [delta for token in ids for delta in stream.push(token)]
    assert content(deltas) == "a "
    assert content(stream.finish("length")) == "wor"
    assert stream.result.content == "a wor"
    assert stream.result.finish_reason == "length"


@settings(max_examples=200, deadline=None)
@given(st.text("abc", max_size=12), st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3))
def test_stop_strings_like_a_search(tokenizer: Tokenizer, text: str, stop: list[str]) -> None:
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    stream = TextStream(tokenizer, PlainParser(), stop)
    deltas = run(stream, tokenizer.encode(text))
    assert content(deltas) == (text[: min(ends)[1]] if ends else text)
    assert stream.stopped == bool(ends)


@pytest.mark.parametrize("end", ["<｜end▁of▁sentence｜>", "<｜▁pad▁｜>", "<|im_end|>"])
def test_end_tokens_end_and_are_not_text(tokenizer: Tokenizer, end: str) -> None:
    token = tokenizer.token_id(end)
    assert token is not None
    stream = TextStream(tokenizer, OutputParser(), [])
    deltas = run(stream, [*tokenizer.encode("</think>Hi"), token, *tokenizer.encode("more")])
    assert content(deltas) == "Hi"
    assert stream.is_ended


def test_thinking_is_counted_with_its_closer(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, OutputParser())
    thinking, answer = tokenizer.encode("One two three.\n</think>"), tokenizer.encode("\nHi")
    run(stream, thinking + answer)
    assert stream.reasoning_tokens == len(thinking)


def test_characters_arrive_whole(tokenizer: Tokenizer) -> None:
    text = "naïve 😀 你好 🏳️‍🌈"
    stream = TextStream(tokenizer, OutputParser())
    deltas = run(stream, tokenizer.encode(f"{text}</think>{text}"))
    pieces = [delta.text for delta in deltas if isinstance(delta, ContentDelta | ReasoningDelta)]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) == text * 2
    cut = TextStream(tokenizer, PlainParser())
    ids = tokenizer.encode("a😀")
    assert content(run(cut, ids[:-1], "length")) == "a\ufffd"


def test_plain_text_keeps_every_blank(tokenizer: Tokenizer) -> None:
    text = "  <think>\n\n <tool_call> x\n\n"
    stream = TextStream(tokenizer, PlainParser())
    assert content(run(stream, tokenizer.encode(text))) == text
    assert stream.reasoning_tokens == 0
