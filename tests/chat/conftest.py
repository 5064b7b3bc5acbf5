"""A small byte-level tokenizer with the model's control strings, and a template of the model's structure."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from mlx_step35.chat.template import ChatTemplate
from mlx_step35.chat.tokenizer import Tokenizer

BOS = "<｜begin▁of▁sentence｜>"
SPECIAL = [BOS, "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>", "<|im_start|>", "<|im_end|>", "<im_patch>"]
# Control strings that are no "special" tokens: they are printed when text is decoded without those.
PLAIN = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]

CORPUS = [
    "The quick brown fox jumps over the lazy dog. ",
    "def f(x):\n    return x + 1\n\nclass A:\n    pass\n",
    "user\nassistant\nsystem\ntool_response\n# Tools\n\nYou have access to the following functions:\n",
    "<function=read_file>\n<parameter=path>\nREADME.md\n</parameter>\n</function>\n",
    '{"type": "function", "function": {"name": "bash", "parameters": {"type": "object"}}}',
    "你好，世界。今天天气很好。 naïve café 😀 ",
] * 20


def write_tokenizer(directory: Path, **settings: Any) -> None:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIAL,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in PLAIN])
    tokenizer.save(str(directory / "tokenizer.json"))
    config: Mapping[str, Any] = {
        "tokenizer_class": "LlamaTokenizerFast",
        "bos_token": {"content": BOS, "special": True},
        "eos_token": "<|im_end|>",
        **settings,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": [1, 2, 4]}))


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    write_tokenizer(directory)
    source = Path(__file__).parent.parent / "data" / "chat_template.jinja"
    (directory / "chat_template.jinja").write_text(source.read_text())
    return directory


@pytest.fixture(scope="session")
def tokenizer(model_directory: Path) -> Tokenizer:
    return Tokenizer.from_directory(model_directory)


@pytest.fixture(scope="session")
def template(model_directory: Path) -> ChatTemplate:
    return ChatTemplate.from_directory(model_directory)
