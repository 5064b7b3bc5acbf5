"""Schemathesis against the server's own OpenAPI document: whatever is sent, no answer is a 5xx.

    pip install schemathesis; python -m benchmarks.server_fuzz [--examples 20]

The engine below the server is scripted. Exit code 1 if a request was answered with a 5xx, or not at all.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import httpx

from benchmarks.agent_trace import Server, started

KEY = "sk-test"
MODEL = "step-3.5-flash"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--examples", type=int, default=20, help="random requests for each endpoint")
    options = parser.parse_args()
    command = [sys.executable, "-m", "tests.server.scripted_server", "--key", KEY, "--queue", "64"]
    with started(Server("scripted", command, MODEL)) as base, tempfile.TemporaryDirectory() as folder:
        headers = {"authorization": f"Bearer {KEY}"}
        document = httpx.get(base + "/openapi.json", headers=headers, verify=False).json()
        # Any other name is a 404 before anything else is looked at.
        name_model(document)
        path = Path(folder) / "openapi.json"
        path.write_text(json.dumps(document))
        return subprocess.call(
            ["schemathesis", "run", str(path), "--url", base, "-H", f"Authorization: Bearer {KEY}",
             "-c", "not_a_server_error", "-n", str(options.examples), "--phases", "fuzzing,coverage",
             "--request-timeout", "60"]
        )  # fmt: skip


def name_model(schema: Any) -> None:
    """Allow only the served model's name in every body."""
    if isinstance(schema, dict):
        properties = schema.get("properties")
        if isinstance(properties, dict) and "model" in properties:
            properties["model"] = {"enum": [MODEL]}
        for value in schema.values():
            name_model(value)
    elif isinstance(schema, list):
        for value in schema:
            name_model(value)


if __name__ == "__main__":
    sys.exit(main())
