"""The bundled model against vectors that transformers and the PyTorch reference computed (tests/golden)."""

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_step35.checkpoint import load_checkpoint, resolve_model
from mlx_step35.model import Model

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def nano() -> Iterator[Model]:
    yield load_checkpoint(resolve_model("nano"), dtype="float32")


def test_backbone_equals_transformers(nano: Model) -> None:
    golden = np.load(GOLDEN / "backbone.npz")
    logits = nano(mx.array(golden["ids"])[None])[0]
    np.testing.assert_allclose(np.array(logits)[golden["rows"]], golden["logits"], atol=TOLERANCE)


def test_all_three_mtp_layers_equal_the_reference(nano: Model) -> None:
    golden = np.load(GOLDEN / "mtp.npz")
    ids = mx.array(golden["ids"])[None]
    hidden = nano.hidden(ids)
    for k in range(nano.mtp.num_layers):
        rows = ids.shape[1] - 1 - k
        hidden = nano.mtp.step(k, nano.embed(ids[:, 1 + k :]), hidden[:, :rows])
        np.testing.assert_allclose(np.array(hidden[0])[golden["rows"]], golden[f"hidden_{k}"], atol=TOLERANCE)
        logits = nano.mtp.logits(k, hidden)
        np.testing.assert_allclose(np.array(logits[0])[golden["rows"]], golden[f"logits_{k}"], atol=TOLERANCE)
