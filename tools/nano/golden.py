"""Golden vectors for the bundled model: the backbone by transformers, the MTP layers by the PyTorch model.

Both read the exported bf16 shards and compute in float32. The two backbones are also compared with each
other, so that neither can be wrong alone.

    python -m tools.nano.golden
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig
from transformers.models.step3p7.modeling_step3p7 import Step3p7TextModel

from tools.nano.data import NANO, dialogues, source
from tools.nano.model import Nano, NanoConfig

GOLDEN = Path(__file__).parents[2] / "tests" / "golden"
NUM_TOKENS = 300  # the window of 64 wraps four times
BACKBONE_ROWS = [0, 1, 31, 62, 63, 64, 65, 127, 128, 129, 191, 192, 255, 256, 298, 299]
MTP_ROWS = [0, 1, 62, 63, 64, 129, 255, 296]


def checkpoint(directory: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for shard in sorted(directory.glob("model-*.safetensors")):
        tensors.update(load_file(shard))
    return {name: value.float() for name, value in tensors.items()}


def transformers_backbone(tensors: dict[str, Tensor], config: dict[str, object]) -> Step3p7TextModel:
    """transformers' text model with the tensors renamed and gate and up joined, as it wants them."""
    num_layers = config["num_hidden_layers"]
    model = Step3p7TextModel._from_config(
        Step3p7TextConfig(**config), attn_implementation="eager", dtype=torch.float32
    ).eval()
    state: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name == "lm_head.weight":
            continue
        name = name.removeprefix("model.")
        if name.startswith("layers.") and int(name.split(".")[1]) >= num_layers:
            continue
        if ".moe.gate_proj." in name:
            up = tensors["model." + name.replace("gate_proj", "up_proj")]
            state[name.replace("moe.gate_proj.weight", "mlp.experts.gate_up_proj")] = torch.cat(
                [value, up], 1
            )
        elif ".moe.up_proj." not in name:
            for old, new in (
                ("moe.down_proj.weight", "mlp.experts.down_proj"),
                ("moe.router_bias", "mlp.gate.e_score_correction_bias"),
                ("moe.gate.", "mlp.gate."),
                ("share_expert.", "mlp.shared_experts."),
            ):
                name = name.replace(old, new)
            state[name] = value
    model.load_state_dict(state)
    return model


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=NANO)
    parser.add_argument("--out", type=Path, default=GOLDEN)
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    text = next(dialogues("heldout", 11)) + next(source("heldout", 11))
    ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False).ids[:NUM_TOKENS]])
    assert ids.shape[1] == NUM_TOKENS

    tensors = checkpoint(args.model)
    config = json.loads((args.model / "config.json").read_text())
    theirs = transformers_backbone(tensors, config)(input_ids=ids, use_cache=False).last_hidden_state
    expected = theirs @ tensors["lm_head.weight"].T

    nano = Nano(NanoConfig())
    nano.load_state_dict(tensors)
    hidden = nano.backbone(ids)
    difference = (nano.logits(hidden) - expected).abs().max().item()
    print(f"largest logit difference between the two backbones: {difference:.2e}")
    if difference > 1e-3:
        raise SystemExit("the reference model and transformers disagree; no vectors written")

    args.out.mkdir(parents=True, exist_ok=True)
    rows = np.array(BACKBONE_ROWS)
    np.savez_compressed(
        args.out / "backbone.npz", ids=ids[0].numpy(), rows=rows, logits=expected[0, rows].numpy()
    )
    rows = np.array(MTP_ROWS)
    arrays = {"ids": ids[0].numpy(), "rows": rows}
    for k, h in enumerate(nano.chain(ids, hidden)):
        arrays[f"hidden_{k}"] = h[0, rows].numpy()
        arrays[f"logits_{k}"] = nano.mtp_logits(k, h)[0, rows].numpy()
    np.savez_compressed(args.out / "mtp.npz", **arrays)
    (args.out / "README.md").write_text(
        README.format(transformers=transformers.__version__, torch=torch.__version__)
    )


README = """# Golden vectors

Made by `make golden` from the bundled checkpoint in float32; never edited by hand. Both files hold the `ids`
of one held-out text of 300 tokens and the `rows` at which values are kept.

- `backbone.npz`: `logits` (rows, vocabulary) by `Step3p7TextModel` of transformers {transformers}, torch
  {torch}.
- `mtp.npz`, by `tools/nano/model.py`, torch {torch}: for depth k `hidden_k` (rows, 128), before the head's
  norm, and `logits_k`. Row i was computed from the true tokens up to i+1+k and predicts token i+2+k.

Before writing, the script checks that the two backbones agree within 1e-3.
"""


if __name__ == "__main__":
    main()
