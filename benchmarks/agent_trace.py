"""An agent's requests against this server and against mlx_lm.server on the same float32 weights.

    python benchmarks/agent_trace.py --model nano --json

A client sends the whole conversation with every request, as coding agents do: tool calls and their results,
thinking that the template drops at the next user turn, an edited last turn, a branch, a retry, a second
conversation, and in front of the system prompt Claude Code's billing header, which changes with every request
(`--header never` leaves it out). What the servers answer becomes the history of the following requests. Every
request also goes to a third server, ours without any prompt cache, whose answer must be the same. Prompt
tokens and cached tokens are what each server reports, time to first token is what the client sees.
"""

import argparse
import json
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx

MAX_TOKENS = 32
MAX_TRIES = 3
START_TIMEOUT_S = 300

Message = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description="Replay an agent's conversation against two servers.")
    parser.add_argument(
        "--model", default="nano", help="checkpoint to copy to float32 (default: %(default)s)"
    )
    parser.add_argument("--without-mlx-lm", action="store_true", help="measure this server only")
    parser.add_argument("--without-cold", action="store_true", help="do not compare answers with a cold run")
    parser.add_argument("--header", choices=("always", "never"), default="always")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = float32_copy(args.model, Path(folder))
        servers = {"ours": ours(path)}
        if not args.without_mlx_lm:
            servers["mlx-lm"] = mlx_lm(path)
        if not args.without_cold:
            servers["cold"] = ours(path, "--prompt-cache-bytes", "0")
        has_header = args.header == "always"
        traces = {name: run_trace(server, has_header) for name, server in servers.items()}
    print_table(traces)
    summary = summarize(traces)
    for name, value in summary.items():
        print(f"{name}: {value}")
    if args.json:
        requests = {name: [asdict(result) for result in results] for name, results in traces.items()}
        print(json.dumps({**summary, "machine": machine(), "requests": requests}))
    return 1 if summary.get("different_from_cold") else 0


# The conversation


def tool(name: str, *parameters: str) -> Message:
    properties = {parameter: {"type": "string"} for parameter in parameters}
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    description = name.replace("_", " ").capitalize()
    function = {"name": name, "description": description, "parameters": schema}
    return {"type": "function", "function": function}


TOOLS = [tool("read_file", "path"), tool("search_code", "pattern"), tool("write_note", "message")]
RULES = "You are a coding agent. " + " ".join(
    f"Rule {number}: keep functions short, name things well, and test what number {number} says."
    for number in range(1, 11)
)
HEADER = "x-anthropic-billing-header: cc_version=2.1.112.{n:03x}; cc_entrypoint=cli; cch={n:05x};"


def file_text(number: int) -> str:
    """What a tool returns: a small source file."""
    lines = [f"def function_{number}_{line}(x):\n    return x + {number * 17 + line}\n" for line in range(5)]
    return "\n".join(lines)


@dataclass
class Client:
    """An agent: two conversations, and what it does to them."""

    send: Callable[[Sequence[Message]], Message]
    has_header: bool
    main: list[Message] = field(default_factory=list)
    other: list[Message] = field(default_factory=list)
    num_files: int = 0
    num_requests: int = 0

    def ask(self, messages: Sequence[Message]) -> Message:
        """The next answer to a conversation, which is sent with a new header."""
        self.num_requests += 1
        header = f"{HEADER.format(n=self.num_requests * 7919)}\n" if self.has_header else ""
        return self.send([{"role": "system", "content": header + RULES}, *messages])

    def user(self, messages: list[Message], text: str) -> None:
        messages.append({"role": "user", "content": text})
        messages.append(self.ask(messages))

    def results(self, messages: list[Message]) -> None:
        """Answer the calls of the newest turn, or give the file to a model that made none."""
        calls = messages[-1].get("tool_calls") or []
        for call in calls:
            self.num_files += 1
            messages.append(
                {"role": "tool", "tool_call_id": call["id"], "content": file_text(self.num_files)}
            )
        if not calls:
            self.num_files += 1
            messages.append({"role": "user", "content": f"Here is it:\n{file_text(self.num_files)}"})
        messages.append(self.ask(messages))

    def edit_last(self, text: str) -> None:
        """Another last turn of the user, and another answer."""
        last = max(index for index, message in enumerate(self.main) if message["role"] == "user")
        del self.main[last:]
        self.user(self.main, text)

    def retry(self) -> None:
        self.main[-1] = self.ask(self.main[:-1])

    def work(self) -> None:
        """Sixteen requests."""
        main = self.main
        self.user(main, "path: src/app.py\nNow read file.")
        self.results(main)
        self.user(main, "pattern: def main\nNow search code.")
        self.results(main)
        branch = deepcopy(main)
        self.user(main, "path: tests/test_app.py\nNow read file.")
        self.edit_last("path: tests/test_main.py\nNow read file.")
        self.results(main)
        self.user(branch, "message: how are you\nNow write note.")
        self.results(branch)
        self.user(main, "What is 6 + 16?")
        self.user(self.other, "path: README.md\nNow read file.")
        self.results(self.other)
        self.retry()
        self.user(self.other, "pattern: import os\nNow search code.")
        self.results(self.other)
        self.user(main, "path: setup.cfg\nNow read file.")


