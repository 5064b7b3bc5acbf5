"""Fixtures that several test files share."""

from pathlib import Path
from typing import Any

import pytest

from mlx_step35.checkpoint import load_checkpoint
from mlx_step35.model import Model
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
