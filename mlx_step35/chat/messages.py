"""Messages as clients send them become messages as chat templates expect them.

Templates are silent about what they do not understand: roles vanish, parts vanish, a wrong type of
`arguments` is a crash. Everything they would lose is converted here, or refused with the path of the field.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mlx_step35.errors import RequestError, quoted

Message = dict[str, Any]

TEXT_PARTS = frozenset({"text", "input_text", "output_text", "refusal", "summary_text", "reasoning_text"})
THINKING_PARTS = frozenset({"thinking", "reasoning"})
# What a part is called in a refusal, and in the note that stands for it in a tool result.
MEDIA_PARTS = {
    "image": "image",
    "image_url": "image",
    "input_image": "image",
    "audio": "audio",
    "input_audio": "audio",
    "video": "video",
    "video_url": "video",
    "input_video": "video",
    "file": "file",
    "input_file": "file",
    "document": "file",
}
ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})


def normalize_messages(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """A copy that holds only what templates read, in the form in which they read it.

    Contents become strings, developer messages system messages (those at the head one system message),
    arguments mappings, thoughts always a string, tool results follow the order of their calls. Raises
    RequestError.
    """
    if not isinstance(messages, list | tuple):
        raise RequestError("messages must be a list", field="messages", code="invalid_type")
    if not messages:
        raise RequestError("messages: at least one message is required", field="messages", code="empty_array")
    normalized = [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]
    return _order_results(_merge_head(normalized))


def _message(message: Mapping[str, Any], path: str) -> Message:
    if not isinstance(message, Mapping):
        raise RequestError(f"{path} must be an object", field=path, code="invalid_type")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        known = ", ".join(sorted(ROLES))
        raise RequestError(
            f"{path}.role must be one of {known}, not {quoted(role)}", f"{path}.role", "invalid_value"
        )
    if message.get("function_call") is not None:
        raise RequestError(
            f"{path}.function_call is not supported; use tool_calls",
            f"{path}.function_call",
            "unsupported_parameter",
        )
    content = _text(message.get("content"), f"{path}.content", is_result=role == "tool")
    if role == "assistant":
        return _assistant(message, content, path)
    if role == "tool":
        return {"role": "tool", "content": content, "tool_call_id": message.get("tool_call_id")}
    normalized: Message = {"role": "user" if role == "user" else "system", "content": content}
    if role == "system" and message.get("name") == "observation":
        # The one name that the template looks at.
        normalized["name"] = "observation"
    return normalized


def _assistant(message: Mapping[str, Any], content: str, path: str) -> Message:
    # Always a string: without one the template searches the content for </think> and cuts it there.
    reasoning = next(
        (
            message[key]
            for key in ("reasoning_content", "reasoning")
            if isinstance(message.get(key), str) and message[key]
        ),
        None,
    )
    if reasoning is None:
        reasoning = _thinking(message.get("content"))
    normalized: Message = {
        "role": "assistant",
        # The model stumbles over blank lines it did not write, and clients add them where there was no text.
        "content": content if content.strip() else "",
        "reasoning_content": reasoning if reasoning.strip() else "",
    }
    calls = message.get("tool_calls")
    if calls is None or calls == []:
        return normalized
    if not isinstance(calls, list):
        raise RequestError(f"{path}.tool_calls must be a list", f"{path}.tool_calls", "invalid_type")
    normalized["tool_calls"] = [
        _call(call, f"{path}.tool_calls[{index}]") for index, call in enumerate(calls)
    ]
    return normalized


def _call(call: Any, path: str) -> Message:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise RequestError(f"{path}.function must be an object", f"{path}.function", "invalid_type")
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise RequestError(f"{path}.function.name must be a string", f"{path}.function.name", "invalid_type")
    arguments = _arguments(function.get("arguments"), f"{path}.function.arguments")
    return {"id": call.get("id"), "type": "function", "function": {"name": name, "arguments": arguments}}


def _arguments(arguments: Any, path: str) -> dict[str, Any]:
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        return {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{path} is no JSON: {error}", path, "invalid_value") from error
        if arguments is None:
            return {}
    if not isinstance(arguments, Mapping):
        raise RequestError(f"{path} must be a JSON object", path, "invalid_type")
    return dict(arguments)


def _text(content: Any, path: str, *, is_result: bool) -> str:
    """The text of a content: a string, a list of parts, or nothing."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{path} must be a string or a list of parts", path, "invalid_type")
    return "".join(_part(part, f"{path}[{index}]", is_result=is_result) for index, part in enumerate(content))


def _part(part: Any, path: str, *, is_result: bool) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise RequestError(f"{path} must be an object", path, "invalid_type")
    kind = part.get("type", "text" if "text" in part else None)
    if not isinstance(kind, str):
        raise RequestError(f"{path} has no type", path, "unsupported_content_type")
    if kind in TEXT_PARTS:
        text = next((part[key] for key in ("text", "value", "refusal") if part.get(key) is not None), "")
        if not isinstance(text, str):
            raise RequestError(f"{path}.text must be a string", f"{path}.text", "invalid_type")
        return text
    if kind in THINKING_PARTS or kind == "redacted_thinking":
        return ""
    if is_result:
        # A refusal here would come back with every later request: the history keeps the part.
        return f"[{MEDIA_PARTS.get(kind, kind)} omitted]"
    if kind in MEDIA_PARTS:
        message = f"{path} is of type {quoted(kind)}; this model reads text only, no {MEDIA_PARTS[kind]}"
        raise RequestError(message, path, "unsupported_content_type")
    raise RequestError(
        f"{path} is of type {quoted(kind)}, which is not supported", path, "unsupported_content_type"
    )


def _thinking(content: Any) -> str:
    """Thoughts that stand among the parts of a content."""
    if not isinstance(content, list):
        return ""
    parts = [part for part in content if isinstance(part, Mapping) and part.get("type") in THINKING_PARTS]
    texts = [part.get("thinking", part.get("text")) for part in parts]
    return "".join(text for text in texts if isinstance(text, str))


def _merge_head(messages: list[Message]) -> list[Message]:
    """One system message at the head, since the template prints the tools into the first only."""
    count = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    if count < 2:
        return messages
    texts = [message["content"] for message in messages[:count] if message["content"].strip()]
    return [{"role": "system", "content": "\n\n".join(texts)}, *messages[count:]]


def _order_results(messages: list[Message]) -> list[Message]:
    """Results in the order of the calls: the template prints no ids, so only their order tells them apart."""
    ordered: list[Message] = []
    order: dict[str, int] = {}
    run: list[Message] = []
    for message in [*messages, None]:
        if message is not None and message["role"] == "tool":
            run.append(message)
            continue
        # Results of unknown calls keep their place behind the others.
        ordered += sorted(run, key=lambda result: order.get(str(result["tool_call_id"]), len(order)))
        run = []
        if message is not None:
            ordered.append(message)
            if message.get("tool_calls"):
                order = {str(call["id"]): index for index, call in enumerate(message["tool_calls"])}
    return ordered
