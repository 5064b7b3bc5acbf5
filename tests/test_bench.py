"""The benchmark's measurements on models small enough that only their form can be checked."""

import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_step35 import bench
from mlx_step35.bench.compare import compare
from mlx_step35.bench.options import parse_job
from mlx_step35.bench.plot import plot
from mlx_step35.bench.sweep import SweepOptions, sweep
from mlx_step35.bench.synthetic import CPU_CHUNK, measure
from mlx_step35.bench.timing import Spread, time_step
from mlx_step35.config import ModelConfig
from mlx_step35.costs import kv_bytes_per_token
from mlx_step35.errors import RequestError
from mlx_step35.model import Model
from mlx_step35.quantization import Quantization
from tests.release import release_config

OPTIONS = SweepOptions(
    contexts=(0, 40, 70),
    depths=("off", 2, "auto"),
    temperatures=(0.0, 1.0),
    num_tokens=6,
    prefill_step_size=32,
)


def test_sweep_measures_every_combination(tiny_model: Model) -> None:
    frontiers = list(sweep(tiny_model, [3, 1, 4, 1, 5], OPTIONS))
    assert [frontier.context for frontier in frontiers] == [0, 40, 70]
    for frontier in frontiers:
        assert [(run.depth, run.temperature) for run in frontier.decodes] == [
            (depth, temperature) for depth in OPTIONS.depths for temperature in OPTIONS.temperatures
        ]
        assert all(run.tokens_per_s > 0 and run.tokens_per_pass >= 1 for run in frontier.decodes)
        assert frontier.decodes[0].tokens_per_pass == 1
        assert list(frontier.steps) == [1, 2, 3, 4]
        assert frontier.first_token_s > 0 and frontier.peak_bytes > 0
    assert frontiers[0].prefill_tokens_per_s == 0 < frontiers[1].prefill_tokens_per_s
    assert frontiers[2].first_token_s > frontiers[1].first_token_s / 2
    json.dumps([frontier.as_json() for frontier in frontiers])


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--contexts", "0,20", "--mtp", "off,1", "--temps", "0", "--num-tokens", "3"]
    bench.main(flags)
    output = capsys.readouterr()
    assert "prefill t/s" in output.out and "off, T=0" in output.out and "prefill of 20" in output.err
    bench.main([*flags, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [row["context"] for row in found["contexts"]] == [0, 20]
    assert set(found["contexts"][1]["step_ms"]["1"]) == {"host", "build", "dispatch", "wait"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--contexts", "40000"], "the model holds 32768"),
        (["--num-tokens", "1"], "at least 2"),
        (["--synthetic", "full-layer", "--compare-mlx-lm"], "--synthetic has no effect on --compare-mlx-lm"),
        (["--synthetic", "full-layer", "--plot", "out.png"], "--plot has no effect on --synthetic"),
        (["--synthetic", "full-layer", "--contexts", "0,64"], "one context"),
        (["--synthetic", "full-layer", "--bits", "7"], "invalid choice"),
        (["--synthetic", "full-layer", "--chunk", "0"], "at least 1"),
        (["--compare-mlx-lm", "--pairs", "0"], "at least 1"),
        (["--compare-mlx-lm", "--temps", "0"], "--temps has no effect on --compare-mlx-lm"),
        (["--bits", "8"], "--bits has no effect on the sweep"),
        (["--contexts", "-1"], "at least 0"),
        (["--temps", "nan"], "at least 0"),
        (["--text", "nowhere.txt"], "cannot read"),
        (["--model", "./nowhere"], "no model directory"),
    ],
)
def test_mistakes_are_refused(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench.main(flags)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_compares_with_mlx_lm_on_the_same_float32_weights(
    release_source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = compare(release_source, [5, 6, 7], num_prompt=40, num_tokens=8, pairs=2)
    assert found.same_tokens
    assert found.prefill["ratio"].low <= found.prefill["ratio"].median <= found.prefill["ratio"].high
    assert "against mlx-lm: 2 pairs" in str(found)
    assert found.as_json()["decode"]["cpu_ratio"]["median"] > 0


def test_synthetic_layers_add_up_to_the_model() -> None:
    config = ModelConfig.from_hf(release_config())
    found = measure(config, Quantization(4, 64), context=20, chunk=24)
    counts = {part.name: part.count for part in found.parts}
    assert counts == {"full dense": 1, "sliding moe": 4, "full moe": 1, "head": 1, "mtp": 1}
    expected = sum(counts[part.name] * part.steps[2].total_s for part in found.parts if part.name != "mtp")
    assert found.step_s(2) == pytest.approx(expected)
    assert found.tokens_per_s(0) == pytest.approx(1 / found.step_s(1))
    assert "EXTRAPOLATED" in str(found) and found.as_json()["is_extrapolated"]
    said: list[str] = []
    without = measure(replace(config, mtp_layers=()), Quantization(4, 64), 20, on_progress=said.append)
    assert said == [
        f"part {index + 1} of 4: {name}"
        for index, name in enumerate(["full dense", "sliding moe", "full moe", "head"])
    ]
    assert without.chunk == CPU_CHUNK
    assert "mtp" not in {part.name for part in without.parts} and without.as_json()["decode_tokens_per_s"]


def test_plot_writes_a_picture(tiny_model: Model, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for contexts in ((0, 20), (0,)):
        frontiers = list(sweep(tiny_model, [1, 2], replace(OPTIONS, contexts=contexts, depths=("off", 2))))
        plot(frontiers, "tiny", tmp_path / "out.png")
        assert (tmp_path / "out.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(RequestError, match="cannot write"):
        plot(frontiers, "tiny", tmp_path / "out.nonsense")


@pytest.mark.parametrize(
    ("name", "has_matplotlib", "message"),
    [("out.png", False, r"pip install 'mlx-step35\[bench\]'"), ("nowhere/out.png", True, "no directory")],
)
def test_what_cannot_be_plotted_is_refused_before_measuring(
    name: str, has_matplotlib: bool, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The package's name `plot` is the function.
    module = import_module("mlx_step35.bench.plot")
    monkeypatch.setattr(module, "find_spec", lambda _: has_matplotlib or None)
    monkeypatch.setattr(bench, "load_checkpoint", None)
    job = parse_job(["--plot", str(tmp_path / name)])
    with pytest.raises(RequestError, match=message):
        bench.run(job)


def test_step_times_and_spreads() -> None:
    x = mx.random.normal((200, 200))
    step = time_step(lambda: [x @ x], repeats=3)
    assert 0 < step.host_s < step.total_s
    runs: list[int] = []
    time_step(lambda: runs.append(1) or [x], repeats=3, budget_s=0.0)
    assert len(runs) == 2
    time_step(lambda: runs.append(1) or [x], repeats=1, is_warm=True)
    assert len(runs) == 3
    assert str(Spread.of([3.0, 1.0, 2.0])) == "2.00 (1.00 to 3.00)"


@pytest.mark.parametrize("num_tokens", [300, pytest.param(2000, marks=pytest.mark.exhaustive)])
def test_memory_of_decoding_stays_flat(tiny_model: Model, num_tokens: int) -> None:
    """Past the window only the rows of full layers are added: nothing else grows, and nothing is copied."""
    cache = tiny_model.make_cache()
    token = mx.array([[1]], dtype=mx.uint32)

    def decode(count: int) -> int:
        mx.clear_cache()
        mx.reset_peak_memory()
        for _ in range(count):
            mx.eval(tiny_model.logits(tiny_model.hidden(token, cache)), cache.state)
        return mx.get_peak_memory() - cache.nbytes

    # 256 rows are the first buffer of a full layer, so both halves see growth or neither.
    early = decode(40)
    assert cache.offset > 4 * 8
    late = decode(num_tokens)
    # At most one full layer's old buffer beside its new one.
    copied = kv_bytes_per_token(tiny_model.config, 4) // 2 * cache.offset
    assert late <= early + copied + 50_000


def test_usual_contexts_that_the_model_does_not_hold_are_left_out() -> None:
    said: list[str] = []
    options = bench._fitting(parse_job(["--num-tokens", "2"]), 9000, said.append)
    assert options.contexts == (0, 2048, 8192)
    assert [line.split()[1] for line in said] == ["16384", "32768"]
    with pytest.raises(RequestError, match="the model holds 9000"):
        bench._fitting(parse_job(["--contexts", "0,9000"]), 9000, said.append)
