"""Conversion of random checkpoints in the release's layout: what comes out, here and in stock mlx-lm."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, quantize_model

from mlx_step35.checkpoint import load_checkpoint
from mlx_step35.config import ModelConfig
from mlx_step35.conversion.plan import make_plan
from mlx_step35.convert import convert, main
from mlx_step35.errors import CheckpointError, RequestError
from mlx_step35.layout import backbone_weights, mtp_weights
from mlx_step35.quantization import Quantization
from mlx_step35.recipes import uniform_recipe
from tests.release import (
    Stored,
    digests,
    read_output,
    read_safetensors,
    release_config,
    release_tensors,
    values,
    write_release,
    write_safetensors,
)
from tests.tiny import original_name

TOKENS = mx.array([[3, 9, 27, 18, 54, 41, 1, 2, 60, 33, 5, 8, 13, 21, 34, 55]])


def logits(path: Path) -> np.ndarray:
    return np.array(load_checkpoint(path, "float32")(TOKENS).astype(mx.float32))


def stock_logits(path: Path) -> np.ndarray:
    model, _ = load_model(path)
    return np.array(model(TOKENS).astype(mx.float32))


# What comes out


def test_unquantised_norms_get_their_one_in_float32(
    release_source: Path, release_weights: dict[str, Stored], tmp_path: Path
) -> None:
    convert(str(release_source), tmp_path / "out", dtype="float32")
    output = read_output(tmp_path / "out")
    config = ModelConfig.from_hf(release_config())
    for weight in (*backbone_weights(config), *mtp_weights(config)):
        expected = values(release_weights[original_name(weight.name, config.num_layers)])
        if weight.kind == "norm":
            expected = expected + np.float32(1)
        np.testing.assert_array_equal(values(output.pop(weight.name)), expected)
    assert not output


def test_unquantised_logits_are_the_sources(float_source: Path, tmp_path: Path) -> None:
    convert(str(float_source), tmp_path / "out")
    np.testing.assert_array_equal(logits(tmp_path / "out"), logits(float_source))
    np.testing.assert_allclose(stock_logits(tmp_path / "out"), logits(float_source), atol=2e-4)


@pytest.mark.parametrize(
    ("bits", "group", "mode"),
    [(4, None, "affine"), (8, 32, "affine"), (2, 64, "affine"), (3, 32, "affine"), (None, None, "mxfp4"),
     (None, None, "mxfp8"), (None, None, "nvfp4")],
)  # fmt: skip
def test_uniform_tensors_are_those_of_mlx_lm(
    release_source: Path, bits: int | None, group: int | None, mode: Any, tmp_path: Path
) -> None:
    convert(str(release_source), tmp_path / "out", True, group, bits, mode, mtp="drop", verify=True)
    model, config = load_model(release_source)
    model, config = quantize_model(model, config, group, bits, mode)
    expected = dict(tree_flatten(model.parameters()))
    output = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert output.keys() == expected.keys()
    for name, array in expected.items():
        assert output[name].dtype == array.dtype, name
        assert mx.array_equal(output[name], array), name
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert {key: written[key] for key in ("bits", "group_size", "mode")} == {
        key: config["quantization"][key] for key in ("bits", "group_size", "mode")
    }


@pytest.mark.parametrize(
    "choice",
    [
        {"quantize": True, "q_bits": 4},
        {"quantize": True, "q_bits": 3, "q_group_size": 32},
        {"quantize": True, "q_bits": 5},
        {"quantize": True, "q_mode": "mxfp4"},
        {"quantize": True, "q_mode": "mxfp8"},
        {"quantize": True, "q_mode": "nvfp4"},
        {"recipe": "mac-96"},
        {"recipe": "mac-512"},
        {"target_size": "4.9MB"},
        {"quantize": True, "q_overrides": [r"layers\.3\..*down_proj=8:32", "lm_head=16"], "mtp_bits": 8},
    ],
    ids=str,
)
def test_output_loads_here_and_in_stock_mlx_lm(
    float_source: Path, choice: dict[str, Any], tmp_path: Path
) -> None:
    convert(str(float_source), tmp_path / "out", verify=True, **choice)
    model = load_checkpoint(tmp_path / "out")
    assert model.mtp is not None
    np.testing.assert_allclose(stock_logits(tmp_path / "out"), logits(tmp_path / "out"), atol=2e-4)


def test_target_size_includes_the_heads(float_source: Path, tmp_path: Path) -> None:
    convert(str(float_source), tmp_path / "out", target_size="4.9MB")
    size = sum(len(data) for _, _, data in read_output(tmp_path / "out").values())
    assert 4_500_000 < size <= 4_900_000
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert len({entry["bits"] for entry in written.values() if isinstance(entry, dict)}) > 1


def test_dequantising_keeps_the_logits(float_source: Path, tmp_path: Path) -> None:
    convert(str(float_source), tmp_path / "quantised", True, q_bits=3)
    convert(str(tmp_path / "quantised"), tmp_path / "plain", dequantize=True)
    np.testing.assert_allclose(logits(tmp_path / "plain"), logits(tmp_path / "quantised"), atol=2e-4)


def test_dequantised_tensors_are_what_mlx_unpacks(release_source: Path, tmp_path: Path) -> None:
    convert(str(release_source), tmp_path / "quantised", True, q_bits=8)
    with pytest.raises(RequestError, match="--dequantize unpacks it"):
        convert(str(tmp_path / "quantised"), tmp_path / "plain", True)
    convert(str(tmp_path / "quantised"), tmp_path / "plain", dequantize=True)
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "quantization" not in config
    quantised, plain = read_output(tmp_path / "quantised"), read_output(tmp_path / "plain")
    path = "mtp.layers.1.eh_proj"
    packed, scales, biases = (
        mx.array(np.frombuffer(data, np.uint32 if dtype == "U32" else np.uint16).reshape(shape))
        for dtype, shape, data in (quantised[f"{path}.{leaf}"] for leaf in ("weight", "scales", "biases"))
    )
    expected = mx.dequantize(
        packed, scales.view(mx.bfloat16), biases.view(mx.bfloat16), group_size=64, bits=4
    )
    np.testing.assert_array_equal(values(plain[f"{path}.weight"]), np.array(expected.astype(mx.float32)))


def test_config_keeps_every_field(release_source: Path, release_raw: dict[str, Any], tmp_path: Path) -> None:
    convert(str(release_source), tmp_path / "out", True, mtp="drop")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    changed = {"eos_token_id", "quantization", "quantization_config", "mlx_step35_format"}
    assert {key: value for key, value in config.items() if key not in changed} == {
        key: value for key, value in release_raw.items() if key not in changed
    }
    assert config["eos_token_id"] == [1, 2, 31, 7]
    assert config["mlx_step35_format"] == 1
    assert config["quantization"] == config["quantization_config"]
    assert config["quantization"]["model.layers.3.mlp.gate.gate"]["bits"] == 8


def test_an_fp8_sources_own_block_is_replaced(release_weights: dict[str, Stored], tmp_path: Path) -> None:
    raw = release_config(quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    write_release(tmp_path / "source", raw, release_weights)
    convert(str(tmp_path / "source"), tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    load_checkpoint(tmp_path / "out")


def test_small_files_are_copied_byte_for_byte(release_source: Path, tmp_path: Path) -> None:
    convert(str(release_source), tmp_path / "out")
    for name in ("generation_config.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (release_source / name).read_bytes()


def test_shards_and_index(release_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_step35.conversion.plan.MAX_SHARD_BYTES", 1_000_000)
    convert(str(release_source), tmp_path / "out", True, verify=True)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    found = {}
    for file in sorted((tmp_path / "out").glob("model-*.safetensors")):
        found.update(dict.fromkeys(read_safetensors(file)[0], file.name))
    assert index["weight_map"] == found
    assert len(set(found.values())) > 3
    assert not any(name.startswith("mtp.") for name in found)
    load_checkpoint(tmp_path / "out")


# MTP layers


def test_the_sidecar_says_how_it_is_packed(release_source: Path, tmp_path: Path) -> None:
    convert(str(release_source), tmp_path / "out", True, q_bits=8, mtp_bits=4)
    sidecar, metadata = read_safetensors(tmp_path / "out" / "mtp.safetensors")
    assert metadata["mlx_step35_format"] == "1"
    assert json.loads(metadata["quantization"]) == {"bits": 4, "group_size": 64, "mode": "affine"}
    assert metadata["source_revision"]
    assert sidecar["mtp.layers.2.shared_head.output.weight"][0] == "U32"
    assert sidecar["mtp.layers.2.shared_head.norm.weight"][0] == "BF16"


def test_drop_leaves_them_out(release_source: Path, tmp_path: Path) -> None:
    convert(str(release_source), tmp_path / "out", True, mtp="drop")
    assert not list((tmp_path / "out").glob("mtp*"))
    assert load_checkpoint(tmp_path / "out").mtp is None


def test_only_adds_them_beside_somebodys_files(release_source: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    convert(str(release_source), theirs, True, mtp="drop")
    (theirs / "conversion.json").unlink()
    before = digests(theirs)
    # Only the shard with the heads may be read.
    for name in ("model-00002", "model-00003", "model-00004"):
        assert (release_source / f"{name}.safetensors").exists()
    lean = tmp_path / "lean"
    lean.mkdir()
    for file in release_source.iterdir():
        if not file.name.startswith(("model-00002", "model-00003", "model-00004")):
            (lean / file.name).write_bytes(file.read_bytes())
    convert(str(lean), theirs, mtp="only", verify=True)
    after = digests(theirs)
    assert after.keys() - before.keys() == {"mtp.safetensors"}
    assert {name: after[name] for name in before} == before
    convert(str(release_source), tmp_path / "kept", True)
    model, kept = load_checkpoint(theirs), load_checkpoint(tmp_path / "kept")
    assert model.mtp is not None
    ours, expected = dict(tree_flatten(model.parameters())), dict(tree_flatten(kept.parameters()))
    assert ours.keys() == expected.keys()
    assert all(mx.array_equal(ours[name], expected[name]) for name in ours)
    with pytest.raises(RequestError, match="has MTP layers already"):
        convert(str(lean), lean, mtp="only")


def test_only_may_be_repeated_and_verifies_if_asked(
    release_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = tmp_path / "theirs"
    convert(str(release_source), theirs, True, mtp="drop")
    convert(str(release_source), theirs, mtp="only")
    before = digests(theirs)
    capsys.readouterr()
    convert(str(release_source), theirs, mtp="only", verify=True)
    printed = capsys.readouterr().out
    assert "mtp.safetensors is complete already" in printed and "worst relative error" in printed
    for choice in ({"mtp_bits": 8}, {"dtype": "float32"}):
        with pytest.raises(RequestError, match="has MTP layers already"):
            convert(str(release_source), theirs, mtp="only", **choice)  # type: ignore[arg-type]
    assert digests(theirs) == before
    sidecar = theirs / "mtp.safetensors"
    content = bytearray(sidecar.read_bytes())
    content[-5] ^= 0x40
    sidecar.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"mtp\.safetensors is off by"):
        convert(str(release_source), theirs, mtp="only", verify=True)


def test_only_finds_heads_in_a_file_without_an_index(
    release_source: Path, release_weights: dict[str, Stored], tmp_path: Path
) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "config.json").write_bytes((release_source / "config.json").read_bytes())
    write_safetensors(theirs / "model.safetensors", release_weights)
    with pytest.raises(RequestError, match="has MTP layers already"):
        convert(str(release_source), theirs, mtp="only")
    assert sorted(file.name for file in theirs.iterdir()) == ["config.json", "model.safetensors"]


def test_only_needs_a_checkpoint_to_add_to(release_source: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"no config\.json; --mtp only adds to a checkpoint"):
        convert(str(release_source), tmp_path / "mistyped", mtp="only")
    assert not (tmp_path / "mistyped").exists()


def test_only_refuses_a_source_without_heads(release_source: Path, tmp_path: Path) -> None:
    convert(str(release_source), tmp_path / "bare", mtp="drop")
    with pytest.raises(RequestError, match="no MTP layers"):
        convert(str(tmp_path / "bare"), tmp_path / "bare", mtp="only")
    with pytest.raises(RequestError, match="--mtp drop"):
        convert(str(tmp_path / "bare"), tmp_path / "out")


def test_only_refuses_another_model(release_source: Path, tmp_path: Path) -> None:
    raw = release_config(intermediate_size=128)
    write_release(tmp_path / "other", raw, release_tensors(raw))
    with pytest.raises(RequestError, match="another shape"):
        convert(str(release_source), tmp_path / "other", mtp="only")


# The plan


def test_every_tensor_is_used_once_or_dropped_by_name(
    release_raw: dict[str, Any], release_weights: dict[str, Stored]
) -> None:
    config = ModelConfig.from_hf(release_raw)
    names = [*release_weights, "vision_model.conv1.weight"]
    recipe = uniform_recipe(config, Quantization(4, 64))
    plan = make_plan(names, config, recipe, "drop")
    used = [job.source for job in plan.jobs]
    assert len(used) == len(set(used))
    assert set(used).isdisjoint(plan.dropped)
    assert set(used) | set(plan.dropped) == set(names)
    assert plan.dropped["vision_model.conv1.weight"] == "vision"


def test_step37_prefixes_are_read(
    release_weights: dict[str, Stored], tmp_path: Path, release_source: Path
) -> None:
    renamed = {f"language_model.{name}": tensor for name, tensor in release_weights.items()}
    write_release(tmp_path / "source", tensors=renamed)
    convert(str(tmp_path / "source"), tmp_path / "out")
    convert(str(release_source), tmp_path / "plain")
    assert read_output(tmp_path / "out") == read_output(tmp_path / "plain")


def test_dry_run_needs_no_weights_and_writes_nothing(
    release_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("config.json", "model.safetensors.index.json"):
        (tmp_path / name).write_bytes((release_source / name).read_bytes())
    before = sorted(tmp_path.iterdir())
    main(["--hf-path", str(tmp_path), "--mlx-path", str(tmp_path / "out"), "--recipe", "mac-96", "--dry-run"])
    assert sorted(tmp_path.iterdir()) == before
    printed = capsys.readouterr().out
    assert "recipe: mac-96" in printed
    for word in ("experts", "mtp head", "bits/weight", "total", "96 GB Mac: fits"):
        assert word in printed


def test_dry_run_of_our_own_format_finds_the_sidecar(
    release_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(str(release_source), tmp_path / "plain")
    convert(str(release_source), tmp_path / "packed", True, q_bits=8)
    capsys.readouterr()
    for source, choice in (("plain", {"quantize": True}), ("packed", {"dequantize": True})):
        convert(str(tmp_path / source), tmp_path / "out", dry_run=True, **choice)  # type: ignore[arg-type]
        dry = capsys.readouterr().out
        convert(str(tmp_path / source), tmp_path / f"{source}-out", **choice)  # type: ignore[arg-type]
        assert "mtp head" in dry and capsys.readouterr().out == dry


def test_dry_run_of_the_real_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = json.loads((Path(__file__).parent / "data" / "step35_config.json").read_text())
    config = ModelConfig.from_hf(raw)
    names = [original_name(w.name, 45) for w in (*backbone_weights(config), *mtp_weights(config))]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    index = {"weight_map": dict.fromkeys(names, "model-00001.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    main(["--hf-path", str(tmp_path), "-q", "--q-bits", "4", "--dry-run"])
    printed = capsys.readouterr().out
    assert "112.18 GB" in printed  # 110.81 GB and 1.37 GB of heads
    assert "96 GB Mac: does not fit" in printed
    assert "128 GB Mac: does not fit" in printed
    assert "192 GB Mac: fits 256K context" in printed


# Proof


def test_verify_finds_a_swapped_tensor(release_source: Path, tmp_path: Path) -> None:
    convert(str(release_source), tmp_path / "out", True, mtp="drop")
    file = tmp_path / "out" / "model.safetensors"
    output, _ = read_safetensors(file)
    up, gate = (output[f"model.layers.3.mlp.switch_mlp.{name}_proj.weight"][2] for name in ("up", "gate"))
    # In place: a file of another size would be written again.
    content = file.read_bytes()
    content = content.replace(up, b"?" * len(up)).replace(gate, up).replace(b"?" * len(up), gate)
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"layers\.3\.mlp\.switch_mlp\.gate_proj\.weight' .* is off by"):
        convert(str(release_source), tmp_path / "out", True, mtp="drop", verify=True)


def test_verify_finds_a_flipped_bit(release_source: Path, tmp_path: Path) -> None:
    convert(str(release_source), tmp_path / "out", True, mtp="drop")
    file = tmp_path / "out" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"not what the conversion wrote|is off by"):
        convert(str(release_source), tmp_path / "out", True, mtp="drop", verify=True)


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "config.json", "chat_template.jinja"])
def test_verify_compares_what_stands_beside_the_weights(
    release_source: Path, tmp_path: Path, name: str
) -> None:
    convert(str(release_source), tmp_path / "out", True)
    (tmp_path / "out" / name).write_text('{"weight_map": {}}')
    with pytest.raises(CheckpointError, match=f"{name} is not what the conversion writes"):
        convert(str(release_source), tmp_path / "out", True, verify=True)
