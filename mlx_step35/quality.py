"""How far a converted checkpoint is from its source: perplexity, KL divergence, top-1 agreement, acceptance.

The source may be 400 GB on a Mac with 96: every model runs layer by layer from disk over the whole text, so
that memory holds one layer at a time. Logits exist for a few rows at a time only, because a row has as many
as the vocabulary has entries.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.resources import files
from math import exp
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from mlx_step35.cache import window_mask
from mlx_step35.chat.tokenizer import Tokenizer
from mlx_step35.checkpoint import read_config, resolve_model
from mlx_step35.conversion.card import CARD, has_quality, put_quality
from mlx_step35.conversion.teacher import LayerStream
from mlx_step35.conversion.tensorfile import write_atomically
from mlx_step35.errors import CheckpointError, RequestError
from mlx_step35.exits import run_command

# Rows whose logits are in memory together: 64 of 128,896 entries are 33 MB in float32.
ROWS = 64
HELD_OUT = "heldout.txt"
# exp of more is no float.
LARGEST_LOSS = 700.0


@dataclass(frozen=True, slots=True)
class Figures:
    """Divergence in nats. Acceptance is per depth: how often that MTP layer, given the true tokens before,
    proposes what its own backbone finds likeliest; empty without MTP layers."""

    text: str
    num_tokens: int
    source_perplexity: float
    model_perplexity: float
    kl_divergence: float
    top1_agreement: float
    source_acceptance: tuple[float, ...]
    model_acceptance: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class _Run:
    """What one model made of the text: normed final states per chunk, its head, its acceptance."""

    states: list[mx.array]
    stream: LayerStream
    acceptance: tuple[float, ...]

    def logprobs(self, chunk: int, start: int) -> mx.array:
        logits = self.stream.head(self.states[chunk][:, start : start + ROWS])[0]
        return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def measure(source: Path, model: Path, chunks: Sequence[Sequence[int]], text: str = "") -> Figures:
    """Compare two checkpoints on token sequences, each of which is read from its own beginning.

    Raises RequestError for different vocabularies, before anything is computed, and CheckpointError when the
    loss is not finite.
    """
    _check_vocabularies(source, model, chunks)
    runs = [_run(path, chunks) for path in (source, model)]
    totals, count = [0.0] * 4, 0
    for index, tokens in enumerate(chunks):
        targets = mx.array(list(tokens[1:]))
        for start in range(0, targets.size, ROWS):
            wanted = targets[start : start + ROWS]
            first, second = (run.logprobs(index, start)[: wanted.size] for run in runs)
            totals = [
                total + part for total, part in zip(totals, _compare(first, second, wanted), strict=True)
            ]
            count += wanted.size
    return Figures(
        text=text,
        num_tokens=count,
        source_perplexity=_perplexity(source, totals[0] / count),
        model_perplexity=_perplexity(model, totals[1] / count),
        kl_divergence=totals[2] / count,
        top1_agreement=totals[3] / count,
        source_acceptance=runs[0].acceptance,
        model_acceptance=runs[1].acceptance,
    )


def _check_vocabularies(source: Path, model: Path, chunks: Sequence[Sequence[int]]) -> None:
    sizes = [read_config(path).vocab_size for path in (source, model)]
    if sizes[0] != sizes[1]:
        raise RequestError(
            f"the vocabularies differ: {source} has {sizes[0]} tokens, {model} has {sizes[1]}", field="model"
        )
    largest = max(max(tokens) for tokens in chunks)
    if largest >= sizes[1]:
        raise RequestError(f"the text has token {largest}, {model} has {sizes[1]} tokens", field="text")


def _perplexity(path: Path, loss: float) -> float:
    # Written so that NaN is refused too.
    if not loss < LARGEST_LOSS:
        raise CheckpointError(f"{path} has a loss of {loss} nats a token; its weights are damaged")
    return exp(loss)


def _compare(first: mx.array, second: mx.array, wanted: mx.array) -> list[float]:
    """Both losses, divergence of the second from the first, and equal first choices, summed over rows."""
    losses = [-mx.take_along_axis(each, wanted[:, None], axis=-1).sum() for each in (first, second)]
    divergence = (mx.exp(first) * (first - second)).sum()
    agreed = (first.argmax(axis=-1) == second.argmax(axis=-1)).sum()
    mx.eval(losses, divergence, agreed)
    return [float(np.array(part)) for part in (*losses, divergence, agreed)]


def _run(path: Path, chunks: Sequence[Sequence[int]]) -> _Run:
    """All layers over all chunks, one layer in memory at a time; afterwards only the head stays."""
    stream = LayerStream(path)
    ids = [mx.array(list(tokens))[None] for tokens in chunks]
    hidden = [stream.embed(one) for one in ids]
    mx.eval(hidden)
    for index in tqdm(range(stream.config.num_layers), desc=path.name, unit=" layers"):
        layer, window = stream.layer(index), stream.config.layers[index].window
        for chunk, x in enumerate(hidden):
            hidden[chunk] = layer(x, window_mask(x.shape[1], 0, window), None)
            mx.eval(hidden[chunk])
        del layer
        stream.drop_layer(index)
    states = [stream.norm(x) for x in hidden]
    mx.eval(states)
    acceptance = tuple(_acceptance(stream, ids, hidden, states))
    return _Run(states, stream, acceptance)


def _acceptance(
    stream: LayerStream, ids: list[mx.array], hidden: list[mx.array], states: list[mx.array]
) -> Iterator[float]:
    """Per depth, the share of rows where the MTP layer's first choice is the backbone's."""
    best = [_argmax(stream.head, x) for x in states]
    embeddings = [stream.embed(one) for one in ids]
    mx.eval(embeddings)
    stream.drop_embedding()
    for depth in range(stream.num_mtp_layers):
        mtp = stream.mtp_layers(depth)
        hits = rows = 0
        for chunk, x in enumerate(hidden):
            # Row i sees token i+1+depth and predicts the one after, as the backbone does in row i+1+depth.
            count = ids[chunk].shape[1] - 1 - depth
            if count <= 0:
                continue
            hidden[chunk] = mtp.step(depth, embeddings[chunk][:, depth + 1 :], x[:, :count])
            mx.eval(hidden[chunk])
            drafts = _argmax(partial(mtp.logits, depth), hidden[chunk])
            hits += int((drafts == best[chunk][depth + 1 :]).sum())
            rows += count
        stream.drop_mtp_layer(depth)
        if rows:
            yield hits / rows


def _argmax(head: Any, x: mx.array) -> mx.array:
    """The likeliest token of every row of (1, L, D)."""
    parts = [head(x[:, start : start + ROWS])[0].argmax(axis=-1) for start in range(0, x.shape[1], ROWS)]
    for part in parts:
        mx.eval(part)
    return mx.concatenate(parts)


def chunks_of(tokens: Sequence[int], bos: int | None, length: int) -> list[list[int]]:
    """A text cut into sequences that each begin with BOS; a token alone predicts nothing and is left out.

    Raises RequestError for a length that leaves no room to predict anything.
    """
    if length < 2:
        raise RequestError(f"--chunk is {length}, but a sequence has at least 2 tokens", field="chunk")
    start = [] if bos is None else [bos]
    body = length - len(start)
    pieces = [[*start, *tokens[first : first + body]] for first in range(0, len(tokens), body)]
    return [piece for piece in pieces if len(piece) > 1]


def read_text(path: Path | None) -> str:
    """A file's text, or the bundled one. Raises RequestError when there is no such file or nothing in it."""
    if path is None:
        return (files("mlx_step35") / HELD_OUT).read_text(encoding="utf-8")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} cannot be read: {error}", field="text") from None
    if not text.strip():
        raise RequestError(f"{path} is empty", field="text")
    return text


