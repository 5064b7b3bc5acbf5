"""Quality figures against the same figures computed in memory, and what they must do as bits change."""

import json
from dataclasses import asdict
from math import exp
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_step35.checkpoint import load_checkpoint
from mlx_step35.convert import convert
from mlx_step35.errors import CheckpointError, RequestError
from mlx_step35.quality import chunks_of, main, measure, read_text, update_card
from tests.release import block_scales, release_config, release_tensors, stored, to_fp8, values, write_release

CHUNKS = [[int(token) for token in np.random.default_rng(k).integers(0, 64, 70 + k)] for k in range(3)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    raw = release_config(torch_dtype="float32")
    path = tmp_path_factory.mktemp("quality") / "source"
    return write_release(path, raw, release_tensors(raw, dtype="F32"))


@pytest.fixture(scope="module")
def quantised(source: Path) -> dict[int, Path]:
    paths = {}
    for bits in (2, 3, 4, 8):
        paths[bits] = source.parent / f"{bits}bit"
        convert(str(source), paths[bits], True, q_bits=bits, mtp_bits=bits)
    return paths


def in_memory(source: Path, model: Path) -> tuple[float, float, float, float]:
    """Perplexities, divergence and agreement, from whole logits."""
    losses, divergence, agreed, count = [0.0, 0.0], 0.0, 0, 0
    models = [load_checkpoint(path) for path in (source, model)]
    for tokens in CHUNKS:
        logprobs = []
        for each in models:
            logits = np.array(each(mx.array([tokens])))[0, :-1].astype(np.float64)
            logprobs.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
        for k in range(2):
            losses[k] -= logprobs[k][np.arange(len(tokens) - 1), tokens[1:]].sum()
        divergence += (np.exp(logprobs[0]) * (logprobs[0] - logprobs[1])).sum()
        agreed += (logprobs[0].argmax(-1) == logprobs[1].argmax(-1)).sum()
        count += len(tokens) - 1
    return exp(losses[0] / count), exp(losses[1] / count), divergence / count, agreed / count


def test_streamed_figures_equal_those_in_memory(source: Path, quantised: dict[int, Path]) -> None:
    figures = measure(source, quantised[3], CHUNKS)
    expected = in_memory(source, quantised[3])
    got = (
        figures.source_perplexity,
        figures.model_perplexity,
        figures.kl_divergence,
        figures.top1_agreement,
    )
    assert got == pytest.approx(expected, rel=1e-4)
    assert figures.num_tokens == sum(len(tokens) - 1 for tokens in CHUNKS)


def test_acceptance_equals_the_chain_in_memory(source: Path) -> None:
    figures = measure(source, source, CHUNKS)
    model = load_checkpoint(source)
    hits, rows = [0] * 3, [0] * 3
    for tokens in CHUNKS:
        ids = mx.array([tokens])
        hidden = model.hidden(ids)
        best = np.array(model.logits(hidden).argmax(axis=-1))[0]
        for k in range(3):
            count = len(tokens) - 1 - k
            hidden = model.mtp.step(k, model.embed(ids[:, k + 1 :]), hidden[:, :count])
            drafts = np.array(model.mtp.logits(k, hidden).argmax(axis=-1))[0]
            hits[k] += int((drafts == best[k + 1 :]).sum())
            rows[k] += count
    assert figures.source_acceptance == pytest.approx(
        [hit / row for hit, row in zip(hits, rows, strict=True)]
    )


def test_a_model_compared_with_itself(source: Path) -> None:
    figures = measure(source, source, CHUNKS)
    assert figures.kl_divergence == pytest.approx(0, abs=1e-6)
    assert figures.top1_agreement == 1
    assert figures.source_perplexity == figures.model_perplexity
    assert figures.source_acceptance == figures.model_acceptance


def test_divergence_falls_as_bits_rise(source: Path, quantised: dict[int, Path]) -> None:
    divergences = [measure(source, quantised[bits], CHUNKS).kl_divergence for bits in (2, 3, 4, 8)]
    assert divergences == sorted(divergences, reverse=True)
    assert divergences[0] > 10 * divergences[-1]


def test_an_fp8_source_is_read_as_its_bfloat16_form(tmp_path: Path) -> None:
    tensors = to_fp8(release_tensors(release_config()))
    plain = {}
    for name, tensor in tensors.items():
        if tensor[0] == "F8_E4M3":
            scale = values(tensors[f"{name}_scale_inv"])
            plain[name] = stored(values(tensor) * block_scales(scale, tensor[1]), "BF16")
        elif not name.endswith("_scale_inv"):
            plain[name] = tensor
    write_release(tmp_path / "fp8", tensors=tensors)
    write_release(tmp_path / "plain", tensors=plain)
    figures = measure(tmp_path / "fp8", tmp_path / "plain", CHUNKS)
    assert figures.kl_divergence == pytest.approx(0, abs=1e-6)
    assert figures.source_acceptance == figures.model_acceptance


def test_an_fp8_source_without_heads_is_compared_without(tmp_path: Path) -> None:
    """The config goes on announcing three, as after a conversion that dropped them."""
    tensors = release_tensors(release_config())
    count = release_config()["num_hidden_layers"]
    heads = tuple(f"model.layers.{count + depth}." for depth in range(3))
    bare = {name: tensor for name, tensor in tensors.items() if not name.startswith(heads)}
    write_release(tmp_path / "fp8", tensors=to_fp8(bare))
    figures = measure(tmp_path / "fp8", tmp_path / "fp8", CHUNKS[:1])
    assert figures.source_acceptance == () and figures.kl_divergence == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", ["model.layers.4.self_attn.q_proj.weight", "lm_head.weight"])
def test_damaged_weights_give_no_figures(source: Path, tmp_path: Path, name: str) -> None:
    raw = release_config(torch_dtype="float32")
    tensors = release_tensors(raw, dtype="F32")
    array = values(tensors[name]).copy()
    array[5, 7] = np.nan
    damaged = write_release(tmp_path / "damaged", raw, {**tensors, name: stored(array, "F32")})
    for pair in ((damaged, source), (source, damaged)):
        with pytest.raises(CheckpointError, match=f"{damaged} has a loss of nan"):
            measure(*pair, CHUNKS[:1])


def test_a_loss_without_a_perplexity_is_refused(source: Path, tmp_path: Path) -> None:
    raw = release_config(torch_dtype="float32")
    tensors = release_tensors(raw, dtype="F32")
    loud = values(tensors["lm_head.weight"]) * np.float32(1e6)
    write_release(tmp_path / "loud", raw, {**tensors, "lm_head.weight": stored(loud, "F32")})
    with pytest.raises(CheckpointError, match=r"loud has a loss of \d+"):
        measure(source, tmp_path / "loud", CHUNKS[:1])


def test_what_cannot_be_compared_is_refused_before_anything_is_computed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def computed(*_: object) -> None:
        raise AssertionError("a model ran")

    monkeypatch.setattr("mlx_step35.quality._run", computed)
    raw = release_config(torch_dtype="float32", vocab_size=96)
    other = write_release(tmp_path / "other", raw, release_tensors(raw, dtype="F32"))
    with pytest.raises(RequestError, match=r"source has 64 tokens, .*other has 96"):
        measure(source, other, CHUNKS)
    with pytest.raises(RequestError, match="has token 64"):
        measure(source, source, [[1, 64]])
    for arguments, message in (
        (["--chunk", "1"], "--chunk is 1"),
        (["--chunk", "0"], "--chunk is 0"),
        (["--chunk", "-5"], "--chunk is -5"),
        (["--card"], "README.md has no quality section"),
    ):
        with pytest.raises(SystemExit) as exited:
            main(["--source", "nano", "--model", "nano", *arguments])
        assert exited.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and message in line


def test_memory_holds_one_layer_at_a_time(tmp_path: Path) -> None:
    raw = release_config(
        torch_dtype="float32", moe_num_experts=32, moe_layers_enum="1,2,3,4,5", hidden_size=320
    )
    tensors = release_tensors(raw, dtype="F32")
    write_release(tmp_path / "source", raw, tensors)
    sizes: dict[str, int] = {}
    for name, (_, _, data) in tensors.items():
        part = ".".join(name.split(".")[:3])
        sizes[part] = sizes.get(part, 0) + len(data)
    largest, everything = max(sizes.values()), sum(sizes.values())
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    measure(tmp_path / "source", tmp_path / "source", CHUNKS)
    peak = mx.get_peak_memory() - before
    # One layer, one of its matrices twice while it is turned, and the activations.
    assert peak < 1.5 * largest
    assert peak < everything / 3


def test_figures_go_into_the_card(source: Path, quantised: dict[int, Path]) -> None:
    figures = measure(source, quantised[4], CHUNKS, "some text")
    assert update_card(quantised[4], asdict(figures))
    card = (quantised[4] / "README.md").read_text()
    assert "Not measured" not in card
    assert f"{figures.kl_divergence:.5f} nats" in card
    assert "MTP acceptance, depth 3" in card
    # A second measurement replaces the first.
    assert update_card(quantised[4], asdict(figures))
    assert (quantised[4] / "README.md").read_text() == card
    (quantised[4] / "README.md").write_text("my own words")
    assert not update_card(quantised[4], asdict(figures))


def test_chunks_begin_with_bos() -> None:
    assert chunks_of([5, 6, 7, 8, 9], 0, 3) == [[0, 5, 6], [0, 7, 8], [0, 9]]
    assert chunks_of([5, 6, 7], None, 2) == [[5, 6]]


def test_the_bundled_text_is_there_and_wrong_ones_are_refused(tmp_path: Path) -> None:
    assert 3000 < len(read_text(None)) < 8000
    with pytest.raises(RequestError, match="cannot be read"):
        read_text(tmp_path / "missing.txt")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(RequestError, match="is empty"):
        read_text(tmp_path / "empty.txt")


def test_figures_are_json(source: Path) -> None:
    assert json.loads(json.dumps(asdict(measure(source, source, CHUNKS[:1]))))["num_tokens"] == 69
