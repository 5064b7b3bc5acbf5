"""The client checks against the real server on a scripted engine, each in the dialects it is about."""

import re
import subprocess
import sys
from pathlib import Path

from tests.server.running import CONTEXT_LENGTH, KEY, running

CHECK = Path(__file__).parents[1] / "clients" / "check.py"
QUEUE = 4
MAX_BODY_BYTES = 1_500_000


def test_every_client_check_passes() -> None:
    with running(max_queue=QUEUE, max_body_bytes=MAX_BODY_BYTES) as server:
        limits = ["--ctx", str(CONTEXT_LENGTH), "--queue", str(QUEUE), "--max-body", str(MAX_BODY_BYTES)]
        command = [sys.executable, str(CHECK), "--base", server.base, "--key", KEY, "--slow", "2", *limits]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    failed = re.findall(r"^FAIL .*\n.*", result.stdout, re.MULTILINE)
    assert not failed, "\n".join(failed)
    assert "66 passed, 0 failed, 0 skipped" in result.stdout, result.stdout + result.stderr
