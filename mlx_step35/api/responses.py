"""Requests of the Responses API, stateless: what Codex and others need of it."""

from collections.abc import Mapping
from typing import Any

from mlx_step35.api import tables
from mlx_step35.api.fields import Fields
from mlx_step35.api.history import readable_arguments
from mlx_step35.api.sampling import read_sampling, read_stop
from mlx_step35.api.tools import Tool, check_choice, read_schema, read_tool, strict_names, without_duplicates
from mlx_step35.api.types import ChatRequest, Message, Thinking, ToolChoice
from mlx_step35.chat.messages import MEDIA_PARTS, normalize_messages
from mlx_step35.errors import quoted

# A call of a tool with free text as input, which only histories of other servers hold.
_CALLS = {"function_call": "arguments", "custom_tool_call": "input"}
# What a tool said: of functions, and of shells, patches and more that other servers know.
_RESULT = "_output"


def parse_response(body: Mapping[str, Any]) -> ChatRequest:
    """A body of /v1/responses. Raises RequestError with the field's path."""
    fields = Fields(body)
    unknown = tables.RESPONSES.sort(body)
    model = fields.required_text("model")
    tools = _tools(fields)
    text = fields.optional_object("text")
    reasoning = fields.optional_object("reasoning")
    effort = reasoning.text("effort") if reasoning else None
    left_out: list[str] = []
    return ChatRequest(
        model=model,
        messages=normalize_messages(_messages(fields, left_out)),
        tools=tools,
        strict_tools=strict_names(_functions(fields)),
        tool_choice=check_choice(_tool_choice(fields), tools, "tool_choice"),
        has_parallel_calls=fields.flag("parallel_tool_calls", True),
        schema=read_schema(text.optional_object("format") if text else None, is_nested=False),
        thinking=Thinking(is_on=effort != "none"),
        template_variables={"reasoning_effort": effort} if effort else {},
        sampling=read_sampling(fields),
        stop=read_stop(fields),
        max_tokens=fields.integer("max_output_tokens", 1),
        is_stream=fields.flag("stream"),
        includes_usage=True,
        repeated=_repeated(fields, reasoning, text),
        unknown_fields=(*unknown, *dict.fromkeys(left_out)),
    )


def _repeated(fields: Fields, reasoning: Fields | None, text: Fields | None) -> dict[str, Any]:
    """What the response says again, as it was given."""
    metadata = fields.optional_object("metadata")
    shown = {name: reasoning.text(name) if reasoning else None for name in ("effort", "summary")}
    form = text.raw("format") if text else None
    return {
        "instructions": fields.text("instructions"),
        "metadata": dict(metadata.values) if metadata else {},
        "reasoning": shown,
        "text": {**(text.values if text else {}), "format": form or {"type": "text"}},
    }


def _messages(fields: Fields, left_out: list[str]) -> list[Message]:
    """The messages; kinds of items that have no place in them are added to `left_out`."""
    instructions = fields.text("instructions")
    messages: list[Message] = [{"role": "system", "content": instructions}] if instructions else []
    value = fields.require("input")
    if isinstance(value, str):
        return [*messages, {"role": "user", "content": value}]
    if not fields.items("input"):
        raise fields.refuse("input", "at least one item is required", "empty_array")
    history = _History(messages, left_out)
    for item in fields.objects("input"):
        history.add(item)
    if not history.messages:
        kinds = ", ".join(dict.fromkeys(left_out))
        raise fields.refuse("input", f"nothing in it can be read here: {quoted(kinds)}", "unsupported_value")
    return history.messages


