"""The list of models in two dialects. There is one model; clients ask for it under many names."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any


@dataclass(frozen=True, slots=True)
class Served:
    """The model: its name, other names for it, and how much it can read."""

    name: str
    aliases: Collection[str]
    context_length: int
    created: int

    def knows(self, name: str) -> bool:
        """Whether a request means this model. Claude Code's helpers ask for fixed names, whatever is set."""
        return name == self.name or name in self.aliases or name.startswith("claude-")

    def openai(self, name: str | None = None) -> dict[str, Any]:
        """The model as OpenAI describes one."""
        return {
            "id": name or self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "mlx_step35",
            "context_length": self.context_length,
            "max_model_len": self.context_length,
        }

    def anthropic(self, name: str | None = None) -> dict[str, Any]:
        """The model as Anthropic describes one."""
        created = datetime.fromtimestamp(self.created, UTC)
        return {
            "id": name or self.name,
            "type": "model",
            "display_name": name or self.name,
            "created_at": created.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "max_input_tokens": self.context_length,
            "max_tokens": self.context_length,
        }


def openai_list(served: Served) -> Mapping[str, Any]:
    return {"object": "list", "data": [served.openai()]}


def anthropic_list(served: Served) -> Mapping[str, Any]:
    data = [served.anthropic()]
    return {"data": data, "has_more": False, "first_id": data[0]["id"], "last_id": data[-1]["id"]}
