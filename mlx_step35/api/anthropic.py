"""Requests in Anthropic's dialect: messages and count_tokens."""

from collections.abc import Mapping
from typing import Any

from mlx_step35.api import tables
from mlx_step35.api.fields import Fields
from mlx_step35.api.history import readable_arguments
from mlx_step35.api.sampling import read_sampling
from mlx_step35.api.tools import Tool, check_choice, read_schema, read_tool, strict_names, without_duplicates
from mlx_step35.api.types import ChatRequest, Message, Thinking, ToolChoice
from mlx_step35.chat.messages import MEDIA_PARTS, normalize_messages
from mlx_step35.errors import RequestError, quoted

_ROLES = ("user", "assistant", "system")
_TEXT_BLOCKS = ("text", "input_text")


def parse_messages(body: Mapping[str, Any], *, needs_max_tokens: bool = True) -> ChatRequest:
    """A body of /v1/messages, or of its count_tokens, which has no max_tokens.

    Raises RequestError with the field's path.
    """
    fields = Fields(body, is_dotted=True)
    unknown = tables.MESSAGES.sort(body)
    model = fields.required_text("model")
    max_tokens = fields.integer("max_tokens", 1)
    if needs_max_tokens:
        fields.require("max_tokens")
    left_out: list[str] = []
    messages = normalize_messages([*_system(fields), *_messages(fields, left_out)])
    tools = _tools(fields)
    choice, has_parallel_calls = _tool_choice(fields)
    return ChatRequest(
        model=model,
        messages=messages,
        tools=tools,
        strict_tools=strict_names(fields.objects("tools")),
        tool_choice=check_choice(choice, tools, "tool_choice"),
        has_parallel_calls=has_parallel_calls,
        schema=_schema(fields),
        thinking=_thinking(fields),
        template_variables=_template_variables(fields),
        sampling=read_sampling(fields),
        stop=fields.texts("stop_sequences"),
        max_tokens=max_tokens,
        is_stream=fields.flag("stream"),
        includes_usage=True,
        unknown_fields=(*unknown, *dict.fromkeys(left_out)),
    )


def _system(fields: Fields) -> list[Message]:
    value = fields.raw("system")
    if isinstance(value, list):
        texts = []
        for block in fields.objects("system"):
            block.choice("type", _TEXT_BLOCKS)
            texts.append(block.required_text("text"))
    else:
        texts = [fields.text("system") or ""]
    text = "\n\n".join(text for text in texts if text.strip())
    return [{"role": "system", "content": text}] if text else []


def _messages(fields: Fields, left_out: list[str]) -> list[Message]:
    """The messages; what has no place in them is added to `left_out`."""
    fields.require("messages")
    if not fields.items("messages"):
        raise fields.refuse("messages", "at least one message is required", "empty_array")
    messages: list[Message] = []
    for entry in fields.objects("messages"):
        entry.require("role")
        role = entry.choice("role", _ROLES)
        content = entry.require("content")
        if isinstance(content, str):
            messages.append({"role": role, "content": content})
            continue
        if not isinstance(content, list):
            raise entry.refuse("content", "must be a string or a list of blocks", "invalid_type")
        blocks = list(entry.objects("content"))
        messages += [_assistant(blocks, left_out)] if role == "assistant" else _supplied(str(role), blocks)
    return messages


def _assistant(blocks: list[Fields], left_out: list[str]) -> Message:
    """An assistant's turn; kinds of blocks that only Anthropic's own tools make are left out."""
    text, thoughts, calls = "", "", []
    for block in blocks:
        kind = block.required_text("type")
        if kind in _TEXT_BLOCKS:
            text += block.required_text("text")
        elif kind == "redacted_thinking":
            pass  # Nobody but Anthropic's own servers can read it.
        elif kind == "thinking":
            thoughts += block.text("thinking") or ""
        elif kind == "tool_use":
            function = {
                "name": block.required_text("name"),
                "arguments": readable_arguments(block.raw("input")),
            }
            calls.append({"id": block.text("id"), "type": "function", "function": function})
        elif kind in MEDIA_PARTS:
            raise _unreadable(block, kind)
        else:
            left_out.append(f"messages[].content[].{kind}")
    message: Message = {"role": "assistant", "content": text, "reasoning_content": thoughts}
    return {**message, "tool_calls": calls} if calls else message


