"""Train step35-nano: backbone loss plus the losses of the three chained MTP layers.

Warm-up, constant rate, then linear decay to zero over the last part (WSD), so a run can be prolonged from
any checkpoint of the constant part. Resumable: the state is written every few minutes.

    python -m tools.nano.train --out DIR --tokens 15000000
"""

import argparse
import csv
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from tools.nano import data
from tools.nano.guide import guide_losses, repeated_rows, watch, without_space
from tools.nano.model import Nano, NanoConfig, losses
from tools.nano.muon import Muon

LENGTH, BATCH = 512, 8
REPEATED = 1  # rows of each batch that only exercise copying
VOCAB_SIZE = NanoConfig().vocab_size
PAD, IM_START, IM_END = 2, 3, 4
ASSISTANT = Tokenizer.from_file(str(data.NANO / "tokenizer.json")).token_to_id("assistant")
PROMPT_WEIGHT = 0.1
MTP_WEIGHT = 0.4
GUIDE_WEIGHT = 0.05  # for each guided layer, on text and on repeated rows
MUON_LR, ADAM_LR = 0.01, 2e-3
WARMUP_STEPS = 50
BALANCE_RATE = 2e-3
CHECKPOINT_SECONDS = 300
EVALUATE_STEPS = 100


def token_weights(ids: list[int]) -> list[float]:
    """1 for what the model has to say itself; little for a prompt, most of which nobody could predict."""
    if IM_START not in ids:
        return [1.0] * len(ids)
    weights, is_answer = [], False
    for position, token in enumerate(ids):
        weights.append(1.0 if is_answer else PROMPT_WEIGHT)
        if token == IM_START:
            is_answer = ids[position + 1 : position + 2] == [ASSISTANT]
        elif token == IM_END:
            is_answer = False
    return weights


def packed(documents: Iterator[list[int]]) -> Iterator[tuple[list[int], list[float]]]:
    """Rows of LENGTH ids. A document that does not fit the row goes to the next one; long ones are cut up."""
    row: list[int] = []
    weights: list[float] = []
    for ids in documents:
        if len(row) > LENGTH * 0.6 and len(row) + min(len(ids), LENGTH) > LENGTH:
            padding = LENGTH - len(row)
            yield row + [PAD] * padding, weights + [0.0] * padding
            row, weights = [], []
        row, weights = row + ids, weights + token_weights(ids)
        while len(row) >= LENGTH:
            yield row[:LENGTH], weights[:LENGTH]
            keeps = len(ids) > LENGTH
            row, weights = (row[LENGTH:], weights[LENGTH:]) if keeps else ([], [])


def batches(rows: Iterator[tuple[list[int], list[float]]], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        chunk = [next(rows) for _ in range(size)]
        yield torch.tensor([ids for ids, _ in chunk]), torch.tensor([weights for _, weights in chunk])


def rate(step: int, total: int, decay: float) -> float:
    """Multiplier of the learning rates."""
    start = total * (1 - decay)
    return min(1.0, (step + 1) / WARMUP_STEPS) * min(1.0, (total - step) / max(1.0, total - start))


@torch.no_grad()
def balance(model: Nano) -> None:
    """Nudge each expert's selection bias against its load."""
    for layer in model.model["layers"]:
        if layer.is_moe:
            load = layer.moe.counts.float()
            layer.moe.router_bias += BALANCE_RATE * torch.sign(load.mean() - load)


@torch.no_grad()
def evaluate(model: Nano, heldout: dict[str, list[tuple[Tensor, Tensor]]]) -> dict[str, list[float]]:
    return {
        domain: torch.tensor([[x.item() for x in losses(model, *batch)] for batch in parts]).mean(0).tolist()
        for domain, parts in heldout.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/nano"), help="where state and log go")
    parser.add_argument("--tokens", type=int, default=15_000_000, help="training tokens in all")
    parser.add_argument("--decay", type=float, default=0.2, help="last part of the run, with falling rate")
    parser.add_argument("--source-share", type=float, default=data.SOURCE_SHARE, help="of tokens")
    parser.add_argument("--drill-share", type=float, default=data.DRILL_SHARE, help="of dialogues")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)

    model = Nano(NanoConfig())
    watch(model)
    plain = without_space()
    elsewhere = ("embed", "lm_head", "shared_head", "moe.gate.", "g_proj")
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    matrices = [p for n, p in named if p.ndim >= 2 and not any(part in n for part in elsewhere)]
    rest = [p for n, p in named if p.ndim < 2 or any(part in n for part in elsewhere)]
    optimizers = [
        Muon(matrices, lr=MUON_LR),
        torch.optim.AdamW(rest, lr=ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    base_rates = [MUON_LR, ADAM_LR]

    state_path, step, seed = args.out / "state.pt", 0, args.seed
    if state_path.exists():
        state = torch.load(state_path)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, seed = state["step"], args.seed + state["step"]  # fresh data after a restart
        print(f"resumed at step {step}")
    total = args.tokens // (LENGTH * BATCH)
    stream = batches(
        packed(data.tokenized("train", seed, source_share=args.source_share, drill_share=args.drill_share)),
        BATCH - REPEATED,
    )
    heldout = {
        domain: [next(part) for _ in range(4)]
        for domain in ("dialogue", "source")
        for part in [batches(packed(data.tokenized("heldout", 1, domain)), BATCH)]
    }
    log_path = args.out / "log.csv"
    log_file = log_path.open("a")
    log = csv.writer(log_file)
    started = saved_at = time.time()
    done_here = 0
    while step < total:
        scale = rate(step, total, args.decay)
        for optimizer, lr in zip(optimizers, base_rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * scale
        # bf16 products are a fifth faster on a CPU that has them; weights and norms stay float32.
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ids, weights = (
                torch.cat(pair)
                for pair in zip(next(stream), repeated_rows(REPEATED, LENGTH, VOCAB_SIZE), strict=True)
            )
            parts = losses(model, ids, weights)
        guides = guide_losses(model, ids, plain, REPEATED)
        (parts[0] + MTP_WEIGHT * sum(parts[1:]) + GUIDE_WEIGHT * sum(guides)).backward()
        torch.nn.utils.clip_grad_norm_(rest, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        balance(model)
        step, done_here = step + 1, done_here + 1
        if step % 10 == 0:
            speed = done_here * LENGTH * BATCH / (time.time() - started)
            print(
                f"{time.strftime('%H:%M')} {step}/{total} "
                + " ".join(f"{x.item():.3f}" for x in parts)
                + " guides "
                + " ".join(f"{x.item():.2f}" for x in guides)
                + f" {speed:.0f} tok/s",
                flush=True,
            )
        if step % EVALUATE_STEPS == 0 or step == total:
            result = evaluate(model, heldout)
            for domain, values in result.items():
                log.writerow([step, step * LENGTH * BATCH, domain, *(f"{v:.4f}" for v in values)])
            log_file.flush()
            print(json.dumps({"step": step, **result}), flush=True)
        if time.time() - saved_at > CHECKPOINT_SECONDS or step == total:
            saved = {
                "model": model.state_dict(),
                "optimizers": [o.state_dict() for o in optimizers],
                "step": step,
            }
            torch.save(saved, state_path.with_suffix(".tmp"))
            state_path.with_suffix(".tmp").replace(state_path)
            saved_at = time.time()


if __name__ == "__main__":
    main()
