"""The bundled model against mlx-lm on the same float32 weights: logits, greedy tokens, 4-bit conversion."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models import step3p5
from mlx_lm.utils import load_model, quantize_model, save_config, save_model
from tokenizers import Tokenizer

from mlx_step35.checkpoint import load_checkpoint, resolve_model
from mlx_step35.checkpoint.headers import read_json
from mlx_step35.model import Model

NANO = resolve_model("nano")
LENGTH = 300
TOLERANCE = 1e-4

PROMPTS = [
    "What is the capital of France?",
    "import os\n\ndef main():\n    ",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "def parse(text: str) -> dict:\n    result = {}\n    for line in text.splitlines():\n",
    "你好，请问今天天气怎么样？",
    "<|im_start|>user\nBook a table for 4 at Luigi's<|im_end|>\n<|im_start|>assistant\n<think>\n",
    "x",
    "for i in range(10):\n    print(i)\n" * 12,
    "The quick brown fox jumps over the lazy dog. 🦊",
    'try:\n    value = int(text)\nexcept ValueError as error:\n    raise SystemExit(f"bad: {error}")\n' * 4,
]


@pytest.fixture(scope="module")
def nano() -> Model:
    model = load_checkpoint(NANO, "float32")
    mx.eval(model.parameters())
    # As every command runs it; the other tests of the model make plain calls.
    model.compile_steps()
    return model


def mlx_lm_nano() -> Any:
    """mlx-lm's model; the tensors are cast before its `sanitize` adds 1 to the norms."""
    config = read_json(NANO / "config.json")
    tensors: dict[str, mx.array] = {}
    for file in NANO.glob("model*.safetensors"):
        arrays: Any = mx.load(str(file))
        tensors |= {name: array.astype(mx.float32) for name, array in arrays.items()}
    model = step3p5.Model(step3p5.ModelArgs.from_dict(config))
    model.load_weights(list(model.sanitize(tensors).items()), strict=True)
    mx.eval(model.parameters())
    return model


@pytest.fixture(scope="module")
def oracle() -> Any:
    return mlx_lm_nano()


@pytest.fixture(scope="module")
def ids() -> mx.array:
    """300 tokens of text and source: the window of 64 wraps four times."""
    tokenizer = Tokenizer.from_file(str(NANO / "tokenizer.json"))
    text = "\n".join(PROMPTS)
    encoded = tokenizer.encode(text, add_special_tokens=False).ids
    return mx.array((encoded * (LENGTH // len(encoded) + 1))[:LENGTH])[None]


def chunks(how: str) -> Iterator[slice]:
    generator = np.random.default_rng(4)
    start = 0
    while start < LENGTH:
        size = {"one": LENGTH, "random": int(generator.integers(1, 120)), "single": 1}[how]
        yield slice(start, min(start + size, LENGTH))
        start += size


@pytest.mark.parametrize("how", ["one", "random", "single"])
def test_logits_equal_mlx_lm_at_every_position(nano: Model, oracle: Any, ids: mx.array, how: str) -> None:
    expected = oracle(ids, cache=oracle.make_cache())
    cache = nano.make_cache()
    logits = mx.concatenate([nano(ids[:, part], cache=cache) for part in chunks(how)], axis=1)
    assert mx.abs(logits - expected).max().item() < TOLERANCE


@pytest.mark.parametrize("prompt", PROMPTS, ids=range(len(PROMPTS)))
def test_200_greedy_tokens_equal_mlx_lm(nano: Model, oracle: Any, prompt: str) -> None:
    tokenizer = Tokenizer.from_file(str(NANO / "tokenizer.json"))
    ids = mx.array(tokenizer.encode(prompt, add_special_tokens=False).ids)
    expected = [token for token, _ in generate_step(ids, oracle, max_tokens=200)]
    assert [token for token, _ in generate_step(ids, nano, max_tokens=200)] == expected


def test_a_4_bit_conversion_by_mlx_lm_agrees_with_it(ids: mx.array, tmp_path: Path) -> None:
    quantized, config = quantize_model(mlx_lm_nano(), read_json(NANO / "config.json"), 64, 4)
    save_model(tmp_path, quantized)
    save_config(config, tmp_path / "config.json")
    ours, theirs = load_checkpoint(tmp_path), load_model(tmp_path)[0]
    cache = ours.make_cache()
    logits = mx.concatenate([ours(ids[:, part], cache=cache) for part in chunks("random")], axis=1)
    assert mx.abs(logits - theirs(ids)).max().item() < TOLERANCE
    assert ours.mtp is None
