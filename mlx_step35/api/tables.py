"""Every field of every endpoint in one of three tables: served, ignored though known, refused by name.

What one endpoint serves and another does not is refused at the other, so that nobody asks for it in vain.
A field in none of the tables is ignored too, but reported, to be logged and counted: clients send many.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
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
    {
        "frequency_penalty",
        "logit_bias",
        "min_p",
        "presence_penalty",
        "repetition_penalty",
        "seed",
        "temperature",
        "top_k",
        "top_p",
    }
)

# Fields of other servers that would change the answer.
_FOREIGN: Mapping[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "chat_template": (),
    "continue_final_message": (False,),
    "documents": ([],),
    "ebnf": (),
    "grammar": ("",),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "json_schema": (),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "min_tokens": (0,),
    "mirostat": (0,),
    "prompt_logprobs": (0,),
    "regex": (),
    "stop_token_ids": ([],),
    "structured_outputs": (),
    "truncate_prompt_tokens": (),
    "typical_p": (1,),
    "use_beam_search": (False,),
}

_CHAT = FieldTable(
    served=_SAMPLING
    | {
        "chat_template_kwargs",
        "enable_thinking",
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
        "stop",
        "stream",
        "stream_options",
        "thinking",
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
            "prompt_cache_options",
            "prompt_cache_retention",
            "provider",
            # ccr contradicts itself: effort high and enabled false.
            "reasoning",
            "reasoning_format",
            "safety_identifier",
            "service_tier",
            "store",
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

_COMPLETIONS = FieldTable(
    served=_SAMPLING
    | {
        "echo",
        "logprobs",
        "max_completion_tokens",
        "max_tokens",
        "model",
        "n",
        "prompt",
        "stop",
        "stream",
        "stream_options",
    },
    ignored=frozenset(
        {
            # Raw text has neither a template nor thinking.
            "chat_template_kwargs",
            "enable_thinking",
            "max_thinking_tokens",
            "metadata",
            "parallel_tool_calls",
            "prompt_cache_key",
            "reasoning",
            "reasoning_effort",
            "safety_identifier",
            "service_tier",
            "store",
            "thinking",
            "user",
        }
    ),
    refused={"best_of": (1,), "suffix": ("",)},
)

_MESSAGES = FieldTable(
    served=_SAMPLING
    | {
        "max_tokens",
        "messages",
        "model",
        "output_config",
        "output_format",
        "stop_sequences",
        "stream",
        "system",
        "thinking",
        "tool_choice",
        "tools",
    },
    ignored=frozenset(
        {
            "anthropic_beta",
            "betas",
            "cache_control",
            "context_management",
            "diagnostics",
            "inference_geo",
            "metadata",
            "reasoning",
            "safeguards",
            "service_tier",
            "speed",
            "stream_options",
            "user_profile_id",
            "workspace_id",
        }
    ),
    refused={"container": (), "mcp_servers": ([],)},
)

_RESPONSES = FieldTable(
    served=_SAMPLING
    | {
        "input",
        "instructions",
        "max_output_tokens",
        "metadata",
        "model",
        "parallel_tool_calls",
        "reasoning",
        "stop",
        "stream",
        "text",
        "tool_choice",
        "tools",
    },
    ignored=frozenset(
        {
            "access_programs",
            "client_metadata",
            "include",
            "max_tool_calls",
            "prompt_cache_key",
            "prompt_cache_options",
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
        "background_options": (),
        "context_management": ([],),
        "conversation": (),
        "image": (),
        "moderation": (),
        "previous_response_id": (),
        "prompt": (),
        "top_logprobs": (0,),
    },
)


# Values with which fields of one endpoint ask for nothing at another one.
_HARMLESS: Mapping[str, tuple[Any, ...]] = {
    "chat_template_kwargs": ({},),
    "echo": (False,),
    "enable_thinking": (True,),
    "logprobs": (False,),
    "n": (1,),
    "parallel_tool_calls": (True,),
    "response_format": ({"type": "text"},),
    "stop": ([],),
    "stop_sequences": ([],),
    "text": ({"format": {"type": "text"}},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
}
_SERVED_SOMEWHERE = _CHAT.served | _COMPLETIONS.served | _MESSAGES.served | _RESPONSES.served


def _whole(table: FieldTable) -> FieldTable:
    """The table, refusing what other endpoints or servers do and this one does not."""
    elsewhere = {name: _HARMLESS.get(name, ()) for name in sorted(_SERVED_SOMEWHERE)}
    refused = {**elsewhere, **_FOREIGN, **table.refused}
    known = table.served | table.ignored
    return replace(table, refused={name: refused[name] for name in refused if name not in known})


CHAT = _whole(_CHAT)
COMPLETIONS = _whole(_COMPLETIONS)
MESSAGES = _whole(_MESSAGES)
RESPONSES = _whole(_RESPONSES)