def has_quality_section(directory: Path) -> bool:
    """Whether there is a model card with a place for the figures."""
    card = directory / CARD
    return card.exists() and has_quality(card.read_text(encoding="utf-8", errors="replace"))


def update_card(directory: Path, figures: Mapping[str, Any]) -> bool:
    """Put the figures into the model card; False when it has no place for them."""
    card = directory / CARD
    if not card.exists():
        return False
    try:
        text = put_quality(card.read_text(encoding="utf-8"), figures)
    except ValueError:
        return False
    write_atomically(card, text.encode())
    return True


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: prints a table or JSON; ends the process unless all is well."""
    given = _parser().parse_args(arguments)
    if code := run_command(lambda: _report(given)):
        sys.exit(code)


def _report(given: argparse.Namespace) -> None:
    text = read_text(given.text)
    model = resolve_model(given.model)
    source = resolve_model(given.source)
    if given.card and not has_quality_section(model):
        raise RequestError(f"{model / CARD} has no quality section for --card to fill", field="card")
    tokenizer = Tokenizer.from_directory(model)
    chunks = chunks_of(tokenizer.encode_text(text), tokenizer.bos_token_id, given.chunk)
    if not chunks:
        raise RequestError("the text has no two tokens", field="text")
    name = given.text.name if given.text else "the bundled text"
    figures = asdict(measure(source, model, chunks, name))
    print(json.dumps(figures) if given.json else _table(figures))
    if given.card and not update_card(model, figures):
        raise CheckpointError(f"{model / CARD} has no quality section")


def _table(figures: Mapping[str, Any]) -> str:
    lines = [f"{figures['num_tokens']} tokens of {figures['text']}", f"{'':<24}{'source':>10}{'model':>10}"]
    lines.append(
        f"{'perplexity':<24}{figures['source_perplexity']:>10.4f}{figures['model_perplexity']:>10.4f}"
    )
    for depth in range(max(len(figures["source_acceptance"]), len(figures["model_acceptance"]))):
        pair = [figures[f"{who}_acceptance"][depth : depth + 1] for who in ("source", "model")]
        shown = [f"{share[0]:>10.3f}" if share else f"{'-':>10}" for share in pair]
        lines.append(f"{f'acceptance, depth {depth + 1}':<24}{''.join(shown)}")
    lines.append(f"{'KL divergence':<24}{'':>10}{figures['kl_divergence']:>10.5f}")
    lines.append(f"{'top-1 agreement':<24}{'':>10}{figures['top1_agreement']:>10.4f}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlx_step35.quality",
        description="Compare a converted checkpoint with its source, layer by layer from disk.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--source", required=True, help="the original checkpoint: a directory or hub repo id")
    add("--model", required=True, help="the converted one; its tokenizer is used")
    add("--text", type=Path, help="UTF-8 text; a bundled one by default")
    add("--chunk", type=int, default=1024, help="tokens that are read in one sequence")
    add("--json", action="store_true", help="print one JSON object")
    add("--card", action="store_true", help="also put the figures into the model's README.md")
    return parser


if __name__ == "__main__":
    main()
