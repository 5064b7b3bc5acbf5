"""Tensor names: from any supported layout to this package's parameter paths. Tables, and two rules that
use them.

Three layouts exist. The original release stores norms as w and has its own names around the experts; mlx-lm's
conversions renamed those and stored 1 + w; ours is mlx-lm's plus `mtp.layers.K`. MTP layers that were moved
somewhere else under their original names (`model.layers.N`, N behind the backbone) are still original.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from mlx_step35.errors import CheckpointError

# The release's spelling -> the parameter path's.
RENAMES = (
    (".moe.gate_proj.", ".mlp.switch_mlp.gate_proj."),
    (".moe.up_proj.", ".mlp.switch_mlp.up_proj."),
    (".moe.down_proj.", ".mlp.switch_mlp.down_proj."),
    (".moe.gate.", ".mlp.gate.gate."),
    (".moe.router_bias", ".mlp.gate.router_bias"),
    (".share_expert.", ".mlp.share_expert."),
)

MTP_RENAMES = ((".transformer.shared_head.", ".shared_head."),)

# Step-3.7 keeps its text model under one of these.
TEXT_PREFIXES = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.", ""),
)

# Step-3.7's image side, which this package does not run.
VISION_PREFIXES = (
    "vision_model.",
    "vision_tower.",
    "vit_downsampler",
    "vit_large_projector.",
    "multi_modal_projector.",
    "model.vision_model.",
    "model.vit_large_projector.",
    "model.multi_modal_projector.",
)

_CONVERTED_MARKS = (".mlp.switch_mlp.", ".mlp.gate.", ".mlp.share_expert.")
_LAYER = re.compile(r"model\.layers\.(\d+)(\..*)")


@dataclass(frozen=True, slots=True)
class ParameterName:
    """Where a stored tensor belongs; `is_original` means that a norm still lacks its 1."""

    name: str
    is_original: bool

    @property
    def is_mtp(self) -> bool:
        return self.name.startswith("mtp.")


def text_name(stored: str) -> str | None:
    """The name inside the text model, or None for a tensor of the image side."""
    if stored.startswith(VISION_PREFIXES):
        return None
    for prefix, replacement in TEXT_PREFIXES:
        if stored.startswith(prefix):
            return replacement + stored.removeprefix(prefix)
    return stored


def is_original_backbone(names: Iterable[str], written_by_mlx: bool) -> bool:
    """Whether the backbone's tensors (text names) are the release's. Raises CheckpointError for a mixture."""
    original = converted = None
    for name in names:
        if any(source in name and target not in name for source, target in RENAMES):
            original = name
        elif any(mark in name for mark in _CONVERTED_MARKS) or name.endswith(".scales"):
            converted = name
    if original and converted:
        raise CheckpointError(
            f"'{original}' is an original name, '{converted}' a converted one; norms differ"
        )
    # A model without experts has the same names in both layouts; only the file's writer tells them apart.
    return original is not None or (converted is None and not written_by_mlx)


def parameter_name(name: str, num_layers: int, is_original: bool) -> ParameterName:
    """The parameter path of a text name; `is_original` is the backbone's layout."""
    match = _LAYER.fullmatch(name)
    if match and int(match[1]) >= num_layers:
        renamed = f"mtp.layers.{int(match[1]) - num_layers}{match[2]}"
        return ParameterName(_renamed(renamed, MTP_RENAMES), True)
    if name.startswith("mtp."):
        return ParameterName(name, False)
    return ParameterName(_renamed(name, RENAMES) if is_original else name, is_original)


def _renamed(name: str, table: Iterable[tuple[str, str]]) -> str:
    for source, target in table:
        if source in name:
            return name.replace(source, target)
    return name
