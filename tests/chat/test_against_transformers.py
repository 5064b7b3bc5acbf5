"""The bundled model's tokenizer and template give what transformers gives from the same files."""

from pathlib import Path
from typing import Any

import pytest

import mlx_step35
from mlx_step35.chat.template import ChatTemplate
from mlx_step35.chat.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")

NANO = Path(mlx_step35.__file__).parent / "nano"
TOOL = {
    "type": "function",
    "function": {
        "name": "read_file",
        "description": "Reads <b> & 'é'",
        "parameters": {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]},
    },
}


def call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}


CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "Be brief.\n"}, {"role": "user", "content": " 你好 😀 \n\n def f():\tx"}],
    [
        {"role": "user", "content": "read it"},
        {
            "role": "assistant",
            "content": "Now.",
            "reasoning_content": "I must read.\n",
            "tool_calls": [
                call("read_file", {"path": "a b", "n": 3, "x": 1.0, "b": True, "z": None, "l": [{"é": 1}]}),
                call("read_file", {}),
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "text"},
        {"role": "tool", "tool_call_id": "2", "content": ""},
        {"role": "assistant", "content": "Done.\n", "reasoning_content": ""},
        {"role": "user", "content": "Thanks"},
        {"role": "assistant", "content": "", "reasoning_content": "hm"},
        {"role": "system", "content": "later"},
    ],
]  # fmt: skip


@pytest.fixture(scope="module")
def reference() -> Any:
    return transformers.PreTrainedTokenizerFast.from_pretrained(NANO)


@pytest.fixture(scope="module")
def nano() -> Tokenizer:
    return Tokenizer.from_directory(NANO)


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("tools", [None, [TOOL]])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_conversations(
    reference: Any, nano: Tokenizer, messages: Any, tools: Any, add_generation_prompt: bool
) -> None:
    rendered = ChatTemplate.from_directory(NANO).render(messages, tools, add_generation_prompt)
    options = {"tools": tools, "add_generation_prompt": add_generation_prompt}
    assert rendered.text == reference.apply_chat_template(messages, tokenize=False, **options)
    expected = reference(rendered.text, add_special_tokens=False)["input_ids"]
    assert nano.encode_rendered(rendered) == nano.encode(rendered.text) == expected


@pytest.mark.parametrize(
    "text", [" x", "\n\n  y\r\n", "naïve café", "你好，世界", "🏳️‍🌈", "a<|im_end|>b</think>", "12345678"]
)
def test_texts(reference: Any, nano: Tokenizer, text: str) -> None:
    ids = reference(text, add_special_tokens=False)["input_ids"]
    assert nano.encode(text) == ids
    assert nano.decode(ids) == text
    assert nano.eos_token_ids == (1, 2, 4)
    assert nano.bos_token_id == reference.bos_token_id
