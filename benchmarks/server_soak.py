"""A thousand mixed requests from 32 clients, a third of which misbehave: does the server stay up, and flat?

    python -m benchmarks.server_soak [--requests 1000] [--clients 32]

Clients ask in three dialects, streamed and not; some leave in mid-answer or mid-prompt, send half a body, no
JSON, or too much. The engine below the server is scripted, so that what is measured is the server. The last
line is JSON; exit code 1 if a request leaked, an answer was 5xx other than overload, or memory grew.
"""

import argparse
import concurrent.futures
import json
import random
import re
import socket
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
# Growth between a fifth and the end of the run; the prompt cache fills up during it.
MAX_GROWTH_MB = 64


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.server.scripted_server", "--port", str(PORT), "--key", KEY,
         "--ctx", "16384", "--max-body", str(MAX_BODY_BYTES), "--queue", "64",
         "--prompt-cache-bytes", "20000000"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    log = concurrent.futures.ThreadPoolExecutor(1).submit(server.stderr.read if server.stderr else str)
    try:
        wait_until_ready()
        report = soak(options.requests, options.clients, options.seed, server.pid)
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
        and report["growth_mb"] <= MAX_GROWTH_MB
    )
    print(json.dumps(report))
    return 0 if is_sound else 1


def wait_until_ready() -> None:
    for _ in range(600):
        try:
            if httpx.get(BASE + "/health", verify=False).status_code == 200:
                return
        except httpx.ConnectError:
            pass
        time.sleep(0.2)
    raise SystemExit("the server did not start")


def soak(num_requests: int, num_clients: int, seed: int, pid: int) -> dict[str, Any]:
    """Send everything; returns what happened."""
    outcomes: Counter[str] = Counter()
    memory_mb: list[float] = []
    started_s = time.monotonic()
    warm_up = num_requests // 5
    for first, last in ((0, warm_up), (warm_up, num_requests)):
        with concurrent.futures.ThreadPoolExecutor(num_clients) as pool:
            for outcome in pool.map(lambda number: one_request(seed + number), range(first, last)):
                outcomes[outcome] += 1
        memory_mb.append(resident_mb(pid))
    time.sleep(3)
    health = httpx.get(BASE + "/health", verify=False).json()
    unexpected = {name: count for name, count in outcomes.items() if re.search(r"\b5\d\d$", name)}
    expected = [name for name in unexpected if name.endswith((" 503", " 529")) or name.startswith("fail")]
    for name in expected:
        del unexpected[name]
    return {
        "requests": num_requests,
        "clients": num_clients,
        "seconds": round(time.monotonic() - started_s, 1),
        "outcomes": dict(sorted(outcomes.items())),
        "unexpected": unexpected,
        "open_requests": health["open_requests"],
        "resident_mb": [round(one, 1) for one in memory_mb],
        "growth_mb": round(memory_mb[-1] - memory_mb[0], 1),
    }


def one_request(seed: int) -> str:
    """One request of a random kind; says which and what came of it."""
    rng = random.Random(seed)
    text = rng.choice(["hi", "[say some words]", "[long 200]", '[tool get_weather {"city": "Paris"}]'])
    kind = rng.choices(
        ["whole", "stream", "leave", "leave_early", "half_body", "malformed", "too_large", "count", "fail"],
        [30, 25, 12, 8, 5, 8, 2, 8, 2],
    )[0]
    text = "[fail]" if kind == "fail" else "[slow 5]" if kind == "leave_early" else text
    path, body = request_of(rng, f"{rng.randrange(50)} {text}")
    headers = {"authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=BASE, headers=headers, timeout=120, verify=False) as client:
        if kind in ("leave", "leave_early"):
            return f"{kind} {leave(client, path, body)}"
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


def request_of(rng: random.Random, text: str) -> tuple[str, dict[str, Any]]:
    messages = [{"role": "user", "content": text}]
    kind = rng.randrange(3)
    if kind == 0:
        function = {"name": TOOL["name"], "parameters": TOOL["input_schema"]}
        return "/v1/chat/completions", {
            "model": MODEL, "messages": messages, "tools": [{"type": "function", "function": function}]
        }  # fmt: skip
    if kind == 1:
        return "/v1/messages", {"model": MODEL, "messages": messages, "max_tokens": 500, "tools": [TOOL]}
    return "/v1/responses", {"model": MODEL, "input": text}


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


def resident_mb(pid: int) -> float:
    """Resident memory of a process."""
    output = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=True)
    return int(output.stdout) / 1024


if __name__ == "__main__":
    sys.exit(main())
