"""What reuse costs beside running a prompt again: saving, restoring from memory, loading from disk.

    python benchmarks/prompt_cache.py --model nano --lengths 512 2048 8192 --json

Per prompt length: seconds to run it, to take a snapshot at its end, to bring an empty cache to that snapshot
from memory (which joins the blocks of the full-attention layers), and to read, verify and restore it from
disk as after a restart; and what snapshot and blocks take. The file system's cache is warm.
"""

import argparse
import json
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_step35.checkpoint import load_checkpoint, resolve_model
from mlx_step35.decoding import DecodeOptions, decode, prepare
from mlx_step35.engine.session import Session
from mlx_step35.model import Model
from mlx_step35.prompt_cache.disk import DiskTier
from mlx_step35.prompt_cache.files import fingerprint
from mlx_step35.prompt_cache.index import as_tokens
from mlx_step35.prompt_cache.records import take
from mlx_step35.prompt_cache.store import PromptCacheStore
from mlx_step35.sampling import SamplingParams

NO_LIMIT = 1 << 62


def main() -> int:
    parser = argparse.ArgumentParser(description="Time the prompt cache beside recomputing.")
    parser.add_argument("--model", default="nano")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    args = parser.parse_args()
    path = resolve_model(args.model)
    model = load_checkpoint(path, args.dtype)
    prepare(model)
    identity = fingerprint(path, str(model.dtype))
    rows = [measure(model, identity, length, args.repeats) for length in args.lengths]
    heads = ("run_s", "take_s", "restore_s", "load_s")
    print(f"{'tokens':>7}" + "".join(f"{head:>10}" for head in heads) + "   own_KiB blocks_KiB")
    for row in rows:
        times = "".join(f"{row[head]:10.4f}" for head in heads)
        print(f"{row['tokens']:7}{times}{row['own_bytes'] >> 10:10}{row['block_bytes'] >> 10:11}")
    if args.json:
        machine = f"{platform.system()} {platform.machine()}, {mx.default_device()}"
        print(json.dumps({"machine": machine, "model": args.model, "dtype": args.dtype, "rows": rows}))
    return 0


def measure(model: Model, identity: str, length: int, repeats: int) -> dict[str, Any]:
    rng = random.Random(length)
    prompt = [rng.randrange(10, model.config.vocab_size // 2) for _ in range(length + 1)]
    run_s, take_s, restore_s, load_s = [], [], [], []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            disk = DiskTier(Path(folder), NO_LIMIT, identity)
            session = Session(model, PromptCacheStore(NO_LIMIT), disk)
            run_s.append(timed(partial(run, session, model, prompt)))
            tokens = as_tokens(prompt[:length])
            (snapshot,) = [one for one in session.store.on_path(tokens) if one.position == length]
            session.sync(prompt)
            take_s.append(timed(partial(take, session.cache, tokens, snapshot.blocks)))
            # Another prompt takes the live cache's place, so that the rows have to come back.
            session.sync([1, 2, 3])
            restore_s.append(timed(partial(session.sync, prompt)))
            assert session.cache.offset == length
            block_bytes = sum(block.size for block in snapshot.blocks)
            session.close()
            disk = DiskTier(Path(folder), NO_LIMIT, identity)
            session = Session(model, PromptCacheStore(NO_LIMIT), disk)
            load_s.append(timed(partial(session.sync, prompt)))
            assert session.cache.offset == length
            session.close()
    return {
        "tokens": length,
        "run_s": statistics.median(run_s),
        "take_s": statistics.median(take_s),
        "restore_s": statistics.median(restore_s),
        "load_s": statistics.median(load_s),
        "own_bytes": snapshot.nbytes,
        "block_bytes": block_bytes,
    }


def run(session: Session, model: Model, prompt: list[int]) -> None:
    session.sync(prompt)
    options = DecodeOptions(1, prefill_boundaries=session.stops())
    for _ in decode(
        model,
        prompt,
        session.cache,
        SamplingParams(),
        options,
        on_prefill=lambda done, total: session.reached(),
    ):
        pass
    session.finish()


def timed(work: Callable[[], Any]) -> float:
    start_s = time.perf_counter()
    work()
    return time.perf_counter() - start_s


if __name__ == "__main__":
    sys.exit(main())
