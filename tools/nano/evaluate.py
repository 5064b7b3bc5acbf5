"""Held-out loss of a trained state, and how often each MTP depth names the backbone's own next token.

python -m tools.nano.evaluate --state build/nano/state.pt
"""

import argparse
from pathlib import Path

import torch

from tools.nano import data
from tools.nano.model import Nano, NanoConfig, losses
from tools.nano.train import BATCH, batches, packed

NUM_BATCHES = 12


@torch.no_grad()
def agreement(model: Nano, ids: torch.Tensor) -> list[float]:
    """Share of rows whose depth-k draft, from true tokens, is the backbone's argmax for the same place."""
    hidden = model.backbone(ids)
    target = model.logits(hidden).argmax(-1)
    # Row i of depth k predicts token i+2+k, which the backbone predicts from row i+1+k.
    return [
        (model.mtp_logits(k, h).argmax(-1) == target[:, 1 + k :]).float().mean().item()
        for k, h in enumerate(model.chain(ids, hidden))
    ]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", type=Path, default=Path("build/nano/state.pt"))
    args = parser.parse_args()
    model = Nano(NanoConfig())
    state = torch.load(args.state)
    model.load_state_dict(state["model"])
    print(f"step {state['step']}")
    print("| held-out | nats/token | MTP 1 | MTP 2 | MTP 3 | agreement 1 | 2 | 3 |")
    print("|---|---|---|---|---|---|---|---|")
    for domain in ("dialogue", "source"):
        stream = batches(packed(data.tokenized("heldout", 2, domain)), BATCH)
        parts = [next(stream) for _ in range(NUM_BATCHES)]
        nats = torch.tensor([[x.item() for x in losses(model, *batch)] for batch in parts]).mean(0)
        same = torch.tensor([agreement(model, ids) for ids, _ in parts]).mean(0)
        print(f"| {domain} | " + " | ".join(f"{x:.3f}" for x in [*nats.tolist(), *same.tolist()]) + " |")


if __name__ == "__main__":
    main()
