"""What storing norms in bfloat16 costs, on the bundled model: divergence from the source, and mlx-lm's speed.

    python benchmarks/norms.py --dir DIR

The original release stores w; converted checkpoints store 1 + w. In bfloat16 that rounds, in float32 it makes
stock mlx-lm compute everything behind the first norm in float32.
"""

import argparse
import shutil
import time
from pathlib import Path

import mlx.core as mx
from mlx_lm.utils import load_model

from mlx_step35.chat.tokenizer import Tokenizer
from mlx_step35.checkpoint import resolve_model
from mlx_step35.convert import convert
from mlx_step35.quality import chunks_of, measure, read_text

CHOICES = {
    "unquantised": {},
    "8 bits": {"quantize": True, "q_bits": 8, "mtp_bits": 8},
    "4 bits": {"quantize": True, "q_bits": 4},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, required=True, help="scratch directory, emptied first")
    parser.add_argument("--tokens", type=int, default=600)
    given = parser.parse_args()
    shutil.rmtree(given.dir, ignore_errors=True)
    source = resolve_model("nano")
    tokenizer = Tokenizer.from_directory(source)
    tokens = tokenizer.encode_text(read_text(None))[: given.tokens]
    chunks = chunks_of(tokens, tokenizer.bos_token_id, 301)
    convert(str(source), given.dir / "exact", dtype="float32")
    for name, choice in CHOICES.items():
        plain = given.dir / name.replace(" ", "-")
        # Every choice is a set of keyword arguments; mypy sees one type for all their values.
        convert(str(source), plain, **choice)  # type: ignore[arg-type]
        exact = with_exact_norms(plain, given.dir / "exact")
        for norms, path in (("bfloat16", plain), ("float32", exact)):
            figures = measure(source, path, chunks)
            line = f"{name}, norms in {norms}: KL {figures.kl_divergence:.2e}"
            # On a CPU, MLX has no bfloat16 products of unquantised experts.
            if choice:
                line += f", mlx-lm 64 tokens in {forward_seconds(path, tokens[:64]):.2f} s"
            print(line)


def with_exact_norms(path: Path, exact: Path) -> Path:
    """A copy of a checkpoint with float32 norms."""
    target = path.with_name(f"{path.name}-exact-norms")
    shutil.copytree(path, target)
    for file in ("model.safetensors", "mtp.safetensors"):
        arrays, metadata = mx.load(str(path / file), return_metadata=True)
        norms = mx.load(str(exact / file))
        arrays |= {name: norms[name] for name in arrays if name.endswith("norm.weight")}
        mx.save_safetensors(str(target / file), arrays, metadata)
    return target


def forward_seconds(path: Path, tokens: list[int]) -> float:
    """Stock mlx-lm's time for one forward pass, the second of two."""
    model, _ = load_model(path)
    seconds = 0.0
    for _ in range(2):
        began = time.perf_counter()
        mx.eval(model(mx.array([tokens])))
        seconds = time.perf_counter() - began
    return seconds


if __name__ == "__main__":
    main()
