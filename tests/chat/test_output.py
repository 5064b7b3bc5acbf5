"""The parser beyond the recorded cases: properties of any text, and every policy by cases of its own."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_step35.chat.arguments import Toolbox
from mlx_step35.chat.output import Delta, OutputParser, ParsedOutput, parse_output
from mlx_step35.chat.scanner import CallScanner
from tests.chat.test_output_cases import replay, simplify

DATA = Path(__file__).parent.parent / "data"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {key: {"type": kind} for key, kind in keys.items()},
            },
        },
    }
    for name, keys in {
        "bash": {"command": "string", "timeout": "number", "background": "boolean"},
        "write": {"path": "string", "content": "string", "data": "object"},
        "ping": {},
    }.items()
]

PIECES = st.sampled_from(
    [
        "<tool_call>", "</tool_call>", "<function=bash>", "<function=write>", "<function=ping>",
        "<function=no>", "<function bash>", "</function>", "<parameter=command>", "<parameter=path>",
        "<parameter=content>", "<parameter=x>", "</parameter>", "</think>", "<think>",
        "\n", "\n\n", " ", "text", "```", "`", "~~~", "<", ">",
        "<tool", "</", "<function=", "<parameter=", "é😀", "{}", "- ", "a\nb",
    ]
)  # fmt: skip
MARKUP = st.lists(PIECES, max_size=25).map("".join)


def stream(text: str, pieces: list[str], tools: Any, reason: str, starts: bool = True) -> ParsedOutput:
    assert "".join(pieces) == text
    parser = OutputParser(tools, starts)
    deltas: list[Delta] = []
    for piece in pieces:
        deltas += parser.feed(piece)
    deltas += parser.close(reason)
    seen, result = replay(deltas), parser.result
    assert (seen["content"], seen["reasoning"]) == (result.content, result.reasoning)
    assert [tuple(call) for call in seen["calls"]] == [(c.id, c.name, c.arguments) for c in result.tool_calls]
    return result


@settings(max_examples=400, deadline=None)
@given(MARKUP, st.data(), st.sampled_from(["stop", "length"]), st.booleans())
def test_every_cut_gives_the_same(text: str, data: st.DataObject, reason: str, starts: bool) -> None:
    whole = parse_output(text, TOOLS, reason, starts_in_reasoning=starts)
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
    for cut in (pieces, list(text)):
        result = stream(text, cut, TOOLS, reason, starts)
        assert simplify(result) == simplify(whole)
        assert result.unfinished == whole.unfinished
    for call in whole.tool_calls:
        assert isinstance(json.loads(call.arguments), dict)


@settings(max_examples=400, deadline=None)
@given(MARKUP, st.booleans())
def test_the_scanner_loses_nothing(text: str, is_complete: bool) -> None:
    scanner = CallScanner(Toolbox(TOOLS))
    events = [event for character in text for event in scanner.feed(character)]
    events += scanner.close(is_complete=is_complete)
    assert "".join(event.raw for event in events) == text


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.text(max_size=60), MARKUP))
def test_without_tools_all_text_is_kept(text: str) -> None:
    result = parse_output(text, None)
    assert not result.tool_calls
    kept = (result.reasoning or "") + (result.content or "")
    expected = text.replace("<think>", "", 1) if text.lstrip().startswith("<think>") else text
    expected = expected.replace("</think>", "", 1)
    assert "".join(kept.split()) == "".join(expected.split())


VALUES = st.text(st.characters(exclude_characters="<\ud800", exclude_categories=["Cs"]), max_size=20)


@settings(max_examples=200, deadline=None)
@given(
    VALUES.filter(lambda text: text.strip() and "`" not in text),
    VALUES.filter(lambda text: not text.strip().startswith(("`", "~"))),
    st.lists(st.tuples(st.sampled_from(["bash", "write"]), VALUES, VALUES), max_size=3),
)
def test_well_formed_outputs_round_trip(
    reasoning: str, content: str, calls: list[tuple[str, str, str]]
) -> None:
    content = "" if "`" in content or "~~~" in content else content
    keys = {"bash": "command", "write": "path"}
    text = f"{reasoning}\n</think>\n{content}"
    for name, value, other in calls:
        text += (
            f"<tool_call>\n<function={name}>\n<parameter={keys[name]}>\n{value}\n</parameter>\n"
            f"<parameter=more>\n{other}\n</parameter>\n</function>\n</tool_call>"
        )
    result = parse_output(text, TOOLS)
    assert result.reasoning == reasoning
    assert result.content == (content if content.strip() else None)
    parsed = [(call.name, json.loads(call.arguments)) for call in result.tool_calls]
    assert parsed == [(name, {keys[name]: value, "more": other}) for name, value, other in calls]


def call(name: str, *parameters: tuple[str, str]) -> str:
    body = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters)
    return f"<tool_call>\n<function={name}>\n{body}</function>\n</tool_call>"


LS = call("bash", ("command", "ls"))
EXPECTED = [("bash", {"command": "ls"})]


POLICIES = [json.loads(line) for line in (DATA / "output_policies.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("case", POLICIES, ids=[f"{case['rule']}-{i}" for i, case in enumerate(POLICIES)])
def test_policies(case: dict[str, Any]) -> None:
    text = "r\n</think>\n" + case["answer"]
    calls = [(name, arguments) for name, arguments in case["calls"]]
    result = parse_output(text, TOOLS)
    assert simplify(result) == (case["content"], "r", calls, "tool_calls" if calls else "stop")
    assert simplify(stream(text, list(text), TOOLS, "stop")) == simplify(result)


@pytest.mark.parametrize(("text", "reasoning", "content", "calls"), [
    (f"x\n{LS}", "x", None, EXPECTED),
    (f"x\n{LS}\n{LS}\n", "x", None, EXPECTED * 2),
    (f"x\n{LS}\ny", f"x\n{LS}\ny", None, []),
    (f"x\n{LS}\ny {LS}", f"x\n{LS}\ny ", None, EXPECTED),
    (f"x\n{call('no')}", f"x\n{call('no')}", None, []),
    (f"x\n```\n{LS}", f"x\n```\n{LS}", None, []),
    (f"{LS}\n</think>\ny", LS, "y", []),
    ("x <tool_call>\n<function=bash>\n<parameter=command>\nls</think>\ny",
     "x <tool_call>\n<function=bash>\n<parameter=command>\nls", "y", []),
    ("  \n </think>\n\nX", None, "\nX", []),
    ("\n\n\n</think>\n\nX", None, "\nX", []),
    ("a\n\n\n</think>\n\nX", "a\n\n", "\nX", []),
    ("\n<think>\nagain</think>X", "\nagain", "X", []),
    ("a <think> b</think>c", "a <think> b", "c", []),
    ("", None, None, []),
    ("</think>", None, None, []),
    ("</think>\n\n", None, None, []),
    ("</thin", "</thin", None, []),
    ("<thin", "<thin", None, []),
])  # fmt: skip
def test_thinking(text: str, reasoning: str | None, content: str | None, calls: list[Any]) -> None:
    result = parse_output(text, TOOLS)
    assert simplify(result) == (content, reasoning, calls, "tool_calls" if calls else "stop")
    assert simplify(stream(text, list(text), TOOLS, "stop")) == simplify(result)


def test_without_thinking_the_answer_starts_at_once() -> None:
    result = parse_output("\nHi", TOOLS, starts_in_reasoning=False)
    assert (result.content, result.reasoning) == ("\nHi", None)
    result = parse_output("<think>\na\n</think>\nHi", TOOLS, starts_in_reasoning=False)
    assert (result.content, result.reasoning) == ("Hi", "\na")


@pytest.mark.parametrize("end", range(1, len(LS)))
def test_a_cut_call_is_none_and_kept_aside(end: int) -> None:
    text = f"r\n</think>\nText {LS}{LS[:end]}"
    result = parse_output(text, TOOLS, "length")
    assert result.finish_reason == "length"
    assert len(result.tool_calls) == 1
    assert (result.content or "") + result.unfinished in (f"Text {LS[:end]}", "Text ")
    assert "<tool_call>" not in (result.content or "")
    thinking = parse_output(f"r {LS}", TOOLS, "length")
    assert thinking.reasoning == f"r {LS}"
    assert not thinking.tool_calls


def test_other_ends_are_reported_as_they_are() -> None:
    assert parse_output("a</think>b", TOOLS, "cancelled").finish_reason == "cancelled"
    assert parse_output(f"a</think>{LS}", TOOLS, "length").finish_reason == "length"


@pytest.mark.parametrize("text", [
    "plain words " * 9000,
    "<" * 100_000,
    "\n" * 100_000,
    "</think>" + " " * 100_000,
    "</think>" + "<tool_call>" * 9000,
    "</think>" + "<tool_call>\n<function=bash>\n<parameter=command>\n" * 2000,
    "</think><tool_call>\n<function=bash>\n<parameter=command>\n" + "</parameter>\n" * 8000,
    "</think><tool_call>\n<function=bash>\n<parameter=command>\n" + "</parameter>" + " " * 100_000,
    "</think>" + call("write", ("content", "a < b </x>\n" * 9000)),
    "</think>" + "`" * 100_000,
    "</think>" + "```\n<tool_call>\n" * 6000,
    "</think>" + "<function=" * 10_000,
    "<tool_call>\n<function=ping>\n</function>\n</tool_call>\n" * 2000,
    "</think>" + "<function=ping>\n</function>\n" * 3000,
])  # fmt: skip
def test_time_grows_with_the_length_only(text: str) -> None:
    def seconds(text: str) -> float:
        parser = OutputParser(TOOLS)
        start = time.process_time()
        for place in range(0, len(text), 3):
            parser.feed(text[place : place + 3])
        parser.close("stop")
        return time.process_time() - start

    seconds(text[:3000])
    half, full = seconds(text[: len(text) // 2]), seconds(text)
    assert full < 4 * half + 0.3
    assert full < 10
