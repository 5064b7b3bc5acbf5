"""Peak memory against the planner's prediction, on a generated checkpoint of some gigabytes.

    python benchmarks/memory.py --dir DIR

One full-size layer of each kind with packed random weights is written, then loaded, prefilled and decoded in
a process of its own. MLX's peaks while loading and while running and the operating system's peak resident set
are printed beside what `mlx_step35.memory` predicts; the exit code is 1 if it is off by more than a tenth.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from mlx_step35.config import ModelConfig
from mlx_step35.layout import Recipe, Tensor, backbone_weights, mtp_weights, stored_tensors
from mlx_step35.quantization import Quantization
from mlx_step35.recipes import uniform_recipe, with_mtp

TOLERANCE = 0.1

RUN = """
import json, resource, sys
from pathlib import Path
import mlx.core as mx
from mlx_step35.checkpoint import load_checkpoint, read_config
from mlx_step35.checkpoint.inventory import inventory
from mlx_step35.decoding import DecodeOptions, decode, prepare
from mlx_step35.guard import device_backend
from mlx_step35.memory import Planner
from mlx_step35.sampling import SamplingParams
path, prompt, chunk, tokens = Path(sys.argv[1]), *map(int, sys.argv[2:])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
config = read_config(path)
planner = Planner.of_tensors(config, inventory(path, config), device_backend())
predicted = planner.footprint(prompt + tokens, chunk)
model = load_checkpoint(path)
prepare(model)
loaded = mx.get_peak_memory()
mx.reset_peak_memory()
options = DecodeOptions(tokens, "off", False, chunk)
ids = [(7919 * i) % config.vocab_size for i in range(prompt)]
for _ in decode(model, ids, model.make_cache(), SamplingParams(), options):
    pass
rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(json.dumps({"predicted_bytes": predicted.peak, "predicted_weights": predicted.weights + predicted.mtp,
    "loaded_bytes": loaded, "running_bytes": mx.get_peak_memory(),
    "peak_bytes": max(loaded, mx.get_peak_memory()), "resident_bytes": rss - before}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, required=True, help="scratch directory; 4 GB at 4 bits")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--chunk", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--keep", action="store_true")
    given = parser.parse_args()
    path = given.dir / "checkpoint"
    if not path.exists():
        generate(path, given.bits)
    numbers = [str(number) for number in (given.prompt, given.chunk, given.tokens)]
    output = subprocess.run(
        [sys.executable, "-c", RUN, str(path), *numbers], check=True, capture_output=True, text=True
    ).stdout
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    found["checkpoint_bytes"] = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    for name in ("peak_bytes", "resident_bytes"):
        found[name.replace("bytes", "error")] = round(found["predicted_bytes"] / found[name] - 1, 4)
    found["machine"] = f"{platform.platform()}, {os.cpu_count()} cores"
    if not given.keep:
        shutil.rmtree(path)
    print(json.dumps(found, indent=1))
    sys.exit(abs(found["peak_error"]) > TOLERANCE or abs(found["resident_error"]) > TOLERANCE)


def generate(path: Path, bits: int) -> None:
    """The release with its layers 2 (dense, sliding) and 4 (full, with experts) only, and one MTP layer."""
    raw = json.loads((files("mlx_step35") / "step-3.5-flash.json").read_text("utf-8"))
    chosen = [2, 4, 45]
    for key, value in raw.items():
        if isinstance(value, list) and len(value) == 48:
            raw[key] = [value[index] for index in chosen]
    raw |= {"num_hidden_layers": 2, "num_nextn_predict_layers": 1, "moe_layers_enum": "1"}
    config = ModelConfig.from_hf(raw)
    recipe = with_mtp(config, uniform_recipe(config, Quantization(bits, 64)), bits)
    path.mkdir(parents=True)
    write(path / "model.safetensors", backbone_weights(config), recipe)
    write(path / "mtp.safetensors", mtp_weights(config), replace(recipe, name="mtp"))
    block: dict[str, Any] = {"group_size": 64, "bits": bits, "mode": "affine"}
    for name, choice in recipe.choices.items():
        if choice.bits != bits:
            block[name] = {"group_size": choice.group_size, "bits": choice.bits, "mode": "affine"}
    (path / "config.json").write_text(json.dumps({**raw, "quantization": block}))


def write(file: Path, weights: list[Any], recipe: Recipe) -> None:
    """A safetensors file of random bits and constant scales, a tensor at a time."""
    tensors = [
        t for weight in weights for t in stored_tensors(weight, recipe.choice(weight.path), recipe.dtype)
    ]
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    end = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps(header).encode()
    random = np.random.default_rng(0).bytes(1 << 24)
    with file.open("wb") as output:
        output.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            for start in range(0, tensor.nbytes, len(random)):
                size = min(len(random), tensor.nbytes - start)
                output.write(random[:size] if tensor.dtype == "U32" else constant(tensor, size))


def constant(tensor: Tensor, size: int) -> bytes:
    """Small values that keep activations finite: 0.001 for scales, a little less than none for biases."""
    if tensor.dtype == "F32":
        return b"\0" * size
    value = b"\xc0\xba" if tensor.name.endswith("biases") else b"\x80\x3a"
    return (b"\x80\x3f" if "norm" in tensor.name else value) * (size // 2)


if __name__ == "__main__":
    main()
