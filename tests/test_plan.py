"""The planner against converted checkpoints, real caches and a measured run, and its command line."""

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_step35 import attention, costs, memory, plan, products
from mlx_step35.cache import layers
from mlx_step35.checkpoint import load_checkpoint, read_config, resolve_model
from mlx_step35.checkpoint.headers import read_header
from mlx_step35.config import ModelConfig
from mlx_step35.convert import convert
from mlx_step35.decoding import DecodeOptions, decode, prepare
from mlx_step35.errors import RequestError
from mlx_step35.model import Model
from mlx_step35.plan.report import describe
from mlx_step35.prompt_cache.index import as_tokens
from mlx_step35.prompt_cache.records import BLOCK_TOKENS, Block, take
from mlx_step35.sampling import SamplingParams
from tests.release import release_config

Ask = Callable[..., dict[str, Any]]


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Ask:
    """The command's JSON for some flags."""

    def run(*flags: str) -> dict[str, Any]:
        plan.main([*flags, "--json"])
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    return run


def test_four_bits_do_not_fit_128_gb(ask: Ask, capsys: pytest.CaptureFixture[str]) -> None:
    found = ask("--mac", "128", "--bits", "4", "--context", "65536")
    assert not found["fits_default"] and found["fits_raised"]
    assert found["max_context_default"] == 0
    assert found["max_context_raised"] > 250_000
    assert found["limit_default_bytes"] == 96 << 30
    assert found["recommended_recipe"] == "mac-128"
    plan.main(["--mac", "128", "--bits", "4", "--context", "65536"])
    text = capsys.readouterr().out
    assert "does not fit" in text
    assert "sudo sysctl iogpu.wired_limit_mb=122880" in text
    assert "--recipe mac-128" in text


@pytest.mark.parametrize("gigabytes", [96, 128, 192, 256, 512])
def test_each_machine_s_recipe_fits_it_with_64k(ask: Ask, gigabytes: int) -> None:
    found = ask("--mac", str(gigabytes), "--recipe", f"mac-{gigabytes}", "--context", "65536")
    assert found["fits_default"]
    assert found["max_context_default"] >= 65536
    assert found["recommended_recipe"] == f"mac-{gigabytes}"


def test_longest_context_is_the_last_that_fits(ask: Ask) -> None:
    flags = ("--mac", "128", "--recipe", "mac-128")
    most = ask(*flags)["max_context_default"]
    assert ask(*flags, "--context", str(most))["fits_default"]
    assert not ask(*flags, "--context", str(most + 2048))["fits_default"]


def test_too_small_a_machine(ask: Ask) -> None:
    found = ask("--mac", "64")
    assert found["recommended_recipe"] is None and not found["fits_raised"]
    assert "no context fits" in describe(found) and "start at 96 GB" in describe(found)


def test_derived_numbers_of_the_release(ask: Ask) -> None:
    found = ask("--mac", "128", "--bits", "4", "--context", "131072", "--chip", "M4 Max")
    assert found["weights_bytes"] / 1e9 == pytest.approx(110.81, abs=0.005)
    assert found["mtp_bytes"] / 1e9 == pytest.approx(3 * 0.455, abs=0.002)
    sliding = 66 << 20
    assert {int(k): v - sliding for k, v in found["kv_bytes_by_context"].items()} == {
        8192: 3 << 27, 16384: 3 << 28, 32768: 3 << 29, 65536: 3 << 30, 131072: 6 << 30, 262144: 12 << 30,
    }  # fmt: skip
    assert found["kv_bytes"] == (6 << 30) + sliding
    assert found["mtp_kv_bytes"] == 6 << 20
    assert found["peak_bytes"] > found["weights_bytes"] + found["mtp_bytes"] + found["kv_bytes"]
    assert found["speed_estimate"]["is_estimate"]
    assert found["speed_estimate"]["decode"][0]["tokens_per_s"][0] == pytest.approx(48.2)


@pytest.mark.parametrize("flags", [{}, {"q_bits": 4}, {"q_bits": 8, "q_group_size": 32, "mtp": "drop"}])
def test_weight_bytes_equal_the_headers(release_source: Path, tmp_path: Path, flags: dict[str, Any]) -> None:
    """Of real conversions, from their config and headers, and for a plain one from flags alone."""
    out = tmp_path / "out"
    convert(str(release_source), out, "q_bits" in flags, **flags)
    listed = {file.name: sum(e.nbytes for e in read_header(file).entries.values()) for file in _files(out)}
    heads = listed.pop("mtp.safetensors", 0)
    found = plan.answer(_question(str(out)))
    assert found["weights_bytes"] == sum(listed.values())
    assert found["mtp_bytes"] == heads
    assert sum(found["kinds_bytes"].values()) == found["weights_bytes"] + heads
    if flags == {"q_bits": 4}:
        by_flags = plan.answer(_question(str(out), bits=4))
        assert by_flags["weights_bytes"] == sum(listed.values()) and by_flags["mtp_bytes"] == heads
        for file in _files(out):
            file.unlink()
        by_config = plan.answer(_question(str(out)))
        assert by_config["weights_bytes"] == sum(listed.values()) and by_config["mtp_bytes"] == heads


