"""The backbone against mlx-lm's implementation and against its formulas, in every way of feeding tokens."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models import step3p5
from mlx_lm.utils import load_model, quantize_model, save_config, save_model

from mlx_step35.checkpoint import load_checkpoint
from mlx_step35.model import Model
from tests.reference import Reference
from tests.tiny import VOCAB_SIZE, tiny_config, tiny_weights, write_checkpoint

LENGTH = 300
TOLERANCE = 1e-4


def oracle(raw: dict[str, Any], tensors: dict[str, np.ndarray]) -> step3p5.Model:
    """mlx-lm's model on the same weights, cast to float32 before its `sanitize` adds 1 to the norms."""
    model = step3p5.Model(step3p5.ModelArgs.from_dict(raw))
    weights = model.sanitize({name: mx.array(tensor) for name, tensor in tensors.items()})
    model.load_weights(list(weights.items()), strict=True)
    return model


@pytest.fixture(scope="module", params=[8, 64], ids=["window8", "window64"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Any]:
    raw = tiny_config(sliding_window=request.param)
    tensors = tiny_weights(raw)
    path = write_checkpoint(tmp_path_factory.mktemp("pair") / "model", raw, tensors)
    return load_checkpoint(path), oracle(raw, tensors)


@pytest.fixture(scope="module")
def ids() -> mx.array:
    return mx.array(np.random.default_rng(1).integers(0, VOCAB_SIZE, (1, LENGTH)))


def chunks(how: str) -> Iterator[slice]:
    generator = np.random.default_rng(2)
    start = 0
    while start < LENGTH:
        size = {"one": LENGTH, "random": int(generator.integers(1, 90)), "single": 1}[how]
        yield slice(start, min(start + size, LENGTH))
        start += size


@pytest.mark.parametrize("how", ["one", "random", "single"])
def test_logits_equal_mlx_lm(pair: tuple[Model, Any], ids: mx.array, how: str) -> None:
    model, reference = pair
    expected = reference(ids, cache=reference.make_cache())
    cache = model.make_cache()
    logits = mx.concatenate([model(ids[:, part], cache=cache) for part in chunks(how)], axis=1)
    assert logits.shape == (1, LENGTH, VOCAB_SIZE)
    assert mx.abs(logits - expected).max().item() < TOLERANCE
    assert {layer.offset for layer in cache} == {LENGTH}


def test_without_a_cache_the_result_is_the_same(pair: tuple[Model, Any], ids: mx.array) -> None:
    model, _ = pair
    assert mx.abs(model(ids) - model(ids, cache=model.make_cache())).max().item() < TOLERANCE


def test_logits_equal_the_formulas(tiny_model: Model, ids: mx.array) -> None:
    raw = tiny_config()
    expected = Reference(raw, tiny_weights(raw)).logits(ids[0, :80].tolist())
    np.testing.assert_allclose(np.array(tiny_model(ids[:, :80])[0]), expected, atol=TOLERANCE)


def test_greedy_tokens_equal_mlx_lm(pair: tuple[Model, Any], ids: mx.array) -> None:
    model, reference = pair
    for start in (0, 4, 9):
        prompt = ids[0, start : start + 5 + 3 * start]
        expected = [token for token, _ in generate_step(prompt, reference, max_tokens=60)]
        assert [token for token, _ in generate_step(prompt, model, max_tokens=60)] == expected


def test_mlx_lm_loop_takes_our_cache(tiny_model: Model, ids: mx.array) -> None:
    """A second turn on the same cache equals a cold run over both."""
    cache = tiny_model.make_cache()
    first = [token for token, _ in generate_step(ids[0, :30], tiny_model, max_tokens=12, prompt_cache=cache)]
    # mlx-lm runs one token more than it yields.
    covered = [*ids[0, :30].tolist(), *first]
    assert cache.offset == len(covered)
    logits = tiny_model(ids[:, 30:40], cache=cache)[:, -1]
    cold = tiny_model(mx.array([[*covered, *ids[0, 30:40].tolist()]]))[:, -1]
    assert mx.abs(logits - cold).max().item() < TOLERANCE


def test_rows_of_a_batch_equal_single_sequences(tiny_model: Model) -> None:
    batch = mx.array(np.random.default_rng(5).integers(0, VOCAB_SIZE, (3, 40)))
    cache = tiny_model.make_cache()
    together = mx.concatenate(
        [tiny_model(batch[:, :33], cache=cache), tiny_model(batch[:, 33:], cache=cache)], 1
    )
    for row in range(3):
        assert mx.abs(together[row] - tiny_model(batch[row : row + 1])[0]).max().item() < TOLERANCE


def test_rollback_and_continuation_equal_a_straight_run(tiny_model: Model, ids: mx.array) -> None:
    cache = tiny_model.make_cache()
    tiny_model(ids[:, :50], cache=cache)
    tiny_model((ids[:, 50:60] + 1) % VOCAB_SIZE, cache=cache)
    cache.rollback(10)
    logits = tiny_model(ids[:, 50:70], cache=cache)
    assert mx.abs(logits - tiny_model(ids[:, :70])[:, 50:]).max().item() < TOLERANCE


def test_hidden_is_taken_before_the_final_norm(tiny_model: Model, ids: mx.array) -> None:
    hidden = tiny_model.hidden(ids[:, :20])
    assert mx.array_equal(tiny_model.logits(hidden), tiny_model(ids[:, :20]))
    assert mx.array_equal(tiny_model.lm_head(tiny_model.model.norm(hidden)), tiny_model(ids[:, :20]))


@pytest.mark.parametrize(
    ("mode", "bits", "group_size"),
    [("affine", 4, 64), ("affine", 8, 32), ("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_mlx_lm_conversions_load_and_agree(
    tmp_path: Path, ids: mx.array, mode: str, bits: int, group_size: int
) -> None:
    raw = tiny_config()
    reference = oracle(raw, tiny_weights(raw))
    quantized, config = quantize_model(reference, raw, group_size, bits, mode=mode)
    save_model(tmp_path, quantized)
    save_config(config, tmp_path / "config.json")
    model = load_checkpoint(tmp_path)
    expected = load_model(tmp_path)[0](ids)
    assert mx.abs(model(ids) - expected).max().item() < TOLERANCE
    assert model.mtp is None
    assert model.mtp_reason is not None
    assert "holds no MTP layers" in model.mtp_reason
