"""Step-3.7's nesting and prefixes, and what converters of others and our own leave in a source."""

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_step35.checkpoint import load_checkpoint
from mlx_step35.convert import convert
from mlx_step35.errors import CheckpointError
from tests.release import Stored, read_output, read_safetensors, write_release, write_safetensors


def nested(raw: dict[str, Any], **outer: Any) -> dict[str, Any]:
    """The text model's config as Step-3.7 holds it."""
    return {"model_type": "step3p7", "vision_config": {}, "text_config": raw, **outer}


def test_ids_that_end_a_text_come_from_every_config_into_both(
    release_raw: dict[str, Any], release_weights: dict[str, Stored], tmp_path: Path
) -> None:
    raw = nested(release_raw | {"eos_token_id": [2, 31]}, eos_token_id=1)
    write_release(tmp_path / "source", tensors=release_weights)
    (tmp_path / "source" / "config.json").write_text(json.dumps(raw))
    convert(str(tmp_path / "source"), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    # The outer config has 1, the inner one 2 and 31, generation_config.json 1 and 7.
    assert config["eos_token_id"] == config["text_config"]["eos_token_id"] == [1, 2, 31, 7]
    assert load_checkpoint(tmp_path / "out").config.eos_token_ids == (1, 2, 31, 7)


def prefixed(converted: Path, path: Path) -> None:
    """Our conversion as another converter would have made it of Step-3.7: one file, every name prefixed."""
    path.mkdir()
    tensors = {f"language_model.{name}": tensor for name, tensor in read_output(converted).items()}
    write_safetensors(path / "model.safetensors", tensors, {"format": "mlx"})
    raw = json.loads((converted / "config.json").read_text())
    block = raw.pop("quantization")
    del raw["quantization_config"]
    block = {k: v if k in ("bits", "group_size", "mode") else {**v} for k, v in block.items()}
    renamed = {f"language_model.{k}" if isinstance(v, dict) else k: v for k, v in block.items()}
    (path / "config.json").write_text(json.dumps(nested(raw, quantization=renamed)))


def test_a_prefixed_quantised_source_is_unpacked(release_source: Path, tmp_path: Path) -> None:
    convert(
        str(release_source),
        tmp_path / "packed",
        True,
        q_bits=4,
        q_overrides=[r"^model\.layers\.2\..*v_proj=3:32"],
    )
    prefixed(tmp_path / "packed", tmp_path / "prefixed")
    for name in ("packed", "prefixed"):
        convert(str(tmp_path / name), tmp_path / f"{name}-out", dequantize=True, verify=True)
    # Without a prefix it is what MLX unpacks, see test_dequantised_tensors_are_what_mlx_unpacks.
    assert read_output(tmp_path / "prefixed-out") == read_output(tmp_path / "packed-out")


@pytest.mark.parametrize(
    ("block", "message"), [("{", "cannot be read"), ("[4]", "not an object"), (None, "nothing says how")]
)
def test_a_damaged_sidecar_is_one_line(
    release_source: Path, tmp_path: Path, block: str | None, message: str
) -> None:
    convert(str(release_source), tmp_path / "source", mtp_bits=4)
    sidecar = tmp_path / "source" / "mtp.safetensors"
    tensors, metadata = read_safetensors(sidecar)
    del metadata["quantization"]
    write_safetensors(sidecar, tensors, metadata | ({"quantization": block} if block else {}))
    with pytest.raises(CheckpointError, match=message):
        convert(str(tmp_path / "source"), tmp_path / "out", dequantize=True)
