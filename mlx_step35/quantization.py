"""Reading which module of a checkpoint is packed how: the `quantization` block of config.json or of a
sidecar.

The block gives a default and, per module path, either other settings or false for "left unquantised". A
path entry stands alone: what it leaves out is MLX's default for its mode, not the block's.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from mlx_step35.errors import ConfigError

Mode = Literal["affine", "mxfp4", "mxfp8", "nvfp4"]

AFFINE_BITS = (2, 3, 4, 5, 6, 8)
AFFINE_GROUPS = (32, 64, 128)


@dataclass(frozen=True, slots=True)
class Quantization:
    """How one weight is packed."""

    bits: int
    group_size: int
    mode: Mode = "affine"


# What a mode means when nothing else is said; only affine has other choices.
DEFAULTS: Mapping[Mode, Quantization] = {
    "affine": Quantization(4, 64, "affine"),
    "mxfp4": Quantization(4, 32, "mxfp4"),
    "mxfp8": Quantization(8, 32, "mxfp8"),
    "nvfp4": Quantization(4, 16, "nvfp4"),
}


@dataclass(frozen=True, slots=True)
class QuantizationSettings:
    """The packing of every module path that has one; whether a module is packed at all, its tensors say."""

    default: Quantization | None
    paths: Mapping[str, Quantization | None]

    @classmethod
    def from_block(
        cls, block: Mapping[str, Any] | None, rename: Callable[[str], str] = str
    ) -> "QuantizationSettings":
        """Interpret a block; `rename` maps its module paths to ours. ConfigError for what MLX has not."""
        if block is None:
            return cls(None, {})
        own = {key: value for key, value in block.items() if not isinstance(value, Mapping | bool)}
        paths = {
            rename(path): _packing(f"quantization.{path}", entry) if isinstance(entry, Mapping) else None
            for path, entry in block.items()
            if path not in own
        }
        return cls(_packing("quantization", own), paths)

    def choice(self, path: str) -> Quantization | None:
        """The packing of a module, or None if it is said to be unquantised."""
        return self.paths.get(path, self.default)

    def as_block(self) -> dict[str, Any]:
        """The block that `from_block` reads back to these settings."""
        if self.default is None:
            return {}
        entries = {path: _as_entry(choice) if choice else False for path, choice in self.paths.items()}
        return {**_as_entry(self.default), **entries}


def _packing(field: str, entry: Mapping[str, Any]) -> Quantization:
    unknown = sorted(set(entry) - {"bits", "group_size", "mode"})
    if unknown:
        raise ConfigError(f"{field}.{unknown[0]}", f"unknown setting with value {entry[unknown[0]]!r}")
    mode = entry.get("mode", "affine")
    if mode not in get_args(Mode):
        raise ConfigError(f"{field}.mode", f"expected one of {', '.join(get_args(Mode))}, found {mode!r}")
    default = DEFAULTS[mode]
    bits, group_size = entry.get("bits"), entry.get("group_size")
    choice = Quantization(
        default.bits if bits is None else bits, default.group_size if group_size is None else group_size, mode
    )
    allowed_bits = AFFINE_BITS if mode == "affine" else (default.bits,)
    allowed_groups = AFFINE_GROUPS if mode == "affine" else (default.group_size,)
    # 4.0 and True are equal to numbers that MLX would not take for them.
    if type(choice.bits) is not int or choice.bits not in allowed_bits:
        raise ConfigError(f"{field}.bits", f"{mode} has {_listed(allowed_bits)}, found {bits!r}")
    if type(choice.group_size) is not int or choice.group_size not in allowed_groups:
        raise ConfigError(
            f"{field}.group_size", f"{mode} has {_listed(allowed_groups)}, found {group_size!r}"
        )
    return choice


def _as_entry(choice: Quantization) -> dict[str, Any]:
    return {"group_size": choice.group_size, "bits": choice.bits, "mode": choice.mode}


def _listed(values: tuple[int, ...]) -> str:
    return ", ".join(str(value) for value in values)
