"""Matching what a directory holds with what the model needs: every tensor exactly once, in its shape, or
an error.

Works on headers, so all of this is decided before any weight is read.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_step35.checkpoint.headers import Entry, Listing
from mlx_step35.checkpoint.names import is_original_backbone, parameter_name, text_name
from mlx_step35.config import ModelConfig
from mlx_step35.errors import CheckpointError, RequestError
from mlx_step35.layout import Kind, Weight, backbone_weights, mtp_weights, stored_tensors
from mlx_step35.quantization import Quantization, QuantizationSettings

SIDECAR_FORMAT_KEY = "mlx_step35_format"
SIDECAR_FORMAT = "1"

_FLOATS = frozenset({"F32", "BF16", "F16"})
_FP8 = frozenset({"F8_E4M3", "F8_E5M2"})

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Source:
    """One tensor to load: its name in the model and in the file, and what it is."""

    name: str
    stored_name: str
    entry: Entry
    kind: Kind
    is_original: bool


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """Everything to load. `packings` are the quantised modules; without MTP layers `mtp_reason` says why."""

    sources: tuple[Source, ...]
    packings: Mapping[str, Quantization]
    mtp_reason: str | None


def plan_load(path: Path, config: ModelConfig, listing: Listing) -> LoadPlan:
    """Decide what is loaded from where. Raises CheckpointError naming file and tensor for anything wrong."""
    _refuse_foreign(path, config, listing)
    found = _located(config, listing)
    has_mtp = any(name.startswith("mtp.") for name in found)
    weights = backbone_weights(config)
    settings = QuantizationSettings.from_block(config.quantization, module_path)
    packings = _packings(weights, settings, found)
    if has_mtp:
        heads = mtp_weights(config)
        packings |= _packings(heads, mtp_settings(listing.mtp_metadata, settings), found)
        weights += heads
    sources = [source for weight in weights for source in _sources(path, weight, packings, found)]
    left = found.keys() - {source.name for source in sources}
    if left:
        name = min(left)
        stored_name, entry, _ = found[name]
        raise CheckpointError(f"{entry.path} holds '{stored_name}', which this model does not have")
    return LoadPlan(tuple(sources), packings, None if has_mtp else _why_no_mtp(path, config))


def mtp_settings(metadata: Mapping[str, str], backbone: QuantizationSettings) -> QuantizationSettings:
    """How the MTP layers are packed: a sidecar says it itself, beside the backbone its settings hold.

    Raises CheckpointError for metadata of another format and for a block that is none.
    """
    version = metadata.get(SIDECAR_FORMAT_KEY)
    if version not in (None, SIDECAR_FORMAT):
        raise CheckpointError(f"the MTP sidecar has format {version}, this version reads {SIDECAR_FORMAT}")
    text = metadata.get("quantization")
    if text is None:
        return backbone
    try:
        block: Any = json.loads(text)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"the MTP sidecar's quantisation cannot be read: {error}") from None
    if not isinstance(block, dict | None):
        raise CheckpointError(f"the MTP sidecar's quantisation is {block!r}, not an object")
    return QuantizationSettings.from_block(block or None)


def module_path(path: str) -> str:
    """A block's module path as ours: Step-3.7's converters keep the prefix of the text model."""
    return text_name(path) or path


_Found = dict[str, tuple[str, Entry, bool]]


def _located(config: ModelConfig, listing: Listing) -> _Found:
    """Parameter name -> stored name, place, and whether it is original; the image side is left out."""
    texts = {stored: name for stored in listing.entries if (name := text_name(stored)) is not None}
    outside = [f"model.layers.{layer.index}." for layer in config.mtp_layers]
    backbone = (name for name in texts.values() if not name.startswith(("mtp.", *outside)))
    is_original = is_original_backbone(backbone, listing.metadata.get("format") == "mlx")
    found: _Found = {}
    skipped = set()
    for stored, text in texts.items():
        parameter = parameter_name(text, config.num_layers, is_original)
        if parameter.is_mtp and int(parameter.name.split(".")[2]) >= len(config.mtp_layers):
            skipped.add(parameter.name.split(".")[2])
            continue
        if parameter.name in found:
            raise CheckpointError(f"'{stored}' and '{found[parameter.name][0]}' are the same tensor")
        found[parameter.name] = (stored, listing.entries[stored], parameter.is_original)
    if skipped:
        logger.warning("the config announces %d MTP layers, more are stored", len(config.mtp_layers))
    return found


def _packings(
    weights: list[Weight], settings: QuantizationSettings, found: _Found
) -> dict[str, Quantization]:
    """The packing of every module whose scales are stored."""
    packings = {}
    for weight in weights:
        scales = found.get(f"{weight.path}.scales")
        if scales is None or not weight.is_quantizable:
            continue
        choice = settings.choice(weight.path)
        if choice is None:
            raise CheckpointError(
                f"{scales[1].path} holds '{scales[0]}', but nothing says how '{weight.path}' is quantised"
            )
        packings[weight.path] = choice
    return packings


def _sources(path: Path, weight: Weight, packings: Mapping[str, Quantization], found: _Found) -> list[Source]:
    """The tensors of one weight, each with the shape that its packing demands."""
    packing = packings.get(weight.path)
    try:
        tensors = stored_tensors(weight, packing, "BF16")
    except RequestError as error:
        raise CheckpointError(f"{path}: {error}") from None
    sources = []
    for tensor in tensors:
        if tensor.name not in found:
            raise CheckpointError(f"{path} has no '{tensor.name}'")
        stored_name, entry, is_original = found[tensor.name]
        expected = _FLOATS if tensor.dtype in _FLOATS else {tensor.dtype}
        if entry.dtype not in expected:
            raise CheckpointError(
                f"{entry.path}: '{stored_name}' is {entry.dtype}, expected {' or '.join(sorted(expected))}"
            )
        if entry.shape != tensor.shape:
            packed = f" for {packing.bits} bits, groups of {packing.group_size}" if packing else ""
            raise CheckpointError(
                f"{entry.path}: '{stored_name}' has shape {list(entry.shape)}, "
                f"expected {list(tensor.shape)}{packed}"
            )
        sources.append(Source(tensor.name, stored_name, entry, weight.kind, is_original))
    return sources


def _refuse_foreign(path: Path, config: ModelConfig, listing: Listing) -> None:
    """FP8 has to be converted; other quantisers' formats are not read at all."""
    if any(entry.dtype in _FP8 for entry in listing.entries.values()):
        raise CheckpointError(
            f"{path} is an FP8 checkpoint; convert it first: "
            f"mlx_step35.convert --hf-path {path} --mlx-path OUT -q"
        )
    block = config.raw.get("quantization_config")
    method = block.get("quant_method") if isinstance(block, Mapping) else None
    if method is not None and config.quantization is None:
        raise CheckpointError(f"{path} is quantised by '{method}', which cannot be read here")


def _why_no_mtp(path: Path, config: ModelConfig) -> str:
    if not config.mtp_layers:
        return "config.json announces no MTP layers (num_nextn_predict_layers)"
    return f"{path} holds no MTP layers; mlx_step35.convert --mtp only adds them"
