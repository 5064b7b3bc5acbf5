"""Which experts should get one more bit first? Divergence of the bundled model under several orders.

    python benchmarks/recipe_order.py --dir DIR

Each order gets the same bytes: a third of the expert weights at 3 bits, the rest at 2, all else at 6.
"""

import argparse
import contextlib
import io
import json
import re
import shutil
from pathlib import Path

from mlx_step35 import costs
from mlx_step35.chat.tokenizer import Tokenizer
from mlx_step35.checkpoint import resolve_model
from mlx_step35.config import ModelConfig
from mlx_step35.convert import convert
from mlx_step35.layout import Recipe, backbone_weights
from mlx_step35.quality import chunks_of, measure, read_text
from mlx_step35.quantization import Quantization
from mlx_step35.recipes import Order, fit_recipe, outer_layers


def orders(config: ModelConfig) -> dict[str, Order]:
    return {
        "first layers first": lambda weight: (weight.layer or 0, not weight.path.endswith("down_proj")),
        "first and last layers first": outer_layers(config),
        "last layers first": lambda weight: (-(weight.layer or 0),),
        "down projections first": lambda weight: (not weight.path.endswith("down_proj"), weight.layer or 0),
        "gate and up projections first": lambda weight: (
            weight.path.endswith("down_proj"),
            weight.layer or 0,
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, required=True, help="scratch directory, emptied first")
    parser.add_argument("--tokens", type=int, default=400)
    given = parser.parse_args()
    shutil.rmtree(given.dir, ignore_errors=True)
    source = resolve_model("nano")
    config = ModelConfig.from_hf(json.loads((source / "config.json").read_text()))
    tokenizer = Tokenizer.from_directory(source)
    tokens = tokenizer.encode_text(read_text(None))[: given.tokens]
    chunks = chunks_of(tokens, tokenizer.bos_token_id, 201)
    budget = third(config)
    for number, (name, order) in enumerate(orders(config).items()):
        path = given.dir / str(number)
        recipe = fit_recipe(config, budget, order=order)
        with contextlib.redirect_stdout(io.StringIO()):
            convert(str(source), path, True, q_bits=2, mtp="drop", q_overrides=overrides(recipe))
        print(f"{name}: KL {measure(source, path, chunks).kl_divergence:.4f}")


def third(config: ModelConfig) -> int:
    """The bytes of a recipe with a third of the expert weights one rung above the lowest."""
    # An unlimited budget ends at 6 bits for experts; only the choice for everything else is taken from it.
    rest = fit_recipe(config, 100 * 10**9).choices
    sizes = []
    for bits in (2, 3):
        experts = {w.path: Quantization(bits, 64) for w in backbone_weights(config) if w.kind == "experts"}
        sizes.append(costs.weight_bytes(config, Recipe("", {**rest, **experts})))
    return sizes[0] + (sizes[1] - sizes[0]) // 3


def overrides(recipe: Recipe) -> list[str]:
    """A recipe as the command line spells it; the router stays unquantised."""
    packed = [
        f"^{re.escape(path)}$={choice.bits}:{choice.group_size}" for path, choice in recipe.choices.items()
    ]
    return [r"mlp\.gate\.gate$=16", *packed]


if __name__ == "__main__":
    main()
