"""From a checkpoint directory to a model: strict, lazy, and told from names alone which layout it is.

Headers are checked first (`headers`, `names`, `plan`), so a damaged or foreign checkpoint fails before any
weight is read. Arrays stay lazy: they are read from disk when first evaluated.
"""

import logging
from collections import defaultdict
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args

import mlx.core as mx
import mlx.nn as nn

from mlx_step35.checkpoint.headers import read_json, read_listing
from mlx_step35.checkpoint.plan import LoadPlan, Source, plan_load
from mlx_step35.config import ModelConfig
from mlx_step35.config.fields import Fields
from mlx_step35.errors import RequestError
from mlx_step35.model import Model
from mlx_step35.moe import QuantizedSwitchLinear, SwitchLinear
from mlx_step35.mtp import MTP
from mlx_step35.quantization import Quantization

DTypeName = Literal["auto", "float32", "bfloat16", "float16"]

NANO = "nano"

_STORED = {"F32": mx.float32, "BF16": mx.bfloat16, "F16": mx.float16}

logger = logging.getLogger(__name__)


def load_checkpoint(path: Path, dtype: DTypeName = "auto") -> Model:
    """Build the model of a directory with lazy weights.

    Raises CheckpointError naming file and tensor for whatever is missing, left over, misshapen or damaged,
    and ConfigError for a config of another model. Without MTP layers it loads, logs why, and keeps the
    reason.
    """
    if dtype not in get_args(DTypeName):
        raise RequestError(f"dtype must be {', '.join(get_args(DTypeName))}, found {dtype!r}", field="dtype")
    config = read_config(path)
    plan = plan_load(path, config, read_listing(path))
    model = Model(config)
    model.mtp_reason = plan.mtp_reason
    if plan.mtp_reason is None:
        model.mtp = MTP(config)
    else:
        logger.warning("drafting with MTP is off: %s", plan.mtp_reason)
    for module_path, packing in plan.packings.items():
        pack_module(model, module_path, packing)
    compute = _compute_dtype(plan, dtype)
    model.load_weights(_read(plan, compute), strict=False)
    return model


def read_config(path: Path) -> ModelConfig:
    """The config of a checkpoint directory; the ids that end a text are also those of its
    generation_config.json."""
    config = ModelConfig.from_hf(read_json(path / "config.json"))
    generation = path / "generation_config.json"
    if not generation.exists():
        return config
    more = Fields(read_json(generation), "generation_config.").token_ids("eos_token_id")
    return replace(config, eos_token_ids=tuple(dict.fromkeys([*config.eos_token_ids, *more])))


def resolve_model(path_or_repo: str | Path) -> Path:
    """The directory of a model: 'nano' is the bundled one, a path is itself, anything else a hub repository.

    Raises RequestError when it is none of these or cannot be downloaded.
    """
    name = str(path_or_repo)
    if not name:
        raise RequestError("the model has no name", field="model")
    path = Path(path_or_repo).expanduser()
    if path.is_dir():
        return path
    if name == NANO:
        return Path(str(files("mlx_step35"))) / NANO
    if path.exists() or name.count("/") != 1 or name.startswith((".", "~", "/")):
        raise RequestError(f"no model directory at '{name}'", field="model")
    return _download(name)


def pack_module(model: Model, path: str, packing: Quantization) -> None:
    """Put a quantised module in the place of a plain one; its arrays follow from the checkpoint."""
    *parents, name = path.split(".")
    parent: Any = model
    for part in parents:
        parent = parent[int(part)] if part.isdecimal() else getattr(parent, part)
    plain = getattr(parent, name)
    if isinstance(plain, SwitchLinear):
        setattr(parent, name, QuantizedSwitchLinear(packing))
        return
    rows, columns = plain.weight.shape
    kind = nn.QuantizedEmbedding if isinstance(plain, nn.Embedding) else nn.QuantizedLinear
    options: dict[str, Any] = {} if isinstance(plain, nn.Embedding) else {"bias": False}
    sizes = (rows, columns) if isinstance(plain, nn.Embedding) else (columns, rows)
    packed = kind(*sizes, group_size=packing.group_size, bits=packing.bits, mode=packing.mode, **options)
    setattr(parent, name, packed)


def _download(repo: str) -> Path:
    # Imported here because it takes longer than starting the rest of the package.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
    try:
        return Path(snapshot_download(repo, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RequestError(f"no directory '{repo}', and the hub says: {reason}", field="model") from None


def _compute_dtype(plan: LoadPlan, dtype: DTypeName) -> mx.Dtype:
    """The dtype of activations. 'auto' is the stored one on a GPU and float32 on the CPU.

    MLX's CPU backend has expert products only in float32, and its bf16 quantised products are both slower and
    off by several percent.
    """
    if _is_on_cpu():
        if dtype in ("bfloat16", "float16"):
            _check_cpu_can(plan, dtype)
        else:
            return mx.float32
    if dtype != "auto":
        return {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}[dtype]
    norm = next(source for source in plan.sources if source.name == "model.norm.weight")
    return _STORED[norm.entry.dtype]


def _check_cpu_can(plan: LoadPlan, dtype: DTypeName) -> None:
    experts = [source for source in plan.sources if source.kind == "experts"]
    if any(source.name.endswith(".weight") and source.entry.dtype in _STORED for source in experts):
        raise RequestError(f"MLX multiplies experts on the CPU in float32 only, not {dtype}", field="dtype")
    logger.warning("on the CPU quantised products in %s are slow and off by several percent", dtype)


def _read(plan: LoadPlan, compute: mx.Dtype) -> list[tuple[str, mx.array]]:
    """Every parameter as a lazy array."""
    by_file: defaultdict[Path, list[Source]] = defaultdict(list)
    for source in plan.sources:
        by_file[source.entry.path].append(source)
    weights = []
    for path, sources in by_file.items():
        arrays: Any = mx.load(str(path))
        weights += [
            (source.name, _converted(arrays[source.stored_name], source, compute)) for source in sources
        ]
    return weights


def _converted(array: mx.array, source: Source, compute: mx.Dtype) -> mx.array:
    """A stored tensor as the model holds it."""
    if not mx.issubdtype(array.dtype, mx.floating):
        return array
    if source.kind in ("router", "bias"):
        return array.astype(mx.float32)
    if source.kind == "norm" and source.is_original:
        # In the stored dtype a small w would vanish beside the 1.
        array = array.astype(mx.float32) + 1
    array = array.astype(compute)
    is_matrix = source.name.endswith(".weight") and array.ndim > 1
    if is_matrix and source.kind != "embedding" and _is_on_cpu():
        # Same shape, columns contiguous: x @ weight.T is half as fast the other way in the CPU wheels' BLAS.
        # Scales and biases stay as they are: packed products would copy them whole each time.
        return mx.contiguous(array.swapaxes(-1, -2)).swapaxes(-1, -2)
    return array


def _is_on_cpu() -> bool:
    return mx.default_device().type == mx.DeviceType.cpu
