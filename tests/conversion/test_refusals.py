"""Wrong inputs and contradicting options: refused by name, before anything is written."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_step35.convert import convert, main
from mlx_step35.errors import CheckpointError, RequestError
from tests.release import (
    Stored,
    stored,
    values,
    write_release,
)


def test_a_missing_shard_is_named(release_source: Path, tmp_path: Path) -> None:
    for file in release_source.iterdir():
        if file.name != "model-00003.safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match=r"model-00003\.safetensors is missing"):
        convert(str(tmp_path), tmp_path / "out")


def test_a_truncated_shard_is_named(release_source: Path, tmp_path: Path) -> None:
    for file in release_source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    shard = tmp_path / "model-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model-00002\.safetensors is truncated"):
        convert(str(tmp_path), tmp_path / "out")


def test_nan_is_named(release_weights: dict[str, Stored], tmp_path: Path) -> None:
    name = "model.layers.4.self_attn.q_proj.weight"
    array = values(release_weights[name]).copy()
    array[5, 7] = np.nan
    write_release(tmp_path / "source", tensors={**release_weights, name: stored(array, "BF16")})
    with pytest.raises(CheckpointError, match=f"'{name}' in .* holds NaN"):
        convert(str(tmp_path / "source"), tmp_path / "out", True)


def test_a_missing_and_an_unknown_tensor_are_named(
    release_weights: dict[str, Stored], tmp_path: Path
) -> None:
    some = dict(release_weights)
    del some["model.layers.2.moe.gate.weight"]
    write_release(tmp_path / "missing", tensors=some)
    with pytest.raises(CheckpointError, match=r"has no 'model\.layers\.2\.mlp\.gate\.gate\.weight'"):
        convert(str(tmp_path / "missing"), tmp_path / "out")
    write_release(
        tmp_path / "more", tensors={**release_weights, "model.extra": release_weights["model.norm.weight"]}
    )
    with pytest.raises(CheckpointError, match=r"'model\.extra'"):
        convert(str(tmp_path / "more"), tmp_path / "out")


def test_a_wrong_shape_is_named(release_weights: dict[str, Stored], tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    write_release(
        tmp_path / "source", tensors={**release_weights, name: release_weights["model.norm.weight"]}
    )
    with pytest.raises(CheckpointError, match=rf"'{name}' has shape \[320\], the config needs \[64, 320\]"):
        convert(str(tmp_path / "source"), tmp_path / "out")


def test_stray_files_are_ignored_with_a_warning(
    release_source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for file in release_source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "consolidated.safetensors").write_bytes(b"whatever")
    convert(str(tmp_path), tmp_path / "out")
    assert "consolidated.safetensors is not in the index and is ignored" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--hf-path", "/nowhere"], 2, "neither a directory nor a hub repo id"),
        (["-q", "--recipe", "mac-96", "--q-bits", "4"], 2, "choose one of"),
        (["-q", "-d"], 2, "not both"),
        (["--q-bits", "4"], 2, "need --quantize"),
        (["-q", "--q-bits", "7"], 2, "7 bits"),
        (["-q", "--q-group-size", "128"], 2, "groups of 128 at 4 bits do not divide"),
        (["--target-size", "lots"], 2, "no size"),
        (["--target-size", "1MB"], 2, "smallest recipe takes"),
        (["--mtp", "only", "-q"], 2, "nothing else"),
        (["-q", "--q-overrides", "nothing=4"], 2, "matches no"),
        (["-q", "--mtp", "drop", "--q-overrides", "mtp=8"], 2, "matches no"),
        (["-q", "--q-overrides", r"layers\.4=4:0"], 2, "groups of 0"),
        (["-q", "--q-overrides", "lm_head=16:64"], 2, "have no groups"),
        (["-q", "--q-overrides", ""], 2, "is not REGEX=BITS"),
        (["-q", "--q-group-size", "0"], 2, "--q-group-size is a positive whole number, not 0"),
        (["-q", "--q-bits", "0"], 2, "--q-bits is a positive whole number, not 0"),
        (["--mtp-bits", "0"], 2, "--mtp-bits is a positive whole number, not 0"),
        (["--target-size", ""], 2, "no size"),
        (["--target-size", "0GB"], 2, "--target-size is a positive whole number, not 0"),
        (["--hf-path", ""], 2, "--hf-path is empty"),
        (["--mlx-path", ""], 2, "--mlx-path is empty"),
        (["--revision", ""], 2, "--revision is empty"),
        (["--upload-repo", ""], 2, "is no repo id"),
        (["--revision", "main"], 2, "which has no --revision"),
        (["--mtp", "drop", "--mtp-bits", "8"], 2, "leaves nothing for --mtp-bits"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line(
    release_source: Path,
    arguments: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as exited:
        main(["--hf-path", str(release_source), "--mlx-path", str(tmp_path / "out"), *arguments])
    assert exited.value.code == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("choice", "field"),
    [
        ({"mtp": "maybe"}, "mtp"),
        ({"mtp": None}, "mtp"),
        ({"recipe": "mac-1"}, "recipe"),
        ({"dtype": "int8"}, "dtype"),
        ({"quantize": True, "q_mode": "foo"}, "q_mode"),
        ({"quantize": True, "q_mode": ["affine"]}, "q_mode"),
        ({"quantize": True, "q_bits": "4"}, "q_bits"),
        ({"quantize": True, "q_bits": True}, "q_bits"),
        ({"quantize": True, "q_group_size": 64.0}, "q_group_size"),
        ({"mtp_bits": "4"}, "mtp_bits"),
        ({"target_size": 5e6}, "target_size"),
        ({"target_size": -1}, "target_size"),
    ],
    ids=str,
)
def test_a_call_is_checked_as_the_command_line_is(
    release_source: Path, tmp_path: Path, choice: dict[str, Any], field: str
) -> None:
    with pytest.raises(RequestError) as raised:
        convert(str(release_source), tmp_path / "out", **choice)
    assert raised.value.field == field
    assert "\n" not in str(raised.value) and not (tmp_path / "out").exists()


def test_an_unknown_model_type_is_refused(
    release_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(SystemExit) as exited:
        main(["--hf-path", str(tmp_path)])
    assert exited.value.code == 1
    assert "model_type" in capsys.readouterr().err