class _History:
    """Items become messages: thoughts, text and calls that follow each other are one assistant's turn."""

    def __init__(self, messages: list[Message], left_out: list[str]) -> None:
        self.messages = messages
        self._left_out = left_out

    def add(self, item: Fields) -> None:
        kind = item.text("type") or ("message" if "role" in item else "")
        if kind == "message":
            self._add_message(item)
        elif kind == "reasoning":
            self._assistant()["reasoning_content"] += _thoughts(item)
        elif kind in _CALLS:
            self._add_call(item, _CALLS[kind])
        elif kind.endswith(_RESULT):
            result = {"role": "tool", "tool_call_id": item.text("call_id"), "content": _result(item)}
            self.messages.append(result)
        elif kind == "item_reference":
            message = "this server keeps no state; send the item itself"
            raise item.refuse("type", message, "unsupported_value")
        elif not kind:
            raise item.refuse("type", "Field required", "missing_required_parameter")
        else:
            # Items of tools that other servers run say nothing to this model.
            self._left_out.append(f"input[].{kind}")

    def _add_message(self, item: Fields) -> None:
        role = item.required_text("role")
        content = _content(item)
        if role == "assistant":
            self._assistant()["content"] += content
        elif role in ("user", "system", "developer"):
            self.messages.append({"role": role, "content": content})
        else:
            raise item.refuse("role", f"must be user, assistant, system or developer, not {quoted(role)}")

    def _add_call(self, item: Fields, arguments_name: str) -> None:
        arguments = readable_arguments(item.raw(arguments_name))
        function = {"name": item.required_text("name"), "arguments": arguments}
        calls = self._assistant().setdefault("tool_calls", [])
        calls.append({"id": item.text("call_id"), "type": "function", "function": function})

    def _assistant(self) -> Message:
        """The assistant's turn that is being put together."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            self.messages.append({"role": "assistant", "content": "", "reasoning_content": ""})
        return self.messages[-1]


def _content(item: Fields) -> str:
    value = item.require("content")
    if isinstance(value, str):
        return value
    texts = []
    for part in item.objects("content"):
        kind = part.text("type")
        if kind is None or kind in MEDIA_PARTS or not _is_text(part):
            message = f"parts of type {quoted(kind)} are not supported; this model reads text only"
            raise part.refuse("type", message, "unsupported_content_type")
        texts.append(part.raw("text") if part.raw("text") is not None else part.raw("refusal"))
    return "".join(texts)


def _result(item: Fields) -> str:
    """A tool's result. What cannot be read is named: a refusal would come back with every later request."""
    value = item.raw("output")
    if isinstance(value, Mapping):
        return _result_part(item.object("output"))
    if not isinstance(value, list):
        return item.text("output") or ""
    return "".join(map(_result_part, item.objects("output")))


def _result_part(part: Fields) -> str:
    kind = part.text("type") or "part"
    values = [part.raw(name) for name in ("text", "refusal", "stdout", "stderr")]
    texts = [value for value in values if isinstance(value, str)]
    return "".join(texts) if texts else f"[{MEDIA_PARTS.get(kind, kind)} omitted]"


def _is_text(part: Fields) -> bool:
    return isinstance(part.raw("text"), str) or isinstance(part.raw("refusal"), str)


def _thoughts(item: Fields) -> str:
    """The thoughts of a reasoning item: its content, or what stands for it in the summary."""
    for name in ("content", "summary"):
        texts = [part.text("text") or "" for part in item.objects(name)]
        if any(texts):
            return "".join(texts)
    return ""


def _functions(fields: Fields) -> list[Fields]:
    """The functions; tools that other servers run themselves are left out, as Codex always sends some."""
    return [entry for entry in fields.objects("tools") if entry.required_text("type") == "function"]


def _tools(fields: Fields) -> tuple[Tool, ...]:
    return without_duplicates(read_tool(entry, "parameters") for entry in _functions(fields))


def _tool_choice(fields: Fields) -> ToolChoice:
    value = fields.raw("tool_choice")
    if isinstance(value, Mapping):
        named = fields.object("tool_choice")
        named.require("type")
        named.choice("type", ("function",))
        return ToolChoice("named", named.required_text("name"))
    match fields.choice("tool_choice", ("auto", "none", "required")):
        case "none":
            return ToolChoice("none")
        case "required":
            return ToolChoice("required")
    return ToolChoice()
