"""Run real coding agents against the server: a question, a tool call, its result, an answer.

    python -m benchmarks.clients --programs ~/step35-clients [--only pi-openai-completions,ccr]

Installs what is missing from npm into that directory; then, on Linux and as root, nothing but the loopback
interface is up, so that no client can reach anything else. Prints a line for each client; exit code 1 if one
did not finish its tool turn. The engine below the server is scripted: this is about protocols.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from benchmarks.clients.programs import CONTEXT_LENGTH, KEY, PROGRAMS, Program

PORT = 8091
BASE = f"http://127.0.0.1:{PORT}"
TIMEOUT_S = 240
EXPECTED = "The tool said hello-from-tool."
ISOLATED = "STEP35_CLIENTS_ISOLATED"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--programs", type=Path, required=True, help="directory to install clients into")
    parser.add_argument("--only", help="names, separated by commas")
    options = parser.parse_args()
    wanted = options.only.split(",") if options.only else [program.name for program in PROGRAMS]
    programs = [program for program in PROGRAMS if program.name in wanted]
    for program in programs:
        install(program, options.programs)
    if ISOLATED not in os.environ and can_isolate():
        command = f'ip link set lo up && exec "{sys.executable}" -m benchmarks.clients "$@"'
        os.environ[ISOLATED] = "1"
        return subprocess.call(["unshare", "-n", "sh", "-c", command, "sh", *sys.argv[1:]])
    with tempfile.TemporaryDirectory() as scratch:
        return run_all(programs, options.programs.resolve(), Path(scratch))


def can_isolate() -> bool:
    return sys.platform == "linux" and os.geteuid() == 0 and shutil.which("unshare") is not None


def directory_of(program: Program, programs: Path) -> Path:
    return programs / program.package.replace("/", "_")


def install(program: Program, programs: Path) -> None:
    directory = directory_of(program, programs)
    if (directory / "node_modules" / ".bin").exists():
        return
    directory.mkdir(parents=True, exist_ok=True)
    subprocess.run(["npm", "install", "--no-audit", "--no-fund", program.package], cwd=directory, check=True)


def run_all(programs: list[Program], installed: Path, scratch: Path) -> int:
    log = (scratch / "server.log").open("w")
    server = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.clients.agent", "--port", str(PORT), "--key", KEY,
         "--ctx", str(CONTEXT_LENGTH), "--max-body", "32000000", "--queue", "32", "--keepalive", "10"],
        stderr=log, stdout=log,
    )  # fmt: skip
    try:
        wait_for_server(server)
        # Claude Code is on the router's path, as in the router's own instructions.
        paths = [str(directory_of(program, installed) / "node_modules" / ".bin") for program in PROGRAMS]
        results = [run(program, paths, installed, scratch) for program in programs]
    finally:
        server.terminate()
        server.wait(20)
        log.close()
    return 0 if all(results) else 1


def wait_for_server(server: "subprocess.Popen[bytes]") -> None:
    for _ in range(600):
        try:
            with urllib.request.urlopen(BASE + "/health") as answer:
                if json.load(answer)["status"] == "ready":
                    return
        except OSError:
            pass
        if server.poll() is not None:
            break
        time.sleep(0.2)
    raise SystemExit("the server did not start")


def run(program: Program, paths: list[str], installed: Path, scratch: Path) -> bool:
    home = scratch / program.name
    work = home / "work"
    work.mkdir(parents=True)
    for name, text in program.files.items():
        file = home / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text.replace("$SERVER", BASE))
    own = str(directory_of(program, installed) / "node_modules" / ".bin")
    environment = {
        "HOME": str(home),
        "PATH": os.pathsep.join([own, *paths, os.environ["PATH"]]),
        "TERM": "dumb",
        "CI": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        **program.environment,
    }
    started_s = time.monotonic()
    try:
        result = subprocess.run(
            ["sh", "-c", program.command],
            cwd=work, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=TIMEOUT_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        print(f"FAIL {program.name}: no end after {TIMEOUT_S} s\n{error.stdout!r}\n{error.stderr!r}")
        return False
    seconds = time.monotonic() - started_s
    has_passed = result.returncode == 0 and EXPECTED in result.stdout
    print(f"{'ok  ' if has_passed else 'FAIL'} {program.name:24} {seconds:6.1f} s", flush=True)
    if not has_passed:
        print(f"exit {result.returncode}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}", flush=True)
    return has_passed


if __name__ == "__main__":
    sys.exit(main())
