"""Time to first token and tokens per second under 1 and 8 clients, and what the server adds to a token.

    python -m benchmarks.server --model nano [--without-mlx-lm] [--json]

Every server runs on the same float32 copy of the model, greedily, with the same prompts. `overhead` compares
the time between a stream's first and last token with that of the decode loop alone, without drafts, in turns.
"""

import argparse
import concurrent.futures
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.agent_trace import Server, float32_copy, machine, mlx_lm, ours, started
from mlx_step35.chat.template import ChatTemplate
from mlx_step35.chat.tokenizer import Tokenizer
from mlx_step35.checkpoint import load_checkpoint
from mlx_step35.decoding import DecodeOptions, decode, prepare
from mlx_step35.sampling import SamplingParams

MAX_TOKENS = 64
NUM_REQUESTS = 8
NUM_ROUNDS = 9
PLAIN = ("--mtp", "off", "--no-lookup")


@dataclass(frozen=True, slots=True)
class Stream:
    """One answer as a client saw it."""

    first_token_s: float
    decode_s: float
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Load:
    """A server under a number of clients."""

    server: str
    clients: int
    first_token_s: float
    tokens_per_s: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--overhead", action="store_true", help="measure the overhead only")
    parser.add_argument("--without-mlx-lm", action="store_true", help="measure this server only")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = float32_copy(options.model, Path(folder))
        loads: list[Load] = []
        if not options.overhead:
            loads += measure("mlx_step35", ours(path, "--temp", "0"))
            loads += measure("mlx_step35 plain", ours(path, "--temp", "0", *PLAIN))
        if not (options.without_mlx_lm or options.overhead):
            loads += measure("mlx_lm", mlx_lm(path))
        overhead = measure_overhead(path)
    for load in loads:
        print(
            f"{load.server:18} {load.clients} clients  first token {load.first_token_s:7.3f} s  "
            f"{load.tokens_per_s:7.1f} tokens/s"
        )
    print(
        f"{overhead['bare_ms']:.2f} ms a token alone, {overhead['server_ms']:.2f} ms through the server: "
        f"{overhead['overhead']:+.1%}"
    )
    if options.json:
        print(json.dumps({"machine": machine(), "loads": [asdict(load) for load in loads], **overhead}))
    return 0


def prompt(number: int) -> list[dict[str, str]]:
    words = " ".join(f"item {number * 31 + place}" for place in range(40))
    return [{"role": "user", "content": f"Here is a list: {words}. Tell me a long story about it."}]


def measure(name: str, server: Server) -> list[Load]:
    """A server under 1 and 8 clients; the first request is not counted."""
    with started(server) as base:
        ask(base, server.model, 10_000)
        loads = []
        for clients in (1, 8):
            started_s = time.perf_counter()
            with concurrent.futures.ThreadPoolExecutor(clients) as pool:
                numbers = range(clients * 100, clients * 100 + NUM_REQUESTS)
                streams = list(pool.map(lambda number: ask(base, server.model, number), numbers))
            seconds = time.perf_counter() - started_s
            first_s = statistics.median(stream.first_token_s for stream in streams)
            num_tokens = sum(stream.num_tokens for stream in streams)
            loads.append(Load(name, clients, round(first_s, 4), round(num_tokens / seconds, 2)))
    return loads


def ask(base: str, model: str, number: int) -> Stream:
    """Stream one answer."""
    body: dict[str, Any] = {"model": model, "messages": prompt(number), "max_tokens": MAX_TOKENS}
    body |= {"temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    times: list[float] = []
    num_tokens = 0
    started_s = time.perf_counter()
    with (
        httpx.Client(timeout=600, verify=False) as client,
        client.stream("POST", base + "/v1/chat/completions", json=body) as answer,
    ):
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            deltas = [choice.get("delta", {}) for choice in chunk["choices"]]
            if any(delta.get(name) for delta in deltas for name in ("content", "reasoning")):
                times.append(time.perf_counter())
            if chunk.get("usage"):
                num_tokens = chunk["usage"]["completion_tokens"]
    return Stream(times[0] - started_s, times[-1] - times[0], num_tokens)


def measure_overhead(path: Path) -> dict[str, float]:
    """Milliseconds a token of the decode loop alone and through the server, in turns on the same prompts."""
    tokenizer, template = Tokenizer.from_directory(path), ChatTemplate.from_directory(path)
    model = load_checkpoint(path, "float32")
    prepare(model)
    eos = set(tokenizer.eos_token_ids)
    bare: list[float] = []
    served: list[float] = []

    def alone(number: int) -> float:
        ids = tokenizer.encode_rendered(template.render(prompt(number)))
        options = DecodeOptions(MAX_TOKENS, mtp="off", lookup=False)
        times = []
        for decoded in decode(model, ids, model.make_cache(), SamplingParams(), options):
            times.append(time.perf_counter())
            if decoded.token in eos:
                break
        return (times[-1] - times[0]) / (len(times) - 1)

    server = ours(path, "--temp", "0", *PLAIN)
    with started(server) as base:
        for number in range(NUM_ROUNDS + 1):
            before_s = alone(number)
            stream = ask(base, server.model, number)
            after_s = alone(number)
            if number:
                bare.append((before_s + after_s) / 2)
                served.append(stream.decode_s / (stream.num_tokens - 1))
    # Each round is compared with its neighbours in time, because other programs disturb all of them.
    ratios = [one / other for one, other in zip(served, bare, strict=True)]
    return {
        "bare_ms": round(statistics.median(bare) * 1000, 3),
        "server_ms": round(statistics.median(served) * 1000, 3),
        "overhead": round(statistics.median(ratios) - 1, 4),
    }


if __name__ == "__main__":
    sys.exit(main())
