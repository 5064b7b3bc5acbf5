"""Every recorded output, whole and cut in every way, gives the expected answer."""

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_step35.chat.output import (
    ContentDelta,
    Delta,
    OutputParser,
    ParsedOutput,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallStart,
    parse_output,
)

CASES = [
    json.loads(line)
    for line in (Path(__file__).parent.parent / "data" / "toolcalls.jsonl").read_text().splitlines()
]


def replay(deltas: list[Delta]) -> dict[str, Any]:
    """What a client assembles from a stream; fails on what it could not assemble."""
    content, reasoning, calls = "", "", []
    for delta in deltas:
        match delta:
            case ContentDelta(text):
                assert text
                content += text
            case ReasoningDelta(text):
                assert text
                assert not content and not calls
                reasoning += text
            case ToolCallStart(index, call_id, name):
                assert index == len(calls) and call_id
                calls.append([call_id, name, ""])
            case ToolCallArguments(index, text):
                assert index == len(calls) - 1
                calls[index][2] += text
    return {"content": content or None, "reasoning": reasoning or None, "calls": calls}


def run(case: dict[str, Any], pieces: list[str]) -> ParsedOutput:
    parser = OutputParser(case["tools"])
    deltas: list[Delta] = []
    for piece in pieces:
        deltas += parser.feed(piece)
    deltas += parser.close(case.get("eos", "stop"))
    result, streamed = parser.result, replay(deltas)
    assert streamed["content"] == result.content
    assert streamed["reasoning"] == result.reasoning
    assert [tuple(call) for call in streamed["calls"]] == [
        (call.id, call.name, call.arguments) for call in result.tool_calls
    ]
    return result


def simplify(result: ParsedOutput) -> tuple[Any, ...]:
    calls = [(call.name, json.loads(call.arguments)) for call in result.tool_calls]
    return result.content, result.reasoning, calls, result.finish_reason


def check(case: dict[str, Any], result: ParsedOutput) -> None:
    if case.get("content_cmp") != "any":
        assert (result.content or "").strip() == (case["expected_content"] or "").strip()
    assert (result.reasoning or "").strip() == (case["expected_reasoning"] or "").strip()
    expected = [
        (call["function"]["name"], json.loads(call["function"]["arguments"]))
        for call in case["expected_tool_calls"]
    ]
    assert simplify(result)[2] == expected
    for (_, arguments), (_, wanted) in zip(simplify(result)[2], expected, strict=True):
        assert list(arguments) == list(wanted)
        assert [type(value) for value in arguments.values()] == [type(value) for value in wanted.values()]
    assert len({call.id for call in result.tool_calls}) == len(expected)
    default = "tool_calls" if expected else "stop"
    assert result.finish_reason == case.get("expected_finish_reason", default)


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_every_way_of_cutting(case: dict[str, Any]) -> None:
    raw = case["raw"]
    whole = parse_output(raw, case["tools"], case.get("eos", "stop"))
    check(case, whole)
    cuts = [[raw], list(raw), *([raw[:i], raw[i:]] for i in range(len(raw) + 1))]
    cuts += [[raw[i : i + n] for i in range(0, len(raw), n)] for n in (2, 3, 5, 7, 13)]
    if "chunks" in case:
        assert "".join(case["chunks"]) == raw
        cuts.append(case["chunks"])
    for pieces in cuts:
        assert simplify(run(case, pieces)) == simplify(whole), pieces


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_markup_of_a_call_never_shows(case: dict[str, Any]) -> None:
    """Where calls were found, no delta carries any part of their markup."""
    if not case["expected_tool_calls"]:
        return
    parser = OutputParser(case["tools"])
    for character in case["raw"]:
        for delta in parser.feed(character):
            if isinstance(delta, ContentDelta):
                assert "<" not in delta.text
