"""The clients: what to install, what to write into their home directories, how to start them.

The files here are the set-ups of the README.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

PROMPT = "Say hello using a tool, then stop."
MODEL = "step-3.5-flash"
KEY = "local"
CONTEXT_LENGTH = 262144


@dataclass(frozen=True, slots=True)
class Program:
    """One client. In `files`, `command` and `environment` $SERVER is the server's address."""

    name: str
    package: str
    command: str
    files: Mapping[str, str]
    environment: Mapping[str, str] = field(default_factory=dict)


def claude_code(name: str, package: str) -> Program:
    settings = {
        "env": {
            "ANTHROPIC_BASE_URL": "$SERVER",
            "ANTHROPIC_API_KEY": KEY,
            "ANTHROPIC_DEFAULT_HAIKU_MODEL": MODEL,
            "CLAUDE_CODE_MAX_CONTEXT_TOKENS": str(CONTEXT_LENGTH),
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",
        },
        "model": MODEL,
    }
    return Program(
        name,
        package,
        f'claude -p "{PROMPT}" --allowedTools Bash --output-format json',
        {".claude/settings.json": json.dumps(settings, indent=2)},
    )


def codex(name: str, package: str, wire_api: str) -> Program:
    config = f"""\
model = "{MODEL}"
model_provider = "step-local"
model_context_window = {CONTEXT_LENGTH}

[model_providers.step-local]
name = "step-local"
base_url = "$SERVER/v1"
wire_api = "{wire_api}"
env_key = "OPENAI_API_KEY"
stream_idle_timeout_ms = 1800000
"""
    return Program(
        name,
        package,
        f'codex exec --skip-git-repo-check --dangerously-bypass-approvals-and-sandbox "{PROMPT}"',
        {".codex/config.toml": config},
        {"OPENAI_API_KEY": KEY},
    )


def pi(api: str) -> Program:
    provider = {
        "baseUrl": "$SERVER" if api == "anthropic-messages" else "$SERVER/v1",
        "api": api,
        "apiKey": KEY,
        "models": [{"id": MODEL, "reasoning": True, "contextWindow": CONTEXT_LENGTH, "maxTokens": 32768}],
    }
    return Program(
        f"pi-{api}",
        "@mariozechner/pi-coding-agent@0.73.1",
        f'pi --provider step-local --model {MODEL} --no-session -p "{PROMPT}"',
        {".pi/agent/models.json": json.dumps({"providers": {"step-local": provider}}, indent=2)},
        {"PI_OFFLINE": "1"},
    )


def opencode() -> Program:
    limit = {"context": CONTEXT_LENGTH, "output": 32768}
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "options": {"baseURL": "$SERVER/v1", "apiKey": KEY},
        "models": {MODEL: {"limit": limit}},
    }
    config = {"provider": {"step-local": provider}, "model": f"step-local/{MODEL}", "autoupdate": False}
    return Program(
        "opencode",
        "opencode-ai@1.18.33",
        f'opencode run "{PROMPT}"',
        {".config/opencode/opencode.json": json.dumps(config, indent=2)},
    )


def router() -> Program:
    provider = {
        "name": "step-local",
        "api_base_url": "$SERVER/v1/chat/completions",
        "api_key": KEY,
        "models": [MODEL],
    }
    config = {"LOG": False, "Providers": [provider], "Router": {"default": f"step-local,{MODEL}"}}
    return Program(
        "ccr",
        "@musistudio/claude-code-router@2.0.0",
        f'(ccr start >ccr.log 2>&1 &) ; sleep 5; ccr code -p "{PROMPT}" --allowedTools Bash; ccr stop',
        {".claude-code-router/config.json": json.dumps(config, indent=2)},
    )


PROGRAMS = (
    pi("openai-completions"),
    pi("anthropic-messages"),
    pi("openai-responses"),
    claude_code("claude-code-2.1.112", "@anthropic-ai/claude-code@2.1.112"),
    claude_code("claude-code-2.1.332", "@anthropic-ai/claude-code@2.1.332"),
    codex("codex-0.40.0", "@openai/codex@0.40.0", "chat"),
    codex("codex-0.169.0", "@openai/codex@0.169.0", "responses"),
    opencode(),
    router(),
)
