"""The MTP layers against their formulas, and the mistakes that ports of this model make."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_step35.checkpoint import load_checkpoint
from mlx_step35.config import ModelConfig
from mlx_step35.model import Model
from mlx_step35.mtp import MTP
from tests.reference import Reference
from tests.tiny import VOCAB_SIZE, tiny_config, tiny_weights, write_checkpoint

LENGTH = 40


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return np.random.default_rng(3).integers(0, VOCAB_SIZE, LENGTH).tolist()


@pytest.fixture(scope="module")
def reference() -> Reference:
    raw = tiny_config()
    return Reference(raw, tiny_weights(raw))


def chain(model: Model, ids: list[int]) -> list[mx.array]:
    """Teacher-forced outputs of all layers, without caches: layer k has rows 0 .. T-2-k."""
    tokens = mx.array([ids])
    embeddings, hidden = model.embed(tokens), model.hidden(tokens)
    outputs = []
    for k in range(model.mtp.num_layers):
        rows = len(ids) - 1 - k
        hidden = model.mtp.step(k, embeddings[:, 1 + k :], hidden[:, :rows])
        outputs.append(hidden)
    return outputs


def test_three_layers_equal_their_formulas(tiny_model: Model, reference: Reference, ids: list[int]) -> None:
    expected = reference.mtp_hidden(ids)
    for k, output in enumerate(chain(tiny_model, ids)):
        np.testing.assert_allclose(np.array(output[0]), expected[k], atol=1e-4)
        logits = tiny_model.mtp.logits(k, output)
        np.testing.assert_allclose(np.array(logits[0]), reference.mtp_logits(k, expected[k]), atol=1e-4)


@pytest.mark.parametrize("rows", [1, 7, 30])
def test_absorbing_leaves_what_a_step_leaves(tiny_model: Model, ids: list[int], rows: int) -> None:
    tokens = mx.array([ids])
    embeddings, hidden = tiny_model.embed(tokens)[:, 1:], tiny_model.hidden(tokens)[:, :-1]
    for k, expected in enumerate(chain(tiny_model, ids)):
        [cache] = tiny_model.mtp.make_cache()[k : k + 1]
        tiny_model.mtp.absorb(k, embeddings[:, k : k + rows], hidden[:, :rows], cache)
        rest = hidden[:, rows : LENGTH - 1 - k]
        output = tiny_model.mtp.step(k, embeddings[:, k + rows :], rest, cache)
        np.testing.assert_allclose(np.array(output), np.array(expected[:, rows:]), atol=1e-4)
        hidden = expected


@pytest.mark.parametrize("chunk", [1, 3, 13])
def test_chunks_through_the_caches_equal_one_pass(tiny_model: Model, ids: list[int], chunk: int) -> None:
    expected = chain(tiny_model, ids)
    caches = tiny_model.mtp.make_cache()
    tokens = mx.array([ids])
    embeddings, hidden = tiny_model.embed(tokens), tiny_model.hidden(tokens)
    for k, cache in enumerate(caches):
        rows = LENGTH - 1 - k
        parts = [
            tiny_model.mtp.step(
                k,
                embeddings[:, 1 + k + start : 1 + k + min(start + chunk, rows)],
                hidden[:, start : min(start + chunk, rows)],
                cache,
            )
            for start in range(0, rows, chunk)
        ]
        hidden = mx.concatenate(parts, axis=1)
        np.testing.assert_allclose(np.array(hidden), np.array(expected[k]), atol=1e-4)
        assert cache.offset == rows


def test_layers_only_see_their_window(tiny_model: Model, ids: list[int]) -> None:
    """Layer k's output at row i depends on h0 of rows i - (k+1)(window-1) .. i and nothing before."""
    tokens = mx.array([ids])
    embeddings, hidden = tiny_model.embed(tokens), tiny_model.hidden(tokens)
    window = tiny_model.config.window
    assert window is not None

    def last_row(first: int, depth: int) -> np.ndarray:
        x = hidden[:, first:]
        for k in range(depth + 1):
            rows = LENGTH - 1 - k - first
            x = tiny_model.mtp.step(k, embeddings[:, first + 1 + k :], x[:, :rows])
        return np.array(x[0, -1])

    for depth in range(3):
        newest = LENGTH - 2 - depth
        needed = newest - (depth + 1) * (window - 1)
        whole = last_row(0, depth)
        np.testing.assert_allclose(last_row(needed, depth), whole, atol=1e-5)
        assert np.abs(last_row(needed + 1, depth) - whole).max() > 1e-5


@pytest.mark.parametrize("mistake", ["post_norm", "swapped", "own_layer", "lm_head"])
def test_usual_mistakes_would_be_noticed(
    tiny_model: Model, reference: Reference, ids: list[int], mistake: str
) -> None:
    tokens = mx.array([ids])
    embeddings, hidden = tiny_model.embed(tokens)[:, 1:], tiny_model.hidden(tokens)[:, :-1]
    expected = reference.mtp_logits(0, reference.mtp_hidden(ids)[0])
    mtp: MTP = tiny_model.mtp
    if mistake == "post_norm":
        logits = mtp.logits(0, mtp.step(0, embeddings, tiny_model.model.norm(hidden)))
    elif mistake == "swapped":
        logits = mtp.logits(0, mtp.step(0, hidden, embeddings))
    elif mistake == "own_layer":
        logits = mtp.logits(0, mtp.step(1, embeddings, hidden))
    else:
        logits = tiny_model.logits(mtp.step(0, embeddings, hidden))
    assert np.abs(np.array(logits[0]) - expected).max() > 0.1


def test_perturbing_a_head_changes_its_own_depth_only(tmp_path: Path, ids: list[int]) -> None:
    raw: dict[str, Any] = tiny_config()
    tensors = tiny_weights(raw)
    before = load_checkpoint(write_checkpoint(tmp_path / "before", raw, tensors))
    tensors["model.layers.7.transformer.shared_head.output.weight"] += 1
    tensors["lm_head.weight"] += 1
    after = load_checkpoint(write_checkpoint(tmp_path / "after", raw, tensors))
    for k, (old, new) in enumerate(zip(chain(before, ids), chain(after, ids), strict=True)):
        same = mx.allclose(before.mtp.logits(k, old), after.mtp.logits(k, new)).item()
        assert same == (k != 1)


def test_caches_follow_the_layer_kind(tiny_model: Model) -> None:
    config = ModelConfig.from_hf(tiny_config())
    assert [cache.window for cache in tiny_model.mtp.make_cache()] == [config.window] * 3
