"""Conversion of random checkpoints in the release's layout: what comes out, what is refused, what lasts."""

import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, quantize_model

from mlx_step35.checkpoint import load_checkpoint
from mlx_step35.config import ModelConfig
from mlx_step35.conversion import run as conversion_run
from mlx_step35.conversion.hub import HubError
from mlx_step35.conversion.journal import locked
from mlx_step35.conversion.plan import make_plan
from mlx_step35.convert import convert, main
from mlx_step35.errors import CheckpointError, RequestError
from mlx_step35.layout import backbone_weights, mtp_weights
from mlx_step35.quantization import Quantization
from mlx_step35.recipes import uniform_recipe
from tests.release import (
    Stored,
    read_output,
    read_safetensors,
    release_config,
    release_tensors,
    stored,
    values,
    write_release,
    write_safetensors,
)
from tests.tiny import original_name

TOKENS = mx.array([[3, 9, 27, 18, 54, 41, 1, 2, 60, 33, 5, 8, 13, 21, 34, 55]])


@pytest.fixture(scope="module")
def raw() -> dict[str, Any]:
    return release_config()


@pytest.fixture(scope="module")
def tensors(raw: dict[str, Any]) -> dict[str, Stored]:
    return release_tensors(raw)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Stored]) -> Path:
    return write_release(tmp_path_factory.mktemp("release") / "source", tensors=tensors)


@pytest.fixture(scope="module")
def float_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in float32, because MLX's CPU backend computes exactly only there."""
    raw = release_config(torch_dtype="float32")
    path = tmp_path_factory.mktemp("float") / "source"
    return write_release(path, raw, release_tensors(raw, dtype="F32"))


def logits(path: Path) -> np.ndarray:
    return np.array(load_checkpoint(path, "float32")(TOKENS).astype(mx.float32))


def stock_logits(path: Path) -> np.ndarray:
    model, _ = load_model(path)
    return np.array(model(TOKENS).astype(mx.float32))


def digests(path: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(path.iterdir())}


# What comes out


def test_unquantised_norms_get_their_one_in_float32(
    source: Path, tensors: dict[str, Stored], tmp_path: Path
) -> None:
    convert(str(source), tmp_path / "out", dtype="float32")
    output = read_output(tmp_path / "out")
    config = ModelConfig.from_hf(release_config())
    for weight in (*backbone_weights(config), *mtp_weights(config)):
        expected = values(tensors[original_name(weight.name, config.num_layers)])
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
    source: Path, bits: int | None, group: int | None, mode: Any, tmp_path: Path
) -> None:
    convert(str(source), tmp_path / "out", True, group, bits, mode, mtp="drop", verify=True)
    model, config = load_model(source)
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


def test_dequantised_tensors_are_what_mlx_unpacks(source: Path, tmp_path: Path) -> None:
    convert(str(source), tmp_path / "quantised", True, q_bits=8)
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


def test_config_keeps_every_field(source: Path, raw: dict[str, Any], tmp_path: Path) -> None:
    convert(str(source), tmp_path / "out", True, mtp="drop")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    changed = {"eos_token_id", "quantization", "quantization_config", "mlx_step35_format"}
    assert {key: value for key, value in config.items() if key not in changed} == {
        key: value for key, value in raw.items() if key not in changed
    }
    assert config["eos_token_id"] == [1, 2, 31, 7]
    assert config["mlx_step35_format"] == 1
    assert config["quantization"] == config["quantization_config"]
    assert config["quantization"]["model.layers.3.mlp.gate.gate"]["bits"] == 8