# The servers


@dataclass(frozen=True)
class Server:
    name: str
    command: list[str]
    # Its only model, whatever name it has.
    model: str


@dataclass(frozen=True)
class Result:
    """One request as the client saw it."""

    prompt_tokens: int
    cached_tokens: int
    first_token_s: float
    answer: str


def float32_copy(model: str, folder: Path) -> Path:
    """A directory that both programs load and that computes in float32."""
    from mlx_step35.checkpoint import resolve_model

    path = folder / "float32"
    command = [sys.executable, "-m", "mlx_step35.convert", "--hf-path", str(resolve_model(model))]
    subprocess.run(
        [*command, "--mlx-path", str(path), "--dtype", "float32"],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return path


def ours(path: Path, *flags: str) -> Server:
    command = [sys.executable, "-m", "mlx_step35.server", "--model", str(path), *flags]
    return Server("mlx_step35.server", command, "claude-any")


def mlx_lm(path: Path) -> Server:
    command = [sys.executable, "-m", "mlx_lm", "server", "--model", str(path)]
    return Server("mlx_lm.server", command, "default_model")


@contextmanager
def started(server: Server) -> Iterator[str]:
    """The base address of a running server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    base = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([*server.command, "--port", str(port)], stdout=log, stderr=log)
        try:
            deadline_s = time.monotonic() + START_TIMEOUT_S
            while not is_ready(base + "/health"):
                if process.poll() is not None or time.monotonic() > deadline_s:
                    log.seek(0)
                    raise SystemExit(f"{server.name} did not start:\n{log.read().decode()}")
                time.sleep(0.2)
            yield base
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def is_ready(url: str) -> bool:
    try:
        response = httpx.get(url, timeout=5)
    except httpx.TransportError:
        return False
    return response.status_code == 200 and response.json().get("status") in ("ok", "ready")


def run_trace(server: Server, has_header: bool) -> list[Result]:
    """All requests of the trace, one after the other."""
    results: list[Result] = []
    with started(server) as base, httpx.Client(base_url=base, timeout=600) as http:
        # The first pass compiles; it is no part of the conversation.
        send(http, server.model, [{"role": "user", "content": "Hi."}], [])

        def ask(messages: Sequence[Message]) -> Message:
            result, answer = send(http, server.model, messages, TOOLS)
            results.append(result)
            print(f"{server.name} {len(results)}: {result}", file=sys.stderr, flush=True)
            return answer

        Client(ask, has_header).work()
    return results


def send(
    http: httpx.Client, model: str, messages: Sequence[Message], tools: Sequence[Message]
) -> tuple[Result, Message]:
    """One streamed request; the answer as clients send it back. Clients repeat what breaks off, so do we."""
    for _ in range(MAX_TRIES):
        if (sent := try_to_send(http, model, messages, tools)) is not None:
            return sent
        print("a stream ended without usage: asked again", file=sys.stderr, flush=True)
    raise SystemExit(f"{MAX_TRIES} streams ended without usage")


def try_to_send(
    http: httpx.Client, model: str, messages: Sequence[Message], tools: Sequence[Message]
) -> tuple[Result, Message] | None:
    """As `send`, None if the stream ends before its last chunk."""
    body: Message = {
        "model": model,
        "messages": messages,
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
        "stream": True,
        "stream_options": {"include_usage": True},
        **({"tools": tools} if tools else {}),
    }
    text, reasoning, calls, usage, first_s = "", "", {}, {}, 0.0
    start_s = time.perf_counter()
    with http.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise SystemExit(f"{response.status_code}: {response.read().decode()}")
        for chunk in events(response):
            usage = chunk.get("usage") or usage
            delta = chunk["choices"][0]["delta"] if chunk.get("choices") else {}
            new = (delta.get("content") or "", delta.get("reasoning_content") or delta.get("reasoning") or "")
            if not first_s and (any(new) or delta.get("tool_calls")):
                first_s = time.perf_counter() - start_s
            text, reasoning = text + new[0], reasoning + new[1]
            for call in delta.get("tool_calls") or []:
                merge_call(calls, call)
    if not usage:
        return None
    answer: Message = {"role": "assistant", "content": text, "reasoning_content": reasoning}
    if calls:
        answer["tool_calls"] = list(calls.values())
    spoken = json.dumps([text, reasoning, [call["function"] for call in calls.values()]], ensure_ascii=False)
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    total_s = first_s or time.perf_counter() - start_s
    return Result(usage["prompt_tokens"], cached, round(total_s, 4), spoken), answer


def events(response: httpx.Response) -> Iterator[Message]:
    for line in response.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def merge_call(calls: dict[int, Message], part: Mapping[str, Any]) -> None:
    index = part.get("index", len(calls))
    function = part.get("function") or {}
    call = calls.setdefault(
        index, {"id": part.get("id"), "type": "function", "function": {"name": "", "arguments": ""}}
    )
    call["function"]["name"] += function.get("name") or ""
    call["function"]["arguments"] += function.get("arguments") or ""


# The report


def print_table(traces: Mapping[str, Sequence[Result]]) -> None:
    print("request" + "".join(f" | {name:>8} prompt cached  first_s" for name in traces))
    for number, results in enumerate(zip(*traces.values(), strict=True), 1):
        columns = [
            f" | {result.prompt_tokens:15} {result.cached_tokens:6} {result.first_token_s:8.3f}"
            for result in results
        ]
        print(f"{number:7}" + "".join(columns))


def summarize(traces: Mapping[str, Sequence[Result]]) -> dict[str, Any]:
    def recomputed(results: Sequence[Result]) -> int:
        return sum(result.prompt_tokens - result.cached_tokens for result in results)

    def median_s(results: Sequence[Result]) -> float:
        return round(statistics.median(result.first_token_s for result in results), 4)

    warm = traces["ours"]
    summary: dict[str, Any] = {
        "num_requests": len(warm),
        "prompt_tokens": sum(result.prompt_tokens for result in warm),
        "recomputed_tokens": recomputed(warm),
        "first_token_s": median_s(warm),
    }
    if "cold" in traces:
        cold = traces["cold"]
        pairs = zip(warm, cold, strict=True)
        summary |= {
            "different_from_cold": sum(
                (one.answer, one.prompt_tokens) != (other.answer, other.prompt_tokens) for one, other in pairs
            ),
            "cold_first_token_s": median_s(cold),
        }
    if "mlx-lm" in traces:
        theirs = traces["mlx-lm"]
        summary |= {
            "mlx_lm_prompt_tokens": sum(result.prompt_tokens for result in theirs),
            "mlx_lm_recomputed_tokens": recomputed(theirs),
            "mlx_lm_first_token_s": median_s(theirs),
            "recomputed_ratio": round(recomputed(warm) / recomputed(theirs), 4),
        }
    return summary


def machine() -> str:
    return f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"


if __name__ == "__main__":
    sys.exit(main())
