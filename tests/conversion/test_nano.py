"""The bundled model converted: a trained one, with its own tokenizer, in stock mlx-lm and here."""

import contextlib
import io
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import load as stock_load

from mlx_step35.chat.tokenizer import Tokenizer
from mlx_step35.checkpoint import load_checkpoint, resolve_model
from mlx_step35.convert import convert
from mlx_step35.quality import chunks_of, main, measure, read_text

NANO = resolve_model("nano")
TOKENIZER = Tokenizer.from_directory(NANO)
TOKENS = TOKENIZER.encode_text(read_text(None))[:96]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Float32 for everything unquantised, because MLX's CPU backend computes exactly only there."""
    choices = {
        "plain": {},
        "8": {"quantize": True, "q_bits": 8, "mtp_bits": 8},
        "4": {"quantize": True, "q_bits": 4},
        "3": {"quantize": True, "q_bits": 3},
        "2": {"quantize": True, "q_bits": 2},
        "mac-96": {"recipe": "mac-96"},
    }
    directory = tmp_path_factory.mktemp("nano")
    for name, choice in choices.items():
        convert("nano", directory / name, dtype="float32", verify=True, **choice)  # type: ignore[arg-type]
    return {name: directory / name for name in choices}


def test_plain_conversion_changes_no_logit(converted: dict[str, Path]) -> None:
    ids = mx.array([TOKENS])
    source = load_checkpoint(NANO, "float32")(ids)
    assert mx.array_equal(load_checkpoint(converted["plain"], "float32")(ids), source)


@pytest.mark.parametrize("name", ["plain", "4", "mac-96"])
def test_stock_mlx_lm_loads_it_with_tokenizer_and_agrees(converted: dict[str, Path], name: str) -> None:
    model, tokenizer = stock_load(str(converted[name]))
    ids = mx.array([TOKENS])
    ours = np.array(load_checkpoint(converted[name], "float32")(ids))
    np.testing.assert_allclose(np.array(model(ids)), ours, atol=2e-3)
    text = "  A lamp,\n\tand 42 gulls. "
    assert tokenizer.encode(text, add_special_tokens=False) == TOKENIZER.encode_text(text)


def test_divergence_falls_as_bits_rise(converted: dict[str, Path]) -> None:
    chunks = chunks_of(TOKENS, TOKENIZER.bos_token_id, 128)
    figures = {name: measure(NANO, converted[name], chunks) for name in ("2", "3", "4", "8", "plain")}
    divergences = [figure.kl_divergence for figure in figures.values()]
    assert divergences == sorted(divergences, reverse=True)
    assert figures["plain"].kl_divergence == pytest.approx(0, abs=1e-6)
    assert figures["8"].top1_agreement >= max(0.9, figures["2"].top1_agreement)
    assert len(figures["8"].model_acceptance) == 3


def test_the_command_prints_json_and_fills_the_card(
    converted: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TOKENIZER.decode(TOKENS[:40]))
    main(["--source", "nano", "--model", str(converted["4"]), "--text", str(text), "--json", "--card"])
    figures = json.loads(capsys.readouterr().out)
    assert figures["text"] == "text.txt" and figures["num_tokens"] > 20
    assert f"{figures['kl_divergence']:.5f} nats" in (converted["4"] / "README.md").read_text()


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    error = io.StringIO()
    with pytest.raises(SystemExit) as exited, contextlib.redirect_stderr(error):
        main(["--source", "nano", "--model", str(tmp_path / "missing")])
    assert exited.value.code == 2
    assert error.getvalue().startswith("error: ") and error.getvalue().count("\n") == 1
