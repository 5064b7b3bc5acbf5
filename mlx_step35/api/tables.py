"""Every field of every endpoint in one of three tables: served, ignored though known, refused by name.

A field in none of them is ignored too, but reported, so that it can be logged and counted: clients send many.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_step35.errors import RequestError


@dataclass(frozen=True, slots=True)
class FieldTable:
    """`refused` maps a field to the values with which it asks for nothing, so that it may stand there."""

    served: frozenset[str]
    ignored: frozenset[str]
    refused: Mapping[str, tuple[Any, ...]]

    def sort(self, body: Mapping[str, Any]) -> tuple[str, ...]:
        """The fields that nobody knows. Raises RequestError for one that is refused."""
        for name, harmless in self.refused.items():
            value = body.get(name)
            if value is not None and not any(value == one for one in harmless):
                raise RequestError(f"{name}: not supported by this server", name, "unsupported_parameter")
        known = self.served | self.ignored | self.refused.keys()
        return tuple(name for name in body if name not in known)


_SAMPLING = frozenset(
    {"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"}
)

CHAT = FieldTable(
    served=_SAMPLING
    | {
        "chat_template_kwargs",
        "logit_bias",
        "logprobs",
        "max_completion_tokens",
        "max_thinking_tokens",
        "max_tokens",
        "messages",
        "model",
        "n",
        "parallel_tool_calls",
        "reasoning_effort",
        "response_format",
        "seed",
        "stop",
        "stream",
        "stream_options",
        "tool_choice",
        "tools",
        "top_logprobs",
    },
    ignored=frozenset(
        {
            "cache_control",
            "include_reasoning",
            "metadata",
            "prompt_cache_key",
            "prompt_cache_retention",
            "provider",
            # ccr contradicts itself: effort high and enabled false.
            "reasoning",
            "reasoning_format",
            "safety_identifier",
            "service_tier",
            "store",
            "thinking",
            "transforms",
            "user",
            "verbosity",
        }
    ),
    refused={
        "audio": (),
        "best_of": (1,),
        "echo": (False,),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "modalities": (["text"],),
        "moderation": (),
        "prediction": (),
        "suffix": ("",),
        "web_search_options": (),
    },
)

COMPLETIONS = FieldTable(
    served=_SAMPLING
    | {
        "echo",
        "logit_bias",
        "logprobs",
        "max_tokens",
        "model",
        "n",
        "prompt",
        "seed",
        "stop",
        "stream",
        "stream_options",
    },
    ignored=frozenset({"metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user"}),
    refused={"best_of": (1,), "suffix": ("",), "tools": ([],), "response_format": ({"type": "text"},)},
)

MESSAGES = FieldTable(
    served=frozenset(
        {
            "max_tokens",
            "messages",
            "model",
            "output_config",
            "output_format",
            "stop_sequences",
            "stream",
            "system",
            "temperature",
            "thinking",
            "tool_choice",
            "tools",
            "top_k",
            "top_p",
        }
    ),
    ignored=frozenset(
        {
            "anthropic_beta",
            "betas",
            "cache_control",
            "context_management",
            "inference_geo",
            "metadata",
            "safeguards",
            "service_tier",
            "speed",
        }
    ),
    refused={"container": (), "mcp_servers": ([],)},
)

RESPONSES = FieldTable(
    served=frozenset(
        {
            "input",
            "instructions",
            "max_output_tokens",
            "model",
            "parallel_tool_calls",
            "reasoning",
            "stream",
            "temperature",
            "text",
            "tool_choice",
            "tools",
            "top_p",
        }
    ),
    ignored=frozenset(
        {
            "client_metadata",
            "include",
            "max_tool_calls",
            "metadata",
            "prompt_cache_key",
            "prompt_cache_retention",
            "safety_identifier",
            "service_tier",
            "store",
            "stream_options",
            # Nothing is cut off in secret: a prompt that is too long is refused with either value.
            "truncation",
            "user",
        }
    ),
    refused={
        "background": (False,),
        "context_management": ([],),
        "conversation": (),
        "previous_response_id": (),
        "prompt": (),
        "top_logprobs": (0,),
    },
)