def test_resident_bytes_equal_the_loaded_arrays(release_source: Path, tmp_path: Path) -> None:
    from mlx.utils import tree_flatten

    for path in (release_source, resolve_model("nano")):
        arrays: Any = tree_flatten(load_checkpoint(path).parameters())
        found = plan.answer(_question(str(path)))
        assert found["resident_bytes"] == sum(array.nbytes for _, array in arrays)


@pytest.mark.parametrize("passes", [[1], [10, 1, 1], [300, 300], [2048, 2048, 5], [700, *[1] * 90]])
def test_cache_bytes_equal_nbytes(tiny_model: Model, passes: list[int]) -> None:
    config, cache = tiny_model.config, tiny_model.make_cache()
    for num_tokens in passes:
        tiny_model.hidden(mx.zeros((1, num_tokens), dtype=mx.uint32), cache)
    mx.eval(cache.state)
    context = sum(passes)
    assert cache.nbytes == memory.allocated_bytes(config, passes, 4)
    assert cache.nbytes <= memory.allocated_bytes(config, [context], 4)
    # A snapshot has no spare rows, but those a rollback may need: a slack of 16 after the window less one.
    assert cache.snapshot().nbytes == costs.kv_bytes(config, context, 4, slack=memory.SLACK - 1)


@pytest.mark.parametrize("mtp", ["off", 3])
@pytest.mark.parametrize("length", [5, 30, 256, 600])
def test_snapshot_bytes_equal_nbytes(tiny_model: Model, length: int, mtp: Any) -> None:
    """Of what the prompt cache keeps: after a prompt, and after tokens decoded behind it."""
    cache = tiny_model.make_cache()
    prompt = [3 + index % 20 for index in range(length)]
    for tokens in (1, 40):
        options = DecodeOptions(tokens, mtp, False, 128)
        list(decode(tiny_model, prompt, cache, SamplingParams(), options))
        context = cache.offset
        blocks = [
            Block(b"", start, start + BLOCK_TOKENS, 0)
            for start in range(0, context - context % BLOCK_TOKENS, BLOCK_TOKENS)
        ]
        found = take(cache, as_tokens(cache.tokens), blocks).nbytes
        assert found == memory.snapshot_bytes(tiny_model.config, context, 4, mtp=mtp != "off")


@pytest.mark.parametrize(("prompt", "chunk"), [(40, 40), (200, 200), (500, 200)])
def test_workspace_covers_the_peak_of_a_prefill(prompt: int, chunk: int) -> None:
    """And not by much; windows of 8 tokens make blocks of sliding layers, 200 tokens also causal ones."""
    model = Model(ModelConfig.from_hf(release_config()))
    prepare(model)
    cache, options = model.make_cache(), DecodeOptions(1, "off", False, chunk)
    # Models are cycles; one of an earlier test that is collected midway would count as less taken here.
    gc.collect()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    list(decode(model, [3] * prompt, cache, SamplingParams(), options))
    taken = mx.get_peak_memory() - before - cache.nbytes
    predicted = memory.workspace_bytes(model.config, min(chunk, prompt), prompt, memory.CPU)
    assert 0.6 * predicted <= taken <= 1.1 * predicted


def test_planned_sizes_are_those_of_the_code() -> None:
    assert memory.SLACK == layers.DEFAULT_SLACK and memory.SLIDING_ROOM == layers.SLIDING_ROOM
    assert memory.GROWTH_ROWS == layers.GROWTH_ROWS and memory.SNAPSHOT_BLOCK == BLOCK_TOKENS
    assert memory.CAUSAL_BLOCK == products.CAUSAL_BLOCK and memory.MIN_BLOCK == attention.MIN_BLOCK


def test_bad_questions(capsys: pytest.CaptureFixture[str]) -> None:
    for flags, message in (
        (["--mac", "128", "--chip", "M9"], "no chip 'M9'"),
        (["--mac", "128", "--context", "300000"], "the model holds 262144"),
        (["--mac", "128", "--bits", "7"], "7 bits"),
        (["--mac", "1"], "memory in GB"),
        (["--model", "./nowhere"], "no model directory"),
    ):
        with pytest.raises(SystemExit) as stopped:
            plan.main(flags)
        assert stopped.value.code == 2
        output = capsys.readouterr()
        assert message in output.err and output.err.count("\n") == 1 and not output.out


def test_foreign_quantisation_is_refused(tmp_path: Path, release_raw: dict[str, Any]) -> None:
    raw = {**release_raw, "quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(RequestError, match="quantised by fp8"):
        plan.answer(_question(str(tmp_path)))


def test_this_machine_is_described(ask: Ask) -> None:
    found = ask("--model", "nano")
    assert "this m" in found["machine"].lower()
    assert found["context"] == read_config(resolve_model("nano")).context_length
    assert found["fits_default"]


def test_packaged_config_is_the_release_s() -> None:
    raw = json.loads((Path(__file__).parent / "data" / "step35_config.json").read_text())
    assert plan.release_config() == ModelConfig.from_hf(raw)


def _question(model: str, bits: int | None = None) -> plan.Question:
    return plan.Question(
        mac=None, chip=None, context=64, model=model, recipe=None, bits=bits, mtp_bits=4, chunk=64
    )


def _files(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors"))
