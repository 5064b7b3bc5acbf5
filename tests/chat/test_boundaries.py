"""Ends of turns, and that conversations which start alike share their tokens up to them."""

from typing import Any

from mlx_step35.chat.boundaries import prompt_boundaries
from mlx_step35.chat.template import ChatTemplate
from mlx_step35.chat.tokenizer import Tokenizer

TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def encode(
    template: ChatTemplate, tokenizer: Tokenizer, messages: list[dict[str, Any]], **kwargs: Any
) -> list[int]:
    return tokenizer.encode_rendered(template.render(messages, [TOOL], **kwargs))


def test_every_turn_has_its_end(template: ChatTemplate, tokenizer: Tokenizer) -> None:
    messages = [
        {"role": "system", "content": "S <|im_start|>user"},
        {"role": "user", "content": "U"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "function": {"name": "f"}}]},
        {"role": "tool", "content": "R", "tool_call_id": "1"},
        {"role": "user", "content": "V"},
    ]
    ids = encode(template, tokenizer, messages)
    boundaries = prompt_boundaries(ids, tokenizer)
    assert [item.kind for item in boundaries] == ["system", "user", "assistant", "tool", "user", "prompt"]
    assert boundaries[-1].position == len(ids)
    texts = [tokenizer.decode(ids[: item.position]) for item in boundaries]
    assert texts[0].endswith("</tool_call><|im_end|>\n")
    assert texts[1].endswith("U<|im_end|>\n")
    assert texts[4].endswith("V<|im_end|>\n")
    shorter = encode(template, tokenizer, messages[:2], add_generation_prompt=False)
    assert ids[: boundaries[1].position] == shorter
    other = encode(template, tokenizer, [*messages[:1], {"role": "user", "content": "other"}])
    assert other[: boundaries[0].position] == ids[: boundaries[0].position]


def test_without_turns_only_the_end_counts(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("plain text")
    assert [(item.position, item.kind) for item in prompt_boundaries(ids, tokenizer)] == [
        (len(ids), "prompt")
    ]
    assert prompt_boundaries([], tokenizer) == ()
