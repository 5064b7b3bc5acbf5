"""Fixtures that several test files share."""

from pathlib import Path
from typing import Any

import pytest

from mlx_step35.checkpoint import load_checkpoint, resolve_model
from mlx_step35.decoding import prepare
from mlx_step35.model import Model
from tests.release import Stored, release_config, release_tensors, write_release
from tests.tiny import tiny_config, write_checkpoint


@pytest.fixture(scope="session")
def tiny_raw() -> dict[str, Any]:
    """The tiny model's config.json."""
    return tiny_config()


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint directory of the tiny model, in the release's layout."""
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_model(tiny_path: Path) -> Model:
    """The tiny model with its three MTP layers, in float32."""
    return load_checkpoint(tiny_path)


@pytest.fixture(scope="session")
def nano() -> Model:
    """The bundled model in float32, compiled as the command line runs it."""
    model = load_checkpoint(resolve_model("nano"), "float32")
    prepare(model)
    return model


@pytest.fixture(scope="session")
def release_raw() -> dict[str, Any]:
    """The config of `release_source`."""
    return release_config()


@pytest.fixture(scope="session")
def release_weights(release_raw: dict[str, Any]) -> dict[str, Stored]:
    """The tensors of `release_source` under their original names."""
    return release_tensors(release_raw)


@pytest.fixture(scope="session")
def release_source(tmp_path_factory: pytest.TempPathFactory, release_weights: dict[str, Stored]) -> Path:
    """A bfloat16 checkpoint in the release's layout, large enough to quantise."""
    return write_release(tmp_path_factory.mktemp("release") / "source", tensors=release_weights)


@pytest.fixture(scope="session")
def float_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in float32, because MLX's CPU backend computes exactly only there."""
    raw = release_config(torch_dtype="float32")
    path = tmp_path_factory.mktemp("float") / "source"
    return write_release(path, raw, release_tensors(raw, dtype="F32"))
