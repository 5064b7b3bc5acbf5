"""What a plan is about: a machine, and a checkpoint that exists or is to be made."""

import json
import platform
import subprocess
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from mlx_step35 import costs
from mlx_step35.checkpoint import NANO, read_config, resolve_model
from mlx_step35.checkpoint.headers import read_json
from mlx_step35.checkpoint.inventory import inventory
from mlx_step35.config import ModelConfig
from mlx_step35.errors import RequestError
from mlx_step35.guard import device_backend, device_limit, total_memory
from mlx_step35.layout import Recipe, backbone_weights
from mlx_step35.memory import GPU, Backend, Stored, raised_limit, stored
from mlx_step35.quantization import QuantizationSettings
from mlx_step35.recipes import RecipeName, machine_recipe, quantization, uniform_recipe, with_mtp
from mlx_step35.speed import CHIPS, Chip

RELEASE_CONFIG = "step-3.5-flash.json"


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine that is asked about: what its GPU may use unless told otherwise, and at most."""

    name: str
    memory_bytes: int
    default_limit: int
    raised_limit: int
    backend: Backend
    chip: Chip | None


@dataclass(frozen=True, slots=True)
class Subject:
    """The checkpoint that is asked about, existing or to be made."""

    name: str
    config: ModelConfig
    tensors: tuple[Stored, ...]


def release_config() -> ModelConfig:
    """The config of the original release, which is part of the package."""
    return ModelConfig.from_hf(json.loads((files("mlx_step35") / RELEASE_CONFIG).read_text("utf-8")))


def find_machine(mac: int | None, chip_name: str | None) -> Machine:
    """A Mac with that many GB, or the machine this runs on. Raises RequestError for an unknown chip."""
    chip = None if chip_name is None else _chip(chip_name)
    if mac is not None:
        memory = mac * costs.GIB
        name = f"a {mac} GB Mac" + (f" ({chip.name})" if chip else "")
        return Machine(name, memory, costs.memory_limit(mac), raised_limit(memory), GPU, chip)
    memory, limit = total_memory(), device_limit()
    if platform.system() != "Darwin":
        name = f"this machine ({platform.system()}, {memory / 1e9:.0f} GB)"
        return Machine(name, memory, limit, limit, device_backend(), chip)
    brand = _sysctl("machdep.cpu.brand_string").removeprefix("Apple ")
    name = f"this Mac ({brand}, {memory >> 30} GB)"
    return Machine(name, memory, limit, max(raised_limit(memory), limit), GPU, chip or CHIPS.get(brand))


def find_config(model: str | None) -> ModelConfig:
    """The config of a directory or repository, the original release's without any."""
    if model is None:
        return release_config()
    path = Path(model).expanduser()
    if path.is_dir() or model == NANO:
        return read_config(resolve_model(model))
    if path.exists() or model.count("/") != 1 or model.startswith((".", "~", "/")):
        raise RequestError(f"no model directory at '{model}'", field="model")
    return ModelConfig.from_hf(read_json(_fetched_config(model)))


def existing(model: str, config: ModelConfig) -> Subject:
    """A checkpoint as its headers describe it; where only the config is here, as that does."""
    path = Path(model).expanduser()
    if model == NANO or path.is_dir():
        path = resolve_model(model)
        if any(path.glob("model*.safetensors")):
            return Subject(model, config, inventory(path, config))
    block = config.raw.get("quantization_config")
    if config.quantization is None and isinstance(block, dict) and "quant_method" in block:
        raise RequestError(
            f"'{model}' is quantised by {block['quant_method']}; plan a conversion of it with --recipe",
            field="model",
        )
    return Subject(model, config, tuple(stored(config, _configured_recipe(config))))


def by_recipe(config: ModelConfig, name: RecipeName, mtp_bits: int | None) -> Subject:
    """What a conversion by a recipe would give; None leaves the MTP layers out."""
    return _converted(f"recipe {name}", config, machine_recipe(config, name, mtp_bits), mtp_bits)


def by_bits(config: ModelConfig, bits: int, mtp_bits: int | None) -> Subject:
    """What a uniform conversion would give; 16 bits are unquantised."""
    choice = None if bits == 16 else quantization(bits, None, "affine")
    name = "unquantised weights" if bits == 16 else f"{bits} bits"
    return _converted(name, config, uniform_recipe(config, choice), mtp_bits)


def _converted(name: str, config: ModelConfig, recipe: Recipe, mtp_bits: int | None) -> Subject:
    if mtp_bits is not None:
        recipe = with_mtp(config, recipe, mtp_bits)
    return Subject(name, config, tuple(stored(config, recipe, mtp=mtp_bits is not None)))


def _sysctl(name: str) -> str:
    return subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=True).stdout.strip()


def _chip(name: str) -> Chip:
    wanted = name.casefold().removeprefix("apple ").strip()
    for chip in CHIPS.values():
        if chip.name.casefold() == wanted:
            return chip
    raise RequestError(f"no chip '{name}': choose one of {', '.join(CHIPS)}", field="chip")


def _configured_recipe(config: ModelConfig) -> Recipe:
    """What config.json says about the backbone; it says nothing about MTP layers, taken to have 4 bits."""
    settings = QuantizationSettings.from_block(config.quantization)
    choices = {
        weight.path: choice
        for weight in backbone_weights(config)
        if weight.is_quantizable and (choice := settings.choice(weight.path)) is not None
    }
    recipe = Recipe("config.json", choices)
    return with_mtp(config, recipe, 4) if choices else recipe


def _fetched_config(repo: str) -> Path:
    """A repository's config.json from the local cache, else from the hub."""
    # Imported here because it takes longer than the rest of the command.
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        cached = try_to_load_from_cache(repo, "config.json")
        return Path(cached if isinstance(cached, str) else hf_hub_download(repo, "config.json"))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RequestError(f"no config of '{repo}' here, and the hub says: {reason}", field="model") from None
