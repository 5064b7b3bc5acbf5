"""The server with a script that is an agent's model: it calls the shell once, then says what came out.

`python -m benchmarks.clients.agent --port 8091`; the engine below the server is the one of the tests.
"""

import json
import re
import sys
from typing import Any

from tests.server.scripted import Conversation, render_call
from tests.server.scripted_server import main

COMMAND = "echo hello-from-tool"
SHELLS = ("Bash", "bash", "shell", "exec_command", "shell_command", "local_shell")


def call_and_report(conversation: Conversation) -> str:
    """One tool call, then the answer; without a shell among the tools just an answer."""
    turns = conversation.turns
    if any(turn.startswith("tool_response") and "hello-from-tool" in turn for turn in turns):
        return "It worked.\n</think>\nThe tool said hello-from-tool."
    call = shell_call(conversation.text)
    return f"A tool will do.\n</think>\nI will run a tool.{call}" if call else "Well.\n</think>\nHello there."


def shell_call(text: str) -> str:
    """A call of the shell, as its own schema wants it."""
    _, _, listed = text.partition("<tools>\n")
    for line in listed.partition("\n</tools>")[0].splitlines():
        function = json.loads(line)["function"]
        if function["name"] in SHELLS:
            return render_call(function["name"], _arguments(function["parameters"]))
    return ""


def _arguments(schema: dict[str, Any]) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    for name, property_ in schema["properties"].items():
        if re.fullmatch("command|cmd", name):
            is_list = property_.get("type") == "array"
            arguments[name] = ["bash", "-lc", COMMAND] if is_list else COMMAND
        elif name in schema.get("required", ()):
            arguments[name] = "Say hello" if property_.get("type") == "string" else 1000
    return arguments


if __name__ == "__main__":
    sys.exit(main(call_and_report))
