"""Thousands of mixed requests from 32 clients, a third of which misbehave: does the server stay up, and flat?

    python -m benchmarks.server_soak [--requests 4000] [--clients 32] [--model nano]

Clients ask in three dialects, streamed and not, and go on with what they were answered; some leave in
mid-answer or mid-prompt, send half a body, no JSON, or too much. The engine below the server is scripted, so
that what is measured is the server; with --model it is a real one. What the server keeps on purpose, saved
prompts and remembered answers, has small limits, so that it is full early and what still grows is a leak.

Prints resident memory after each twentieth of the requests. The last line is JSON; exit code 1 if memory
grows by more than MAX_SLOPE bytes a request over the second half, a request leaked, or an answer was 5xx
other than overload.
"""

import argparse
import concurrent.futures
import itertools
import json
import random
import re
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from typing import Any

import httpx

PORT = 8092
KEY = "sk-test"
BASE = f"http://127.0.0.1:{PORT}"
MAX_BODY_BYTES = 1_000_000
MODEL = "step-3.5-flash"
TOOL = {"name": "get_weather", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}
FUNCTION = {"name": TOOL["name"], "parameters": TOOL["input_schema"]}
PARTS = 20
# Bytes a request: a request that is never let go takes five times as much with its prompt and answer, and
# the steps in which an allocator takes memory come to some hundred over a few thousand requests.
MAX_SLOPE = 2000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", help="a real model in place of the script, such as nano")
    parser.add_argument("--max-tokens", type=int, default=16, help="with --model: of an answer (%(default)s)")
    options = parser.parse_args()
    if options.requests < PARTS:
        parser.error(f"--requests must be at least {PARTS}")
    server = subprocess.Popen(
        [sys.executable, "-m", *server_command(options.model, options.max_tokens)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    log = concurrent.futures.ThreadPoolExecutor(1).submit(server.stderr.read if server.stderr else str)
    try:
        wait_until_ready()
        max_tokens = options.max_tokens if options.model else 500
        report = soak(options.requests, options.clients, options.seed, max_tokens, server.pid)
    finally:
        server.terminate()
        report_code = server.wait(30)
    report["exit_code"] = report_code
    report["tracebacks"] = log.result().count("Traceback") - log.result().count("the script says so") // 2
    is_sound = (
        report["open_requests"] == 0
        and report["exit_code"] == 0
        and not report["tracebacks"]
        and not report["unexpected"]
        and report["flat"]
    )
    print(json.dumps(report))
    return 0 if is_sound else 1


def server_command(model: str | None, max_tokens: int) -> list[str]:
    """The module and its flags; prompts and answers that are kept have room for some dozen."""
    shared = ["--port", str(PORT)]
    if model is None:
        return [
            "tests.server.scripted_server", *shared, "--key", KEY, "--ctx", "16384",
            "--max-body", str(MAX_BODY_BYTES), "--queue", "64",
            "--prompt-cache-bytes", "2000000", "--turn-memory-bytes", "200000",
        ]  # fmt: skip
    return [
        "mlx_step35.server", *shared, "--model", model, "--api-key", KEY, "--max-context", "4096",
        "--max-tokens", str(max_tokens), "--max-body-bytes", str(MAX_BODY_BYTES), "--max-queue", "64",
        "--prompt-cache-bytes", "20MB",
    ]  # fmt: skip


def wait_until_ready() -> None:
    for _ in range(600):
        try:
            if httpx.get(BASE + "/health", verify=False).status_code == 200:
                return
        except httpx.ConnectError:
            pass
        time.sleep(0.2)
    raise SystemExit("the server did not start")


def soak(num_requests: int, num_clients: int, seed: int, max_tokens: int, pid: int) -> dict[str, Any]:
    """Send everything; returns what happened."""
    outcomes: Counter[str] = Counter()
    samples: list[tuple[int, int]] = []
    started_s = time.monotonic()
    marks = [num_requests * part // PARTS for part in range(PARTS + 1)]
    for first, last in itertools.pairwise(marks):
        with concurrent.futures.ThreadPoolExecutor(num_clients) as pool:
            numbers = range(seed + first, seed + last)
            outcomes.update(pool.map(lambda number: one_request(number, max_tokens), numbers))
        samples.append((last, resident_bytes(pid)))
        print(f"{last:7d} requests {samples[-1][1] / 1e6:8.1f} MB", flush=True)
    time.sleep(3)
    health = httpx.get(BASE + "/health", verify=False).json()
    unexpected = {name: count for name, count in outcomes.items() if re.search(r"\b5\d\d$", name)}
    expected = [name for name in unexpected if name.endswith((" 503", " 529")) or name.startswith("fail")]
    for name in expected:
        del unexpected[name]
    counts, sizes = zip(*samples[PARTS // 2 - 1 :], strict=True)
    slope = statistics.linear_regression(counts, sizes).slope
    return {
        "requests": num_requests,
        "clients": num_clients,
        "seconds": round(time.monotonic() - started_s, 1),
        "outcomes": dict(sorted(outcomes.items())),
        "unexpected": unexpected,
        "open_requests": health["open_requests"],
        "resident_mb": [round(size / 1e6, 1) for _, size in samples],
        "bytes_per_request": round(slope),
        "max_bytes_per_request": MAX_SLOPE,
        "flat": slope <= MAX_SLOPE,
    }


def one_request(seed: int, max_tokens: int) -> str:
    """One request of a random kind; says which and what came of it."""
    rng = random.Random(seed)
    text = rng.choice(["hi", "[say some words]", "[long 200]", '[tool get_weather {"city": "Paris"}]'])
    kind = rng.choices(
        ["whole", "stream", "turns", "leave", "leave_early", "half_body", "malformed", "too_large", "count",
         "fail"],
        [25, 25, 5, 12, 8, 5, 8, 2, 8, 2],
    )[0]  # fmt: skip
    text = "[fail]" if kind == "fail" else "[slow 5]" if kind == "leave_early" else text
    # Half of the questions are asked for the first time.
    path, body = request_of(rng, f"{rng.choice((seed, rng.randrange(50)))} {text}", max_tokens)
    headers = {"authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=BASE, headers=headers, timeout=300, verify=False) as client:
        if kind in ("leave", "leave_early"):
            return f"{kind} {leave(client, path, body)}"
        if kind == "turns":
            return f"{kind} {turns(client, seed, max_tokens)}"
        if kind == "half_body":
            send_half(path)
            return kind
        if kind == "malformed":
            content = rng.choice([b"{", b"[]", b"\xff", b"[" * 5000, b'{"model": 5}', b""])
            return f"{kind} {client.post(path, content=content).status_code}"
        if kind == "too_large":
            return f"{kind} {client.post(path, content=b'x' * (MAX_BODY_BYTES + 1)).status_code}"
        if kind == "count":
            count_body = {"model": MODEL, "messages": [{"role": "user", "content": text}]}
            return f"{kind} {client.post('/v1/messages/count_tokens', json=count_body).status_code}"
        answer = client.post(path, json={**body, "stream": kind == "stream"})
        return f"{kind} {answer.status_code}"


def request_of(rng: random.Random, text: str, max_tokens: int) -> tuple[str, dict[str, Any]]:
    messages = [{"role": "user", "content": text}]
    kind = rng.randrange(3)
    if kind == 0:
        return "/v1/chat/completions", {
            "model": MODEL, "messages": messages, "tools": [{"type": "function", "function": FUNCTION}]
        }  # fmt: skip
    if kind == 1:
        return "/v1/messages", {
            "model": MODEL,
            "messages": messages,
            "max_tokens": max_tokens,
            "tools": [TOOL],
        }
    return "/v1/responses", {"model": MODEL, "input": text}


def turns(client: httpx.Client, seed: int, max_tokens: int) -> int:
    """A call, its result and the answer: the server finds its own turn in the second request."""
    question = f'{seed} [tool get_weather {{"city": "Paris"}}]'
    messages: list[dict[str, Any]] = [{"role": "user", "content": question}]
    body = {"model": MODEL, "tools": [{"type": "function", "function": FUNCTION}], "max_tokens": max_tokens}
    for _ in range(2):
        answer = client.post("/v1/chat/completions", json={**body, "messages": messages})
        if answer.status_code != 200:
            break
        message = answer.json()["choices"][0]["message"]
        messages.append(message)
        ids = [call["id"] for call in message.get("tool_calls") or ()]
        messages += [{"role": "tool", "tool_call_id": name, "content": "It rains."} for name in ids]
    return answer.status_code


def leave(client: httpx.Client, path: str, body: dict[str, Any]) -> str:
    with client.stream("POST", path, json={**body, "stream": True}) as answer:
        for number, _ in enumerate(answer.iter_lines()):
            if number == 3:
                break
        return str(answer.status_code)


def send_half(path: str) -> None:
    lines = (
        f"POST {path} HTTP/1.1",
        "Host: 127.0.0.1",
        f"Authorization: Bearer {KEY}",
        "Content-Length: 999",
    )
    head = "".join(line + "\r\n" for line in (*lines, ""))
    with socket.create_connection(("127.0.0.1", PORT)) as client:
        client.sendall(head.encode() + b'{"model"')


def resident_bytes(pid: int) -> int:
    """Resident memory of a process."""
    output = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=True)
    return int(output.stdout) * 1024


if __name__ == "__main__":
    sys.exit(main())
