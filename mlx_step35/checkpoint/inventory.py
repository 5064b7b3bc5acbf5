"""The tensors of a checkpoint directory by what they are for, from its headers alone."""

from pathlib import Path

from mlx_step35.checkpoint.headers import read_listing
from mlx_step35.checkpoint.plan import plan_load
from mlx_step35.config import ModelConfig
from mlx_step35.layout import Tensor
from mlx_step35.memory import Stored


def inventory(path: Path, config: ModelConfig) -> tuple[Stored, ...]:
    """Everything that loading the directory would read. Raises CheckpointError for a damaged one."""
    sources = plan_load(path, config, read_listing(path)).sources
    return tuple(
        Stored(source.kind, Tensor(source.name, source.entry.dtype, source.entry.shape)) for source in sources
    )
