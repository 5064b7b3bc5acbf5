"""Loading: three layouts, every packing, and a named error for every way a directory can be wrong."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_step35.checkpoint import load_checkpoint, read_config, resolve_model
from mlx_step35.checkpoint.headers import INDEX, read_header, read_listing
from mlx_step35.checkpoint.names import parameter_name, text_name
from mlx_step35.config import ModelConfig
from mlx_step35.convert import convert
from mlx_step35.errors import CheckpointError, ConfigError, RequestError
from mlx_step35.layout import backbone_weights, mtp_weights
from mlx_step35.model import Model
from tests.tiny import (
    VOCAB_SIZE,
    original_name,
    save_tensors,
    tiny_config,
    tiny_weights,
    write_checkpoint,
)

IDS = mx.array(np.random.default_rng(8).integers(0, VOCAB_SIZE, (1, 40)))


def converted(
    raw: dict[str, Any], tensors: dict[str, np.ndarray], mtp: bool = False
) -> dict[str, np.ndarray]:
    """The same weights under the names of a conversion, norms as 1 + w."""
    config = ModelConfig.from_hf(raw)
    weights = backbone_weights(config) + (mtp_weights(config) if mtp else [])
    return {
        weight.name: tensors[original_name(weight.name, config.num_layers)] + (weight.kind == "norm")
        for weight in weights
    }


def assert_same(model: Model, other: Model, mtp: bool = True) -> None:
    """Equal parameters, and equal logits of backbone and MTP."""
    mine, its = (dict(tree_flatten(m.parameters())) for m in (model, other))
    for name in mine.keys() & its.keys():
        assert mx.array_equal(mine[name], its[name]), name
    assert mx.array_equal(model(IDS), other(IDS))
    if mtp:
        hidden, embeddings = model.hidden(IDS), model.embed(IDS)
        for k in range(3):
            assert mx.array_equal(
                model.mtp.logits(k, model.mtp.step(k, embeddings, hidden)),
                other.mtp.logits(k, other.mtp.step(k, embeddings, hidden)),
            )


@pytest.fixture
def path(tmp_path: Path, tiny_path: Path) -> Path:
    """A private copy of the tiny checkpoint."""
    return shutil.copytree(tiny_path, tmp_path / "model")


class TestLayouts:
    def test_original_release(self, tiny_model: Model) -> None:
        tensors = tiny_weights(tiny_config())
        loaded = dict(tree_flatten(tiny_model.parameters()))
        assert len(loaded) == len(tensors)
        for name, array in loaded.items():
            stored = tensors[original_name(name, 6)]
            expected = stored + 1 if name.endswith("norm.weight") else stored
            np.testing.assert_array_equal(np.array(array), expected, err_msg=name)
        assert tiny_model.mtp_reason is None

    def test_mlx_lm_conversion_has_no_mtp_and_says_so_once(
        self, tmp_path: Path, tiny_model: Model, caplog: pytest.LogCaptureFixture
    ) -> None:
        raw = tiny_config()
        write_checkpoint(tmp_path, raw, converted(raw, tiny_weights(raw)))
        with caplog.at_level(logging.WARNING):
            model = load_checkpoint(tmp_path)
        assert model.mtp is None
        assert model.mtp_reason is not None
        assert [record.getMessage() for record in caplog.records] == [
            f"drafting with MTP is off: {model.mtp_reason}"
        ]
        assert_same(model, tiny_model, mtp=False)

    @pytest.mark.parametrize("names", [["mtp"], ["mtp-00001-of-00002", "mtp-00002-of-00002"]])
    def test_conversion_with_sidecar(self, tmp_path: Path, tiny_model: Model, names: list[str]) -> None:
        raw = tiny_config()
        tensors = converted(raw, tiny_weights(raw), mtp=True)
        heads = {name: tensor for name, tensor in tensors.items() if name.startswith("mtp.")}
        write_checkpoint(tmp_path, raw, {name: t for name, t in tensors.items() if name not in heads})
        metadata = {"mlx_step35_format": "1", "source_revision": "abc", "quantization": "{}"}
        for i, name in enumerate(names):
            part = dict(list(heads.items())[i :: len(names)])
            save_tensors(tmp_path / f"{name}.safetensors", part, metadata=metadata)
        assert_same(load_checkpoint(tmp_path), tiny_model)

    @pytest.mark.parametrize("file", ["mtp.safetensors", "model-mtp.safetensors"])
    def test_raw_mtp_tensors_beside_a_conversion_lack_their_1(
        self, tmp_path: Path, tiny_model: Model, file: str
    ) -> None:
        """Two shards of the release put beside somebody's conversion."""
        raw = tiny_config()
        tensors = tiny_weights(raw)
        heads = {
            name: t
            for name, t in tensors.items()
            if name.startswith(("model.layers.6.", "model.layers.7.", "model.layers.8."))
        }
        write_checkpoint(tmp_path, raw, converted(raw, tensors))
        (tmp_path / INDEX).unlink()
        save_tensors(tmp_path / file, heads)
        assert_same(load_checkpoint(tmp_path), tiny_model)

    @pytest.mark.parametrize("prefix", ["language_model.", "model.language_model."])
    def test_step37_prefixes_and_vision_tensors(self, tmp_path: Path, tiny_model: Model, prefix: str) -> None:
        raw = {"model_type": "step3p7", "vision_config": {}, "text_config": tiny_config()}
        tensors = {
            (
                prefix + name.removeprefix("model.")
                if prefix.startswith("model.") and "lm_head" not in name
                else name
                if prefix.startswith("model.")
                else prefix + name
            ): tensor
            for name, tensor in tiny_weights(tiny_config()).items()
        }
        for name in ("vision_model.conv1.weight", "vit_large_projector.weight", "model.vision_model.x"):
            tensors[name] = np.zeros(3, np.float32)
        assert_same(load_checkpoint(write_checkpoint(tmp_path, raw, tensors)), tiny_model)

    def test_cut_config_lists_load_the_same(self, tmp_path: Path, tiny_model: Model) -> None:
        raw = tiny_config()
        cut = {
            name: value[:6] if isinstance(value, list) and len(value) == 9 else value
            for name, value in raw.items()
        }
        assert_same(load_checkpoint(write_checkpoint(tmp_path, cut, tiny_weights(raw))), tiny_model)

    def test_tied_embeddings(self, tmp_path: Path) -> None:
        raw = tiny_config(tie_word_embeddings=True)
        tensors = tiny_weights(raw)
        assert "lm_head.weight" not in tensors
        model = load_checkpoint(write_checkpoint(tmp_path, raw, tensors))
        hidden = model.model.norm(model.hidden(IDS))
        assert mx.array_equal(model(IDS), hidden @ model.model.embed_tokens.weight.T)

    def test_announced_but_missing_or_stored_but_unannounced(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        raw = tiny_config()
        model = load_checkpoint(write_checkpoint(tmp_path / "a", raw, tiny_weights(raw, mtp=False)))
        assert model.mtp is None
        assert "holds no MTP layers" in str(model.mtp_reason)
        raw["num_nextn_predict_layers"] = 0
        model = load_checkpoint(write_checkpoint(tmp_path / "b", raw, tiny_weights(tiny_config())))
        assert model.mtp is None
        assert "announces no MTP layers" in str(model.mtp_reason)
        raw["num_nextn_predict_layers"] = 1
        model = load_checkpoint(write_checkpoint(tmp_path / "c", raw, tiny_weights(tiny_config())))
        assert model.mtp.num_layers == 1
        assert "announces 1 MTP layers, more are stored" in caplog.text


class TestDtypes:
    def test_auto_is_float32_on_the_cpu(self, tmp_path: Path) -> None:
        path = write_checkpoint(tmp_path, dtype="BF16")
        model = load_checkpoint(path)
        floats = {name: array.dtype for name, array in tree_flatten(model.parameters())}
        assert set(floats.values()) == {mx.float32}
        assert model.dtype == model(IDS).dtype == mx.float32

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
    def test_a_named_dtype(self, tmp_path: Path, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("mlx_step35.checkpoint._is_on_cpu", lambda: False)
        model = load_checkpoint(write_checkpoint(tmp_path, dtype="BF16"), dtype)
        assert model.dtype == getattr(mx, dtype)
        for name, array in tree_flatten(model.parameters()):
            # The router decides between nearly tied experts.
            is_router = ".mlp.gate." in name
            assert array.dtype == (mx.float32 if is_router else getattr(mx, dtype)), name
        assert model.embed(IDS).dtype == getattr(mx, dtype)

    def test_auto_is_the_stored_dtype_on_a_gpu(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("mlx_step35.checkpoint._is_on_cpu", lambda: False)
        assert load_checkpoint(write_checkpoint(tmp_path, dtype="BF16")).dtype == mx.bfloat16

    def test_the_cpu_has_no_half_precision_experts(self, tmp_path: Path) -> None:
        with pytest.raises(RequestError, match="float32 only, not bfloat16") as error:
            load_checkpoint(write_checkpoint(tmp_path), "bfloat16")
        assert error.value.field == "dtype"

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_half_precision_stays_half_precision(
        self, tmp_path: Path, tiny_model: Model, dtype: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Nothing on the way promotes activations; float32 norms or scales would."""
        raw = tiny_config(intermediate_size=64, moe_intermediate_size=64, share_expert_dim=64)
        tensors = converted(raw, tiny_weights(raw), mtp=True)
        config = ModelConfig.from_hf(raw)
        arrays: dict[str, mx.array] = {}
        for weight in backbone_weights(config) + mtp_weights(config):
            array = mx.array(tensors[weight.name])
            if not weight.is_quantizable:
                arrays[weight.name] = array if weight.kind == "bias" else array.astype(mx.bfloat16)
                continue
            for part, packed in zip(
                ("weight", "scales", "biases"), mx.quantize(array.astype(mx.bfloat16), 32, 8), strict=True
            ):
                arrays[f"{weight.path}.{part}"] = packed
        heads = {name: array for name, array in arrays.items() if name.startswith("mtp.")}
        backbone = {name: array for name, array in arrays.items() if name not in heads}
        mx.save_safetensors(str(tmp_path / "model.safetensors"), backbone, {"format": "mlx"})
        mx.save_safetensors(str(tmp_path / "mtp.safetensors"), heads, {"format": "mlx"})
        block = {"group_size": 32, "bits": 8}
        (tmp_path / "config.json").write_text(json.dumps(raw | {"quantization": block}))
        model, exact = load_checkpoint(tmp_path, dtype), load_checkpoint(tmp_path)
        assert "off by several percent" in caplog.text
        cache, expected = model.make_cache(), getattr(mx, dtype)
        hidden = model.hidden(IDS, cache)
        fused = model.mtp.step(0, model.embed(IDS), hidden)
        assert {array.dtype for array in (hidden, fused, *cache.state[0], *cache.state[1])} == {expected}
        assert model.logits(hidden).dtype == model.mtp.logits(0, fused).dtype == expected
        error = mx.abs(model.logits(hidden) - exact(IDS)).mean() / mx.abs(exact(IDS)).mean()
        assert error.item() < 0.3

    def test_packed_arrays_are_held_as_products_read_them(self, release_source: Path, tmp_path: Path) -> None:
        """In any other order each product would first copy them whole, scales and biases too."""
        convert(str(release_source), tmp_path / "out", True, q_bits=4)
        arrays = dict(tree_flatten(load_checkpoint(tmp_path / "out").parameters()))
        packed = [name for name in arrays if name.endswith(("scales", "biases"))]
        mx.eval(arrays)
        assert any(".switch_mlp." in name for name in packed)
        assert not [name for name in packed if not memoryview(arrays[name]).c_contiguous]

    def test_one_is_added_to_norms_in_float32(self, tmp_path: Path) -> None:
        raw = tiny_config()
        tensors = tiny_weights(raw)
        tensors["model.norm.weight"][:] = 2.0**-10
        model = load_checkpoint(write_checkpoint(tmp_path, raw, tensors, dtype="BF16"))
        assert model.model.norm.weight[0].item() == 1 + 2.0**-10

    def test_loading_reads_nothing_yet(self, tmp_path: Path) -> None:
        path = write_checkpoint(tmp_path)
        before = mx.get_active_memory()
        model = load_checkpoint(path)
        assert mx.get_active_memory() - before < 4096
        mx.eval(model.parameters())
        assert mx.get_active_memory() - before > 100_000


def shard(path: Path, number: int = 1) -> Path:
    return path / f"model-{number:05d}-of-00002.safetensors"


def rewrite(path: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    """Change the tensors of the checkpoint and write it again."""
    raw = json.loads((path / "config.json").read_text())
    tensors = tiny_weights(raw)
    change(tensors)
    write_checkpoint(path, raw, tensors)


def refused(path: Path, *parts: str) -> None:
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path)
    for part in parts:
        assert part in str(error.value)


class TestFaults:
    @pytest.mark.parametrize(
        "name",
        [
            "model.layers.3.moe.up_proj.weight",
            "model.layers.0.self_attn.g_proj.weight",
            "model.layers.2.moe.router_bias",
            "lm_head.weight",
            "model.layers.7.eh_proj.weight",
        ],
    )
    def test_a_missing_tensor(self, path: Path, name: str) -> None:
        rewrite(path, lambda tensors: tensors.__delitem__(name))
        expected = parameter_name(name, 6, True).name
        refused(path, str(path), f"has no '{expected}'")

    @pytest.mark.parametrize("name", ["model.layers.0.moe.gate.weight", "model.rotary.inv_freq", "visual.x"])
    def test_an_extra_tensor(self, path: Path, name: str) -> None:
        rewrite(path, lambda tensors: tensors.update({name: np.zeros(3, np.float32)}))
        refused(path, "model-0000", f"holds '{name}'")

    @pytest.mark.parametrize(
        "name", ["model.layers.1.self_attn.q_proj.weight", "model.layers.8.enorm.weight"]
    )
    def test_a_wrong_shape(self, path: Path, name: str) -> None:
        rewrite(path, lambda tensors: tensors.update({name: tensors[name][:-1]}))
        refused(path, "model-0000", f"'{name}' has shape", "expected [")

    def test_heads_of_the_other_kind_are_a_wrong_shape(self, path: Path) -> None:
        rewrite(
            path,
            lambda tensors: tensors.update(
                {"model.layers.1.self_attn.o_proj.weight": tensors["model.layers.0.self_attn.o_proj.weight"]}
            ),
        )
        refused(path, "'model.layers.1.self_attn.o_proj.weight' has shape [64, 64], expected [64, 96]")

    def test_a_missing_shard(self, path: Path) -> None:
        shard(path).unlink()
        refused(path, f"{shard(path)} is missing")

    @pytest.mark.parametrize("size", [0, 5, 100, -1, -1000])
    def test_a_truncated_shard(self, path: Path, size: int) -> None:
        data = shard(path).read_bytes()
        shard(path).write_bytes(data[:size])
        refused(path, shard(path).name, "truncated")

    def test_a_shard_that_is_no_file(self, path: Path) -> None:
        shard(path).unlink()
        shard(path).mkdir()
        refused(path, f"{shard(path)} is no file")
        shard(path).rmdir()
        # Opening a pipe without a writer would wait for ever.
        os.mkfifo(shard(path))
        refused(path, f"{shard(path)} is no file")

    def test_a_file_that_is_something_else(self, path: Path) -> None:
        shard(path).write_bytes(b"<html>not found</html>" * 100)
        refused(path, shard(path).name)
        shard(path).write_bytes((10).to_bytes(8, "little") + b'{"a": [1]}' + bytes(100))
        refused(path, shard(path).name, "damaged header")

    def test_metadata_may_be_null_but_not_a_number(self, path: Path) -> None:
        """mx.save_safetensors without metadata writes null."""
        mx.save_safetensors(str(shard(path)), dict(mx.load(str(shard(path)))))
        assert b'"__metadata__":null' in shard(path).read_bytes()[:2000]
        load_checkpoint(path)
        text = b'{"__metadata__": 3}'
        shard(path).write_bytes(len(text).to_bytes(8, "little") + text)
        refused(path, shard(path).name, "damaged header")

    def test_an_index_that_places_a_tensor_elsewhere(self, path: Path) -> None:
        index = json.loads((path / INDEX).read_text())
        index["weight_map"]["lm_head.weight"] = next(
            file for file in index["weight_map"].values() if file != index["weight_map"]["lm_head.weight"]
        )
        (path / INDEX).write_text(json.dumps(index))
        refused(path, "'lm_head.weight'", "does not place there")

    def test_an_index_that_promises_too_much(self, path: Path) -> None:
        index = json.loads((path / INDEX).read_text())
        index["weight_map"]["model.extra"] = shard(path).name
        (path / INDEX).write_text(json.dumps(index))
        refused(path, INDEX, "'model.extra'", shard(path).name)

    def test_a_tensor_the_index_does_not_list(self, path: Path) -> None:
        index = json.loads((path / INDEX).read_text())
        del index["weight_map"]["lm_head.weight"]
        (path / INDEX).write_text(json.dumps(index))
        refused(path, "holds 'lm_head.weight'", "does not place there")

    @pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": {}}', '{"weight_map": {"a": "../b"}}'])
    def test_a_damaged_index(self, path: Path, content: str) -> None:
        (path / INDEX).write_text(content)
        refused(path, INDEX)

    def test_a_tensor_twice(self, path: Path) -> None:
        save_tensors(path / "mtp.safetensors", {"lm_head.weight": np.zeros((32, 64), np.float32)})
        refused(path, "'lm_head.weight' is in", "mtp.safetensors")

    def test_the_same_mtp_layer_under_two_names(self, path: Path) -> None:
        save_tensors(path / "mtp.safetensors", {"mtp.layers.0.enorm.weight": np.zeros(64, np.float32)})
        refused(path, "are the same tensor", "enorm")

    def test_a_mixture_of_layouts(self, path: Path) -> None:
        name = "model.layers.1.moe.gate.weight"
        rewrite(
            path, lambda tensors: tensors.update({"model.layers.1.mlp.gate.gate.weight": tensors.pop(name)})
        )
        refused(path, "original name", "converted one")

    def test_no_weights_at_all(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
        refused(tmp_path, "no model*.safetensors")

    def test_no_config(self, tmp_path: Path) -> None:
        refused(tmp_path, "config.json is missing")

    @pytest.mark.parametrize("content", ["", "{", "[1]"])
    def test_a_damaged_config(self, path: Path, content: str) -> None:
        (path / "config.json").write_text(content)
        refused(path, "config.json")

    def test_fp8_is_to_be_converted_first(self, path: Path) -> None:
        data = shard(path).read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        expert = next(name for name in header if "moe.up_proj" in name or "moe.down_proj" in name)
        # The same bytes declared as four times as many FP8 values.
        header[expert]["dtype"] = "F8_E4M3"
        header[expert]["shape"][-1] *= 4
        text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
        shard(path).write_bytes(data[:8] + text + data[8 + length :])
        refused(path, "convert it first", f"mlx_step35.convert --hf-path {path} --mlx-path OUT -q")

    def test_another_quantiser(self, path: Path) -> None:
        raw = tiny_config(quantization_config={"quant_method": "modelopt"})
        (path / "config.json").write_text(json.dumps(raw))
        refused(path, "'modelopt'")

    def test_integer_weights_that_nothing_explains(self, path: Path) -> None:
        data = shard(path).read_bytes().replace(b'"dtype": "F32"', b'"dtype": "U32"', 1)
        shard(path).write_bytes(data)
        refused(path, "is U32, expected BF16 or F16 or F32")

    def test_packed_in_another_shape_than_the_config_says(self, tmp_path: Path) -> None:
        raw = tiny_config(quantization={"group_size": 64, "bits": 8})
        tensors = converted(raw, tiny_weights(raw))
        write_checkpoint(tmp_path, raw, tensors, num_shards=1)
        weight, scales, biases = mx.quantize(mx.array(tensors["lm_head.weight"]), 64, 4)
        (tmp_path / INDEX).unlink()
        file = tmp_path / "model-00001-of-00001.safetensors"
        arrays: Any = mx.load(str(file))
        arrays |= {"lm_head.weight": weight, "lm_head.scales": scales, "lm_head.biases": biases}
        mx.save_safetensors(str(tmp_path / "model.safetensors"), arrays, {"format": "mlx"})
        file.unlink()
        refused(tmp_path, "'lm_head.weight' has shape [32, 8], expected [32, 16] for 8 bits, groups of 64")
        (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
        refused(tmp_path, "'lm_head.scales'", "nothing says how 'lm_head' is quantised")
        (tmp_path / "config.json").write_text(
            json.dumps(tiny_config(quantization={"group_size": 64, "bits": 7}))
        )
        with pytest.raises(ConfigError, match=r"quantization\.bits"):
            load_checkpoint(tmp_path)

    def test_a_sidecar_of_the_future(self, path: Path) -> None:
        raw = tiny_config()
        tensors = converted(raw, tiny_weights(raw), mtp=True)
        backbone = {name: t for name, t in tensors.items() if not name.startswith("mtp.")}
        write_checkpoint(path, raw, backbone)
        heads = {name: t for name, t in tensors.items() if name.startswith("mtp.")}
        save_tensors(path / "mtp.safetensors", heads, metadata={"mlx_step35_format": "2"})
        refused(path, "format 2")


class TestNames:
    def test_every_release_tensor_is_used_exactly_once(self) -> None:
        """The real model's names, without any weights."""
        raw = json.loads((Path(__file__).parent / "data" / "step35_config.json").read_text())
        config = ModelConfig.from_hf(raw)
        wanted = [weight.name for weight in backbone_weights(config) + mtp_weights(config)]
        stored = [original_name(name, 45) for name in wanted]
        assert [parameter_name(name, 45, True).name for name in stored] == wanted
        assert len(set(wanted)) == len(wanted) == len(set(stored))
        per_mtp_layer = [name for name in stored if name.startswith("model.layers.46.")]
        assert len(per_mtp_layer) == 17
        assert "model.layers.46.transformer.shared_head.output.weight" in per_mtp_layer

    @pytest.mark.parametrize(
        ("stored", "expected"),
        [
            ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
            ("language_model.model.norm.weight", "model.norm.weight"),
            ("language_model.lm_head.weight", "lm_head.weight"),
            ("model.language_model.layers.1.x", "model.layers.1.x"),
            ("vision_model.conv1.weight", None),
            ("model.multi_modal_projector.weight", None),
        ],
    )
    def test_text_names(self, stored: str, expected: str | None) -> None:
        assert text_name(stored) == expected


class TestReading:
    def test_headers_agree_with_mlx(self, tiny_path: Path) -> None:
        listing = read_listing(tiny_path)
        for file in tiny_path.glob("*.safetensors"):
            arrays: Any = mx.load(str(file))
            entries = read_header(file).entries
            assert entries.keys() == arrays.keys()
            for name, entry in entries.items():
                assert entry == listing.entries[name]
                data = file.read_bytes()[entry.start : entry.start + entry.nbytes]
                assert data == bytes(memoryview(arrays[name]))

    def test_ids_that_end_a_text_come_from_both_configs(self, path: Path) -> None:
        (path / "generation_config.json").write_text('{"eos_token_id": [5, 2, 6]}')
        assert read_config(path).eos_token_ids == (1, 2, 31, 5, 6)
        (path / "config.json").write_text(json.dumps(tiny_config(eos_token_id=None)))
        assert read_config(path).eos_token_ids == (5, 2, 6)
        (path / "generation_config.json").write_text('{"eos_token_id": 7}')
        assert read_config(path).eos_token_ids == (7,)
        (path / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
        with pytest.raises(ConfigError, match=r"generation_config\.eos_token_id"):
            read_config(path)

    def test_resolving(self, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert resolve_model(path) == resolve_model(str(path)) == path
        assert resolve_model("nano").name == "nano"
        for name in ("/no/such/dir", "./missing", "missing", str(path / "config.json"), "a/b/c"):
            with pytest.raises(RequestError, match="no model directory") as error:
                resolve_model(name)
            assert error.value.field == "model"
        monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo, **_: str(tmp_path / repo))
        assert resolve_model("org/model") == tmp_path / "org/model"

        def fail(repo: str, **_: object) -> str:
            raise OSError("the network is down\nsecond line")

        monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
        with pytest.raises(RequestError, match=r"no directory 'org/model'.*the network is down$"):
            resolve_model("org/model")
