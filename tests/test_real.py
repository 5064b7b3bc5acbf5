"""With real weights, on a Mac: `make real MODEL=DIR`, a directory that stock mlx-lm loads too.

MLX_STEP35_REAL_CONTEXT sets the length of the recall test (default 32768 tokens).
"""

import gc
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_step35.generate import load, stream_generate
from mlx_step35.guard import planner_of
from mlx_step35.model import Model

pytestmark = pytest.mark.real

FILLER = "The tide went out past the third marker and the harbour master wrote the hour into his book. "
TEXT = "Explain, step by step, how a sliding window of 512 tokens changes what attention can see. " * 12


@pytest.fixture(scope="module")
def path() -> Path:
    directory = os.environ.get("MLX_STEP35_REAL_MODEL")
    if not directory:
        pytest.fail("set MLX_STEP35_REAL_MODEL, or run: make real MODEL=DIR")
    return Path(directory)


@pytest.fixture(scope="module")
def loaded(path: Path) -> Any:
    return load(path)


def test_logits_equal_stock_mlx_lm(path: Path) -> None:
    """One model in memory at a time; in half precision the two may round differently, hence KL and argmax."""
    model, tokenizer = load(path)
    ids = mx.array([tokenizer.encode(TEXT)])
    ours = np.array(model(ids)[0].astype(mx.float32))
    del model
    gc.collect()
    mx.clear_cache()
    import mlx_lm

    stock = mlx_lm.load(str(path))[0]
    theirs = np.array(stock(ids)[0].astype(mx.float32))
    del stock
    gc.collect()
    mx.clear_cache()
    log_p, log_q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (theirs, ours))
    divergence = (np.exp(log_p) * (log_p - log_q)).sum(-1).mean()
    agreement = (ours.argmax(-1) == theirs.argmax(-1)).mean()
    print(f"KL {divergence:.2e} nats, same first choice {agreement:.1%}, {ids.shape[1]} tokens")
    assert divergence < 1e-2
    assert agreement > 0.97


@pytest.mark.parametrize("depth", [0.1, 0.5, 0.9])
def test_finds_a_needle_in_a_long_context(loaded: Any, depth: float) -> None:
    model, tokenizer = loaded
    wanted = int(os.environ.get("MLX_STEP35_REAL_CONTEXT", "32768"))
    sentences = [FILLER] * max(1, (wanted - 200) // len(tokenizer.encode(FILLER)))
    sentences.insert(int(len(sentences) * depth), "The code of the harbour safe is 738194. ")
    question = "".join(sentences) + "\n\nWhat is the code of the harbour safe? Answer with the number."
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True
    )
    responses = list(stream_generate(model, tokenizer, prompt, max_tokens=400))
    print(f"{len(prompt)} tokens: {''.join(r.text for r in responses)[-200:]!r}")
    assert "738194" in "".join(response.text for response in responses)


def test_peak_memory_is_what_the_plan_says(loaded: Any) -> None:
    model: Model
    model, tokenizer = loaded
    from mlx.utils import tree_flatten

    prompt = tokenizer.encode(FILLER * 400)
    mx.reset_peak_memory()
    for _ in stream_generate(model, tokenizer, prompt, max_tokens=64):
        pass
    planned = planner_of(model.config, tree_flatten(model.parameters())).footprint(len(prompt) + 64).peak
    measured = mx.get_peak_memory()
    print(f"planned {planned / 1e9:.2f} GB, measured {measured / 1e9:.2f} GB")
    assert measured < 1.1 * planned
