"""What a conversion is told, and the recipe that follows from it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from mlx_step35.config import ModelConfig
from mlx_step35.conversion.plan import MTPChoice
from mlx_step35.costs import mtp_bytes
from mlx_step35.errors import RequestError
from mlx_step35.layout import Recipe, backbone_weights, mtp_weights
from mlx_step35.quantization import Mode
from mlx_step35.recipes import (
    RECIPES,
    Override,
    RecipeName,
    fit_recipe,
    machine_recipe,
    quantization,
    uniform_recipe,
    with_mtp,
    with_overrides,
)

DType = Literal["float16", "bfloat16", "float32"]
STORED: Mapping[DType, str] = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}


@dataclass(frozen=True, slots=True)
class Options:
    """Everything a conversion is told, by the names of the command line; `command` is for the model card."""

    hf_path: str
    mlx_path: Path = Path("mlx_model")
    quantize: bool = False
    q_group_size: int | None = None
    q_bits: int | None = None
    q_mode: Mode = "affine"
    dtype: DType | None = None
    upload_repo: str | None = None
    revision: str | None = None
    dequantize: bool = False
    recipe: RecipeName | None = None
    target_size: int | None = None
    q_overrides: tuple[str, ...] = ()
    mtp: MTPChoice = "keep"
    mtp_bits: int | None = None
    verify: bool = False
    dry_run: bool = False
    command: str = field(default="mlx_step35.convert", compare=False)

    @property
    def is_quantized(self) -> bool:
        return self.quantize or self.recipe is not None or self.target_size is not None

    def check(self) -> None:
        """Refuse what is no choice or contradicts itself, before anything is fetched. Raises RequestError."""
        self._check_values()
        self._check_combinations()

    def _check_values(self) -> None:
        """A call may pass anything, a command line empty words and zeros."""
        for name, text in (("hf_path", self.hf_path), ("revision", self.revision)):
            if text == "":
                raise RequestError(f"{_flag(name)} is empty", field=name)
        choices: tuple[tuple[str, object, tuple[object, ...]], ...] = (
            ("q_mode", self.q_mode, get_args(Mode)),
            ("dtype", self.dtype, (None, *get_args(DType))),
            ("recipe", self.recipe, (None, *RECIPES)),
            ("mtp", self.mtp, get_args(MTPChoice)),
        )
        for name, choice, known in choices:
            if choice not in known:
                listed = ", ".join(str(each) for each in known if each is not None)
                raise RequestError(f"{_flag(name)} is one of {listed}, not {choice!r}", field=name)
        numbers: tuple[tuple[str, object], ...] = (
            ("q_bits", self.q_bits),
            ("q_group_size", self.q_group_size),
            ("mtp_bits", self.mtp_bits),
            ("target_size", self.target_size),
        )
        for name, number in numbers:
            is_number = isinstance(number, int) and not isinstance(number, bool) and number > 0
            if number is not None and not is_number:
                raise RequestError(f"{_flag(name)} is a positive whole number, not {number!r}", field=name)

    def _check_combinations(self) -> None:
        if self.is_quantized and self.dequantize:
            raise RequestError("choose quantisation or --dequantize, not both", field="dequantize")
        budgets = [self.recipe is not None, self.target_size is not None]
        by_hand = self.q_bits is not None or self.q_group_size is not None or self.q_mode != "affine"
        if sum(budgets) > 1 or (any(budgets) and by_hand):
            raise RequestError("choose one of --recipe, --target-size and --q-bits and so on", field="recipe")
        if self.mtp == "only" and (self.is_quantized or by_hand or self.dequantize or self.upload_repo):
            raise RequestError("--mtp only takes --mtp-bits and --q-overrides, nothing else", field="mtp")
        if self.mtp != "only" and not self.is_quantized and (by_hand or self.q_overrides):
            raise RequestError("choices of bits need --quantize", field="quantize")
        if self.mtp == "drop" and self.mtp_bits is not None:
            raise RequestError("--mtp drop leaves nothing for --mtp-bits", field="mtp_bits")


def choose_recipe(config: ModelConfig, options: Options) -> Recipe:
    """The packing of every module, MTP layers and overrides included."""
    dtype = STORED[options.dtype or _config_dtype(config)]
    heads = _mtp_bits(options)
    if options.mtp == "only":
        recipe = Recipe("mtp", {}, dtype)
    elif options.recipe is not None:
        recipe = machine_recipe(config, options.recipe, heads, dtype)
    elif options.target_size is not None:
        empty = Recipe("", {}, dtype)
        spent = 0 if heads is None else mtp_bytes(config, with_mtp(config, empty, heads))
        recipe = fit_recipe(config, options.target_size - spent, dtype)
    elif options.quantize:
        choice = quantization(options.q_bits, options.q_group_size, options.q_mode)
        recipe = uniform_recipe(config, choice, dtype)
    else:
        recipe = uniform_recipe(config, None, dtype)
    if heads is not None:
        recipe = with_mtp(config, recipe, heads)
    weights = [] if options.mtp == "only" else backbone_weights(config)
    weights += [] if heads is None else mtp_weights(config)
    return with_overrides(weights, recipe, [Override.parse(text) for text in options.q_overrides])


def output_directory(path: str | Path) -> Path:
    """Where to write. Raises RequestError for an empty word, which would mean the current directory."""
    if path == "":
        raise RequestError("--mlx-path is empty", field="mlx_path")
    return Path(path)


def parse_size(text: str) -> int:
    """'92GB' or '85.5GiB' in bytes. Raises RequestError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(G|GB|GiB|M|MB|MiB)", text.strip())
    if match is None:
        raise RequestError(f"'{text}' is no size such as 92GB", field="target_size")
    units = {"G": 10**9, "GB": 10**9, "GiB": 1 << 30, "M": 10**6, "MB": 10**6, "MiB": 1 << 20}
    return int(float(match[1]) * units[match[2]])


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _mtp_bits(options: Options) -> int | None:
    """Bits of the MTP layers, 16 for unquantised, None for no layers.

    Beside an unquantised backbone they stay as they are; otherwise 4 bits cost them little, and a draft is
    only worth its reads.
    """
    if options.mtp == "drop":
        return None
    if options.mtp_bits is not None:
        return options.mtp_bits
    return 4 if options.is_quantized or options.mtp == "only" else 16


def _config_dtype(config: ModelConfig) -> DType:
    """The dtype config.json names; bfloat16, the release's, where it names none of ours."""
    text = config.raw.get("text_config")
    for fields in (config.raw, text if isinstance(text, Mapping) else {}):
        for key in ("torch_dtype", "dtype"):
            for name in get_args(DType):
                if fields.get(key) == name:
                    found: DType = name
                    return found
    return "bfloat16"
