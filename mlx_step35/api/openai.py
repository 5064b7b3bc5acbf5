"""Requests in OpenAI's dialect: chat completions and legacy completions."""

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_step35.api import tables
from mlx_step35.api.fields import Fields
from mlx_step35.api.history import on_its_own_line, readable_arguments, split_thoughts
from mlx_step35.api.sampling import read_sampling, read_stop
from mlx_step35.api.tools import Tool, check_choice, read_schema, read_tool, strict_names, without_duplicates
from mlx_step35.api.types import ChatRequest, CompletionRequest, Message, Thinking, ToolChoice
from mlx_step35.chat.messages import normalize_messages
from mlx_step35.chat.template import check_options
from mlx_step35.errors import RequestError

MAX_CHOICES = 16
MAX_TOP_LOGPROBS = 20
MAX_COMPLETION_LOGPROBS = 5
MAX_PROMPTS = 64


def parse_chat(body: Mapping[str, Any]) -> ChatRequest:
    """A body of /v1/chat/completions. Raises RequestError with the field's path."""
    fields = Fields(body)
    unknown = tables.CHAT.sort(body)
    model = fields.required_text("model")
    messages = read_messages(fields)
    tools = _tools(fields)
    choice = check_choice(_tool_choice(fields), tools, "tool_choice")
    effort = fields.text("reasoning_effort")
    variables = _template_variables(fields, effort)
    stream_options = fields.optional_object("stream_options")
    return ChatRequest(
        model=model,
        messages=messages,
        tools=tools,
        strict_tools=strict_names(entry.object("function") for entry in fields.objects("tools")),
        tool_choice=choice,
        has_parallel_calls=fields.flag("parallel_tool_calls", True),
        schema=read_schema(fields.optional_object("response_format"), is_nested=True),
        thinking=_thinking(fields, effort, variables),
        template_variables=variables,
        sampling=read_sampling(fields),
        stop=read_stop(fields),
        max_tokens=_max_tokens(fields),
        num_choices=_num_choices(fields),
        is_stream=fields.flag("stream"),
        includes_usage=bool(stream_options and stream_options.flag("include_usage")),
        top_logprobs=_top_logprobs(fields),
        unknown_fields=unknown,
    )


def parse_completion(body: Mapping[str, Any]) -> CompletionRequest:
    """A body of /v1/completions. Raises RequestError with the field's path."""
    fields = Fields(body)
    unknown = tables.COMPLETIONS.sort(body)
    model = fields.required_text("model")
    echoes = fields.flag("echo")
    top_logprobs = fields.integer("logprobs", 0, MAX_COMPLETION_LOGPROBS)
    if echoes and top_logprobs is not None:
        raise fields.refuse("logprobs", "not supported together with echo", "unsupported_value")
    stream_options = fields.optional_object("stream_options")
    return CompletionRequest(
        model=model,
        prompts=_prompts(fields),
        echoes_prompt=echoes,
        sampling=read_sampling(fields),
        stop=read_stop(fields),
        max_tokens=_max_tokens(fields) or 16,
        num_choices=_num_choices(fields),
        is_stream=fields.flag("stream"),
        includes_usage=bool(stream_options and stream_options.flag("include_usage")),
        top_logprobs=top_logprobs,
        unknown_fields=unknown,
    )


def read_messages(fields: Fields) -> Sequence[Message]:
    """The messages in the form that templates read."""
    values = fields.require("messages")
    if not isinstance(values, list):
        raise fields.refuse("messages", "must be a list", "invalid_type")
    return normalize_messages([_message(value) for value in values])


def _message(value: Any) -> Any:
    """A message with readable arguments, and with its thoughts in their own field."""
    if not isinstance(value, Mapping):
        return value
    message = dict(value)
    content, role = message.get("content"), message.get("role")
    if role in ("system", "developer") and isinstance(content, list):
        message["content"] = [on_its_own_line(part) for part in content]
    elif role == "assistant":
        if isinstance(content, str) and not (message.get("reasoning_content") or message.get("reasoning")):
            message["reasoning_content"], message["content"] = split_thoughts(content)
        if isinstance(message.get("tool_calls"), list):
            message["tool_calls"] = [_call(call) for call in message["tool_calls"]]
    return message