def _supplied(role: str, blocks: list[Fields]) -> list[Message]:
    """A user's or system's turn: every tool result becomes a message of its own."""
    messages: list[Message] = []
    texts: list[str] = []
    for block in blocks:
        kind = block.required_text("type")
        if kind in _TEXT_BLOCKS:
            texts.append(block.required_text("text"))
        elif kind == "tool_result":
            if texts:
                messages.append({"role": role, "content": "".join(texts)})
                texts = []
            messages.append(_result(block))
        else:
            raise _unreadable(block, kind)
    if texts or not messages:
        messages.append({"role": role, "content": "".join(texts)})
    return messages


def _result(block: Fields) -> Message:
    content = block.raw("content")
    if isinstance(content, list):
        content = "".join(_result_part(part) for part in block.objects("content"))
    elif content is not None:
        content = block.required_text("content")
    text = content or ""
    if block.flag("is_error") and not text.lower().startswith("error"):
        text = f"Error: {text}"
    return {"role": "tool", "content": text, "tool_call_id": block.text("tool_use_id")}


def _result_part(part: Fields) -> str:
    """What cannot be read is named: a refusal would come back with every later request."""
    kind = part.required_text("type")
    if kind in _TEXT_BLOCKS:
        return part.required_text("text")
    if kind == "tool_reference":
        # The result of a search for tools. All of them are in the prompt; this says which one was found.
        return f"[tool found: {part.required_text('tool_name')}]"
    if kind == "search_result" and isinstance(part.raw("content"), list):
        return "".join(_result_part(inner) for inner in part.objects("content"))
    source = part.raw("source")
    if kind == "document" and isinstance(source, Mapping) and source.get("type") == "text":
        return part.object("source").required_text("data")
    return f"[{MEDIA_PARTS.get(kind, kind)} omitted]"


def _unreadable(block: Fields, kind: str) -> RequestError:
    message = f"{block.path}: blocks of type {quoted(kind)} are not supported; this model reads text only"
    return RequestError(message, block.path, "unsupported_content_type")


def _tools(fields: Fields) -> tuple[Tool, ...]:
    tools = []
    for entry in fields.objects("tools"):
        kind = entry.text("type")
        if kind not in (None, "custom"):
            raise entry.refuse("type", f"Anthropic's own tool {quoted(kind)} is not available here")
        entry.required_text("name")
        entry.require("input_schema")
        tools.append(read_tool(entry, "input_schema"))
    return without_duplicates(tools)


def _tool_choice(fields: Fields) -> tuple[ToolChoice, bool]:
    """The choice, and whether several calls in one turn are welcome."""
    choice = fields.optional_object("tool_choice")
    if choice is None:
        return ToolChoice(), True
    is_parallel = not choice.flag("disable_parallel_tool_use")
    choice.require("type")
    match choice.choice("type", ("auto", "any", "tool", "none")):
        case "any":
            return ToolChoice("required"), is_parallel
        case "tool":
            return ToolChoice("named", choice.required_text("name")), is_parallel
        case "none":
            return ToolChoice("none"), is_parallel
    return ToolChoice(), is_parallel


def _thinking(fields: Fields) -> Thinking:
    """Without the field the model thinks unseen, as its template wants; `disabled` closes the block."""
    thinking = fields.optional_object("thinking")
    if thinking is None:
        return Thinking(is_shown=False)
    thinking.require("type")
    kind = thinking.choice("type", ("enabled", "adaptive", "disabled"))
    if kind == "disabled":
        return Thinking(is_on=False, is_shown=False)
    return Thinking(budget=thinking.integer("budget_tokens", 1) if kind == "enabled" else None)


def _template_variables(fields: Fields) -> dict[str, Any]:
    config = fields.optional_object("output_config")
    effort = config.text("effort") if config else None
    return {"reasoning_effort": effort} if effort else {}


def _schema(fields: Fields) -> Mapping[str, Any] | None:
    config = fields.optional_object("output_config")
    form = config.optional_object("format") if config else None
    return read_schema(form or fields.optional_object("output_format"), is_nested=False)
