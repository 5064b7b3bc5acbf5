"""The bundled model answers held-out tool questions with the right, parsed calls."""

import json
from pathlib import Path
from typing import Any

from mlx_step35.chat.output import parse_output
from mlx_step35.chat.template import ChatTemplate
from mlx_step35.chat.tokenizer import Tokenizer
from mlx_step35.checkpoint import resolve_model
from mlx_step35.generate import load, stream_generate

QUESTIONS = Path(__file__).parent / "data" / "tool_questions.jsonl"
WANTED = 40


def test_forty_of_fifty_calls_are_right() -> None:
    questions = [json.loads(line) for line in QUESTIONS.read_text().splitlines()]
    assert len(questions) == 50
    model, tokenizer = load("nano")
    directory = resolve_model("nano")
    template, plain = ChatTemplate.from_directory(directory), Tokenizer.from_directory(directory)
    wrong: list[tuple[Any, Any]] = []
    for question in questions:
        rendered = template.render(question["messages"], tools=question["tools"])
        ids = plain.encode_rendered(rendered)
        text = "".join(r.text for r in stream_generate(model, tokenizer, ids, max_tokens=250))
        parsed = parse_output(text, question["tools"])
        calls = [{"name": c.name, "arguments": json.loads(c.arguments)} for c in parsed.tool_calls]
        if calls != question["calls"]:
            wrong.append((question["calls"], calls or text))
    right = len(questions) - len(wrong)
    print(f"{right} of {len(questions)} right; wrong (wanted, given):", *wrong, sep="\n")
    assert right >= WANTED