def _call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        return call
    return {**call, "function": {**function, "arguments": readable_arguments(function.get("arguments"))}}


def _tools(fields: Fields) -> tuple[Tool, ...]:
    tools = []
    for entry in fields.objects("tools"):
        if entry.choice("type", ("function",)) is None and "function" not in entry:
            raise entry.refuse("type", "Field required", "missing_required_parameter")
        tools.append(read_tool(entry.object("function"), "parameters"))
    return without_duplicates(tools)


def _tool_choice(fields: Fields) -> ToolChoice:
    value = fields.raw("tool_choice")
    if value is None or value == "auto":
        return ToolChoice()
    if value == "none":
        return ToolChoice("none")
    if value in ("required", "any"):
        return ToolChoice("required")
    if isinstance(value, Mapping):
        named = fields.object("tool_choice")
        named.choice("type", ("function",))
        return ToolChoice("named", named.object("function").required_text("name"))
    raise fields.refuse("tool_choice", "must be none, auto, required or a function")


def _thinking(fields: Fields, effort: str | None, variables: Mapping[str, Any]) -> Thinking:
    """Several servers' ways to ask for no thinking; one is enough."""
    thinking = fields.optional_object("thinking")
    kind = thinking.choice("type", ("enabled", "adaptive", "auto", "disabled")) if thinking else None
    is_on = effort != "none" and kind != "disabled" and variables.get("enable_thinking") is not False
    budget = fields.integer("max_thinking_tokens", 1)
    if budget is None and thinking and kind == "enabled":
        budget = thinking.integer("budget_tokens", 1)
    return Thinking(is_on=is_on, budget=budget)


def _template_variables(fields: Fields, effort: str | None) -> dict[str, Any]:
    """What the caller has to say to the template; what stands in its own object goes first."""
    given = fields.optional_object("chat_template_kwargs")
    if given:
        check_options(given.values, "chat_template_kwargs")
    enabled = {"enable_thinking": fields.flag("enable_thinking")} if "enable_thinking" in fields else {}
    asked = {"reasoning_effort": effort} if effort else {}
    return {**enabled, **(given.values if given else {}), **asked}


def _max_tokens(fields: Fields) -> int | None:
    newer = fields.integer("max_completion_tokens", 1)
    older = fields.integer("max_tokens", 1)
    return older if newer is None else newer


def _num_choices(fields: Fields) -> int:
    return fields.integer("n", 1, MAX_CHOICES) or 1


def _top_logprobs(fields: Fields) -> int | None:
    top = fields.integer("top_logprobs", 0, MAX_TOP_LOGPROBS)
    if not fields.flag("logprobs"):
        if top:
            raise fields.refuse("top_logprobs", "needs logprobs: true")
        return None
    return top or 0


def _prompts(fields: Fields) -> tuple[str | tuple[int, ...], ...]:
    value = fields.require("prompt")
    if isinstance(value, str) or (isinstance(value, list) and value and _is_ids(value)):
        value = [value]
    if not isinstance(value, list):
        raise fields.refuse("prompt", "must be a string, token ids, or a list of them", "invalid_type")
    if not 0 < len(value) <= MAX_PROMPTS:
        raise fields.refuse("prompt", f"needs 1 to {MAX_PROMPTS} entries, found {len(value)}")
    prompts: list[str | tuple[int, ...]] = []
    for index, prompt in enumerate(value):
        if not isinstance(prompt, str) and not (isinstance(prompt, list) and _is_ids(prompt)):
            path = f"prompt[{index}]"
            raise RequestError(f"{path}: must be a string or token ids", path, "invalid_type")
        if not prompt:
            raise RequestError(f"prompt[{index}]: must not be empty", f"prompt[{index}]", "invalid_value")
        prompts.append(prompt if isinstance(prompt, str) else tuple(prompt))
    return tuple(prompts)


def _is_ids(value: list[Any]) -> bool:
    return all(isinstance(one, int) and not isinstance(one, bool) and 0 <= one < 2**31 for one in value)