def test_an_fp8_sources_own_block_is_replaced(tensors: dict[str, Stored], tmp_path: Path) -> None:
    raw = release_config(quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    write_release(tmp_path / "source", raw, tensors)
    convert(str(tmp_path / "source"), tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    load_checkpoint(tmp_path / "out")


def test_small_files_are_copied_byte_for_byte(source: Path, tmp_path: Path) -> None:
    convert(str(source), tmp_path / "out")
    for name in ("generation_config.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


def test_shards_and_index(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_step35.conversion.plan.MAX_SHARD_BYTES", 1_000_000)
    convert(str(source), tmp_path / "out", True, verify=True)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    found = {}
    for file in sorted((tmp_path / "out").glob("model-*.safetensors")):
        found.update(dict.fromkeys(read_safetensors(file)[0], file.name))
    assert index["weight_map"] == found
    assert len(set(found.values())) > 3
    assert not any(name.startswith("mtp.") for name in found)
    load_checkpoint(tmp_path / "out")


# MTP layers


def test_the_sidecar_says_how_it_is_packed(source: Path, tmp_path: Path) -> None:
    convert(str(source), tmp_path / "out", True, q_bits=8, mtp_bits=4)
    sidecar, metadata = read_safetensors(tmp_path / "out" / "mtp.safetensors")
    assert metadata["mlx_step35_format"] == "1"
    assert json.loads(metadata["quantization"]) == {"bits": 4, "group_size": 64, "mode": "affine"}
    assert metadata["source_revision"]
    assert sidecar["mtp.layers.2.shared_head.output.weight"][0] == "U32"
    assert sidecar["mtp.layers.2.shared_head.norm.weight"][0] == "BF16"


def test_drop_leaves_them_out(source: Path, tmp_path: Path) -> None:
    convert(str(source), tmp_path / "out", True, mtp="drop")
    assert not list((tmp_path / "out").glob("mtp*"))
    assert load_checkpoint(tmp_path / "out").mtp is None


def test_only_adds_them_beside_somebodys_files(source: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    convert(str(source), theirs, True, mtp="drop")
    (theirs / "conversion.json").unlink()
    before = digests(theirs)
    # Only the shard with the heads may be read.
    for name in ("model-00002", "model-00003", "model-00004"):
        assert (source / f"{name}.safetensors").exists()
    lean = tmp_path / "lean"
    lean.mkdir()
    for file in source.iterdir():
        if not file.name.startswith(("model-00002", "model-00003", "model-00004")):
            (lean / file.name).write_bytes(file.read_bytes())
    convert(str(lean), theirs, mtp="only", verify=True)
    after = digests(theirs)
    assert after.keys() - before.keys() == {"mtp.safetensors"}
    assert {name: after[name] for name in before} == before
    convert(str(source), tmp_path / "kept", True)
    model, kept = load_checkpoint(theirs), load_checkpoint(tmp_path / "kept")
    assert model.mtp is not None
    ours, expected = dict(tree_flatten(model.parameters())), dict(tree_flatten(kept.parameters()))
    assert ours.keys() == expected.keys()
    assert all(mx.array_equal(ours[name], expected[name]) for name in ours)
    with pytest.raises(RequestError, match="has MTP layers already"):
        convert(str(lean), theirs, mtp="only")


def test_only_refuses_a_source_without_heads(source: Path, tmp_path: Path) -> None:
    convert(str(source), tmp_path / "bare", mtp="drop")
    with pytest.raises(RequestError, match="no MTP layers"):
        convert(str(tmp_path / "bare"), tmp_path / "out", mtp="only")
    with pytest.raises(RequestError, match="--mtp drop"):
        convert(str(tmp_path / "bare"), tmp_path / "out")


def test_only_refuses_another_model(source: Path, tmp_path: Path) -> None:
    raw = release_config(intermediate_size=128)
    write_release(tmp_path / "other", raw, release_tensors(raw))
    with pytest.raises(RequestError, match="another shape"):
        convert(str(source), tmp_path / "other", mtp="only")


# The plan


def test_every_tensor_is_used_once_or_dropped_by_name(
    raw: dict[str, Any], tensors: dict[str, Stored]
) -> None:
    config = ModelConfig.from_hf(raw)
    names = [*tensors, "vision_model.conv1.weight"]
    recipe = uniform_recipe(config, Quantization(4, 64))
    plan = make_plan(names, config, recipe, "drop")
    used = [job.source for job in plan.jobs]
    assert len(used) == len(set(used))
    assert set(used).isdisjoint(plan.dropped)
    assert set(used) | set(plan.dropped) == set(names)
    assert plan.dropped["vision_model.conv1.weight"] == "vision"


def test_step37_prefixes_are_read(tensors: dict[str, Stored], tmp_path: Path, source: Path) -> None:
    renamed = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    write_release(tmp_path / "source", tensors=renamed)
    convert(str(tmp_path / "source"), tmp_path / "out")
    convert(str(source), tmp_path / "plain")
    assert read_output(tmp_path / "out") == read_output(tmp_path / "plain")


def test_dry_run_needs_no_weights_and_writes_nothing(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("config.json", "model.safetensors.index.json"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    before = sorted(tmp_path.iterdir())
    main(["--hf-path", str(tmp_path), "--mlx-path", str(tmp_path / "out"), "--recipe", "mac-96", "--dry-run"])
    assert sorted(tmp_path.iterdir()) == before
    printed = capsys.readouterr().out
    assert "recipe: mac-96" in printed
    for word in ("experts", "mtp head", "bits/weight", "total", "96 GB Mac: fits"):
        assert word in printed


def test_dry_run_of_the_real_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = json.loads((Path(__file__).parent / "data" / "step35_config.json").read_text())
    config = ModelConfig.from_hf(raw)
    names = [original_name(w.name, 45) for w in (*backbone_weights(config), *mtp_weights(config))]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    index = {"weight_map": dict.fromkeys(names, "model-00001.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    main(["--hf-path", str(tmp_path), "-q", "--q-bits", "4", "--dry-run"])
    printed = capsys.readouterr().out
    assert "112.179" in printed  # 110.81 GB and 1.37 GB of heads
    assert "96 GB Mac: does not fit" in printed
    assert "128 GB Mac: does not fit" in printed
    assert "192 GB Mac: fits 256K context" in printed


# Proof


def test_verify_finds_a_swapped_tensor(source: Path, tmp_path: Path) -> None:
    convert(str(source), tmp_path / "out", True, mtp="drop")
    file = tmp_path / "out" / "model.safetensors"
    output, metadata = read_safetensors(file)
    up, gate = (f"model.layers.3.mlp.switch_mlp.{name}_proj.weight" for name in ("up", "gate"))
    output[up], output[gate] = output[gate], output[up]
    write_safetensors(file, output, metadata)
    with pytest.raises(CheckpointError, match=r"layers\.3\.mlp\.switch_mlp\.gate_proj\.weight' .* is off by"):
        convert(str(source), tmp_path / "out", True, mtp="drop", verify=True)


def test_verify_finds_a_flipped_bit(source: Path, tmp_path: Path) -> None:
    convert(str(source), tmp_path / "out", True, mtp="drop")
    file = tmp_path / "out" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"not what the conversion wrote|is off by"):
        convert(str(source), tmp_path / "out", True, mtp="drop", verify=True)


def test_verify_checks_the_index(source: Path, tmp_path: Path) -> None:
    convert(str(source), tmp_path / "out", True)
    (tmp_path / "out" / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(CheckpointError, match="does not list what the shards hold"):
        convert(str(source), tmp_path / "out", True, verify=True)


# Crashes

SCRIPT = """
import os, signal, sys
from pathlib import Path
import mlx_step35.conversion.plan as plan
import mlx_step35.conversion.transform as transform
from mlx_step35.convert import main

plan.MAX_SHARD_BYTES = 1_000_000
transform.SLICE_ELEMENTS = 50_000
left = int(sys.argv[1])

def dying(call):
    def wrapper(*arguments, **options):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **options)
    return wrapper

# Everything that changes the disk may be the last thing the process does.
for name in ("pwrite", "fsync", "open", "ftruncate"):
    setattr(os, name, dying(getattr(os, name)))
Path.replace = dying(Path.replace)
main(sys.argv[2:])
print("calls", -left, file=sys.stderr)
"""


def run_and_die(after: int, arguments: list[str]) -> tuple[int, int]:
    """Run the converter until a system call; returns the exit status and how many calls a whole run makes."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(after), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    calls = int(done.stderr.split("calls ")[1]) if done.returncode == 0 else 0
    return done.returncode, calls


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.exhaustive)])
def test_killed_at_random_moments_it_resumes_to_the_same_bytes(
    source: Path, tmp_path: Path, kills: int
) -> None:
    # The same name, since the card's title is the directory's.
    (tmp_path / "a").mkdir()
    arguments = ["--hf-path", str(source), "-q", "--mlx-path", "out"]
    here = Path.cwd()
    random.seed(kills)
    try:
        os.chdir(tmp_path / "a")
        _, calls = run_and_die(0, arguments)
        expected = digests(tmp_path / "a" / "out")
        (tmp_path / "b").mkdir()
        os.chdir(tmp_path / "b")
        killed = 0
        while killed < kills:
            # Runs get shorter as shards are finished; one that ends before its moment begins a new round.
            status, _ = run_and_die(random.randint(1, calls), arguments)
            if status == 0:
                assert digests(tmp_path / "b" / "out") == expected
                for file in (tmp_path / "b" / "out").iterdir():
                    file.unlink()
            else:
                killed += 1
        assert run_and_die(0, arguments)[0] == 0
    finally:
        os.chdir(here)
    assert digests(tmp_path / "b" / "out") == expected


def test_a_full_disk_is_one_line_and_resumes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mlx_step35.conversion.plan.MAX_SHARD_BYTES", 1_000_000)
    arguments = ["--hf-path", str(source), "-q", "--mlx-path", str(tmp_path / "out")]
    room = 2_000_000
    pwrite = os.pwrite

    def full(fd: int, data: Any, offset: int) -> int:
        nonlocal room
        room -= len(data)
        if room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(fd, data, offset)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exited:
        patch.setattr(os, "pwrite", full)
        main(arguments)
    assert exited.value.code == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: No space left on device") and "same command" in error
    done = set((tmp_path / "out").glob("model-*.safetensors"))
    assert done
    times = {file: file.stat().st_mtime_ns for file in done}
    main(arguments)
    assert {file: file.stat().st_mtime_ns for file in done} == times
    convert(str(source), tmp_path / "fresh", True)
    assert read_output(tmp_path / "fresh") == read_output(tmp_path / "out")
    assert not list((tmp_path / "out").glob(".*"))


def test_too_small_a_disk_is_refused_before_writing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr(conversion_run.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(SystemExit) as exited:
        main(["--hf-path", str(source), "--mlx-path", str(tmp_path / "out")])
    assert exited.value.code == 2
    assert "GB more, its disk has 0.00 GB free" in capsys.readouterr().err


def test_a_finished_conversion_is_left_alone(source: Path, tmp_path: Path) -> None:
    convert(str(source), tmp_path / "out", True)
    (tmp_path / "out" / "README.md").write_text("my own words")
    before = digests(tmp_path / "out")
    convert(str(source), tmp_path / "out", True)
    assert digests(tmp_path / "out") == before


def test_foreign_directories_are_refused_untouched(source: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(RequestError, match=r"holds 'thesis\.txt' but no conversion\.json"):
        convert(str(source), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(RequestError, match="is a file"):
        convert(str(source), tmp_path / "thesis.txt")


def test_another_recipe_or_source_is_refused(source: Path, float_source: Path, tmp_path: Path) -> None:
    convert(str(source), tmp_path / "out", True)
    before = digests(tmp_path / "out")
    with pytest.raises(RequestError, match="another recipe"):
        convert(str(source), tmp_path / "out", True, q_bits=8)
    with pytest.raises(RequestError, match="another source"):
        convert(str(float_source), tmp_path / "out", True)
    assert digests(tmp_path / "out") == before


def test_a_second_converter_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out"), pytest.raises(RequestError, match="another conversion is writing"):
        convert(str(source), tmp_path / "out")
    convert(str(source), tmp_path / "out")


# Wrong inputs


def test_a_missing_shard_is_named(source: Path, tmp_path: Path) -> None:
    for file in source.iterdir():
        if file.name != "model-00003.safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(CheckpointError, match=r"model-00003\.safetensors is missing"):
        convert(str(tmp_path), tmp_path / "out")


def test_a_truncated_shard_is_named(source: Path, tmp_path: Path) -> None:
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    shard = tmp_path / "model-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model-00002\.safetensors is truncated"):
        convert(str(tmp_path), tmp_path / "out")


def test_nan_is_named(tensors: dict[str, Stored], tmp_path: Path) -> None:
    name = "model.layers.4.self_attn.q_proj.weight"
    array = values(tensors[name]).copy()
    array[5, 7] = np.nan
    write_release(tmp_path / "source", tensors={**tensors, name: stored(array, "BF16")})
    with pytest.raises(CheckpointError, match=f"'{name}' in .* holds NaN"):
        convert(str(tmp_path / "source"), tmp_path / "out", True)


def test_a_missing_and_an_unknown_tensor_are_named(tensors: dict[str, Stored], tmp_path: Path) -> None:
    some = dict(tensors)
    del some["model.layers.2.moe.gate.weight"]
    write_release(tmp_path / "missing", tensors=some)
    with pytest.raises(CheckpointError, match=r"has no 'model\.layers\.2\.mlp\.gate\.gate\.weight'"):
        convert(str(tmp_path / "missing"), tmp_path / "out")
    write_release(tmp_path / "more", tensors={**tensors, "model.extra": tensors["model.norm.weight"]})
    with pytest.raises(CheckpointError, match=r"'model\.extra'"):
        convert(str(tmp_path / "more"), tmp_path / "out")


def test_a_wrong_shape_is_named(tensors: dict[str, Stored], tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    write_release(tmp_path / "source", tensors={**tensors, name: tensors["model.norm.weight"]})
    with pytest.raises(CheckpointError, match=rf"'{name}' has shape \[320\], the config needs \[64, 320\]"):
        convert(str(tmp_path / "source"), tmp_path / "out")


def test_stray_files_are_ignored_with_a_warning(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for file in source.iterdir():
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
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line(
    source: Path,
    arguments: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as exited:
        main(["--hf-path", str(source), "--mlx-path", str(tmp_path / "out"), *arguments])
    assert exited.value.code == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert not (tmp_path / "out").exists()


def test_an_unknown_model_type_is_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(SystemExit) as exited:
        main(["--hf-path", str(tmp_path)])
    assert exited.value.code == 1
    assert "model_type" in capsys.readouterr().err


# Publishing


class FakeHub:
    """What the upload calls of huggingface_hub's API."""

    def __init__(self, files: list[str] | None) -> None:
        self.files = files
        self.uploaded: dict[str, Any] = {}

    def repo_exists(self, repo: str) -> bool:
        return self.files is not None

    def list_repo_files(self, repo: str) -> list[str]:
        return self.files or []

    def create_repo(self, repo: str, exist_ok: bool) -> str:
        return f"https://huggingface.co/{repo}"

    def upload_folder(self, **options: Any) -> None:
        self.uploaded = options


def test_upload_creates_and_sends_the_directory(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = FakeHub(None)
    monkeypatch.setattr("mlx_step35.conversion.hub.HfApi", lambda: hub)
    monkeypatch.setattr("mlx_step35.conversion.hub.get_token", lambda: "token")
    convert(str(source), tmp_path / "out", True, upload_repo="me/model")
    assert hub.uploaded["repo_id"] == "me/model"
    assert hub.uploaded["folder_path"] == tmp_path / "out"
    # Cut short, it may continue in its own repo, but not in another's.
    hub.files = ["model.safetensors", ".gitattributes"]
    convert(str(source), tmp_path / "out", True, upload_repo="me/model")
    hub.files = ["pytorch_model.bin"]
    with pytest.raises(HubError, match=r"me/model exists and holds 'pytorch_model\.bin'"):
        convert(str(source), tmp_path / "out", True, upload_repo="me/model")


def test_no_token_and_no_network_are_one_line(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_step35.conversion.hub.get_token", lambda: None)
    with pytest.raises(HubError, match="no hub token"):
        convert(str(source), tmp_path / "out", True, upload_repo="me/model")
    load_checkpoint(tmp_path / "out")
    monkeypatch.setattr("mlx_step35.conversion.hub.get_token", lambda: "token")

    def offline(*arguments: Any, **options: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(FakeHub, "repo_exists", offline)
    monkeypatch.setattr("mlx_step35.conversion.hub.HfApi", lambda: FakeHub(None))
    with pytest.raises(HubError, match="cannot be reached for me/model: no route to host"):
        convert(str(source), tmp_path / "out", True, upload_repo="me/model")


def test_a_hub_source_is_fetched_in_two_steps(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def snapshot(repo: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(source)

    monkeypatch.setattr("mlx_step35.conversion.hub.snapshot_download", snapshot)
    convert("stepfun-ai/Step-3.5-Flash", tmp_path / "out", mtp="only")
    first, second = asked
    assert "config.json" in first and not any("safetensors" in item and "index" not in item for item in first)
    assert "model-00001.safetensors" in second
    assert "model-00002.safetensors" not in second


def test_the_card_holds_the_facts(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_step35.conversion.hub.snapshot_download", lambda *a, **k: str(source))
    monkeypatch.chdir(tmp_path)
    main(["--hf-path", "stepfun-ai/Step-3.5-Flash", "--revision", "abc", "--mlx-path", "out", "-q"])
    card = (tmp_path / "out" / "README.md").read_text()
    for line in (
        "base_model: stepfun-ai/Step-3.5-Flash",
        "base_model_relation: quantized",
        "license: apache-2.0",
        "- mlx",
        "at revision `abc`",
        "mlx_step35.convert --hf-path stepfun-ai/Step-3.5-Flash --revision abc --mlx-path out -q",
        "| experts |",
        "Not measured.",
    ):
        assert line in card
