"""FP8 sources against numpy: blocks with ragged edges, every form of scale, and scales that do not fit."""

from pathlib import Path

import numpy as np
import pytest

from mlx_step35.convert import convert
from mlx_step35.errors import CheckpointError
from tests.release import (
    Stored,
    block_scales,
    read_output,
    release_config,
    release_tensors,
    stored,
    to_fp8,
    values,
    write_release,
)

EXPERTS = "model.layers.3.moe.down_proj.weight"
SCALE = f"{EXPERTS}_scale_inv"


@pytest.fixture(scope="module")
def original() -> dict[str, Stored]:
    return release_tensors(release_config())


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("shape", ["blocks", "experts", "one", "none"])
def test_experts_are_what_numpy_computes(
    original: dict[str, Stored], dtype: str, shape: str, tmp_path: Path
) -> None:
    source = to_fp8(original, dtype, shape)
    write_release(tmp_path / "fp8", tensors=source)
    convert(str(tmp_path / "fp8"), tmp_path / "out", dtype="float32")
    output = read_output(tmp_path / "out")
    for name, tensor in source.items():
        if tensor[0] != "F8_E4M3":
            continue
        scale = values(source[f"{name}_scale_inv"])
        expected = values(tensor) * block_scales(scale, tensor[1])
        got = values(output[name.replace(".moe.", ".mlp.switch_mlp.")])
        np.testing.assert_array_equal(got, expected)


def test_quantising_fp8_equals_quantising_its_bfloat16_form(
    original: dict[str, Stored], tmp_path: Path
) -> None:
    source = to_fp8(original)
    plain: dict[str, Stored] = {}
    for name, tensor in source.items():
        if tensor[0] == "F8_E4M3":
            scale = values(source[f"{name}_scale_inv"])
            plain[name] = stored(values(tensor) * block_scales(scale, tensor[1]), "BF16")
        elif not name.endswith("_scale_inv"):
            plain[name] = tensor
    write_release(tmp_path / "fp8", tensors=source)
    write_release(tmp_path / "bf16", tensors=plain)
    for kind in ("fp8", "bf16"):
        convert(str(tmp_path / kind), tmp_path / f"{kind}-4bit", quantize=True, verify=True)
    assert read_output(tmp_path / "fp8-4bit") == read_output(tmp_path / "bf16-4bit")


def test_small_slices_cross_blocks_and_experts(
    original: dict[str, Stored], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_release(tmp_path / "fp8", tensors=to_fp8(original))
    convert(str(tmp_path / "fp8"), tmp_path / "whole", quantize=True)
    # One block row at a time, and one expert where that is smaller.
    monkeypatch.setattr("mlx_step35.conversion.transform.SLICE_ELEMENTS", 128 * 192)
    convert(str(tmp_path / "fp8"), tmp_path / "slices", quantize=True)
    assert read_output(tmp_path / "whole") == read_output(tmp_path / "slices")


def test_a_missing_scale_names_the_tensor(original: dict[str, Stored], tmp_path: Path) -> None:
    source = to_fp8(original)
    del source[SCALE]
    write_release(tmp_path / "fp8", tensors=source)
    with pytest.raises(CheckpointError, match=f"'{EXPERTS}' is FP8 and has no scale"):
        convert(str(tmp_path / "fp8"), tmp_path / "out")


def test_a_scale_of_a_plain_tensor_is_refused(original: dict[str, Stored], tmp_path: Path) -> None:
    source = to_fp8(original)
    source[EXPERTS] = original[EXPERTS]
    write_release(tmp_path / "fp8", tensors=source)
    with pytest.raises(CheckpointError, match=f"'{SCALE}' scales '{EXPERTS}', which is BF16"):
        convert(str(tmp_path / "fp8"), tmp_path / "out")


def test_a_scale_without_its_tensor_is_refused(original: dict[str, Stored], tmp_path: Path) -> None:
    source = {**original, "model.layers.3.moe.other.weight_scale_inv": stored(np.ones(1, np.float32), "F32")}
    write_release(tmp_path / "fp8", tensors=source)
    with pytest.raises(CheckpointError, match=r"other\.weight_scale_inv' scales no tensor"):
        convert(str(tmp_path / "fp8"), tmp_path / "out")


def test_a_scale_of_another_shape_is_refused(original: dict[str, Stored], tmp_path: Path) -> None:
    source = to_fp8(original)
    source[SCALE] = stored(np.ones((4, 2, 2), np.float32), "F32")
    write_release(tmp_path / "fp8", tensors=source)
    with pytest.raises(CheckpointError, match=f"'{SCALE}' has shape"):
        convert(str(tmp_path / "fp8"), tmp_path / "out")


def test_nan_bytes_are_refused_by_name(original: dict[str, Stored], tmp_path: Path) -> None:
    source = to_fp8(original)
    dtype, shape, data = source[EXPERTS]
    source[EXPERTS] = (dtype, shape, data[:1000] + b"\x7f" + data[1001:])
    write_release(tmp_path / "fp8", tensors=source)
    with pytest.raises(CheckpointError, match=f"'{EXPERTS}' .*NaN"):
        convert(str(tmp_path / "fp8"), tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))
