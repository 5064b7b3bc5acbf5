"""Request bodies for the OpenAPI document: what is served, as far as a short JSON Schema can say it."""

from collections.abc import Mapping
from typing import Any

Schema = dict[str, Any]

_STRING: Schema = {"type": "string"}
_FLAG: Schema = {"type": ["boolean", "null"]}
_OBJECT: Schema = {"type": "object"}
_PARTS: Schema = {
    "type": "array",
    "items": {"type": "object", "properties": {"type": _STRING, "text": _STRING}},
}
_TEXT_OR_PARTS: Schema = {"oneOf": [_STRING, _PARTS]}


def _number(least: float, most: float) -> Schema:
    return {"type": ["number", "null"], "minimum": least, "maximum": most}


def _integer(least: int, most: int | None = None) -> Schema:
    limit = {} if most is None else {"maximum": most}
    return {"type": ["integer", "null"], "minimum": least, **limit}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _object(required: tuple[str, ...], **properties: Schema) -> Schema:
    return {"type": "object", "required": list(required), "properties": properties}


_MESSAGE = _object(
    ("role",),
    role={"enum": ["system", "developer", "user", "assistant", "tool"]},
    content=_TEXT_OR_PARTS,
    reasoning_content=_STRING,
    tool_calls=_list(
        _object(("function",), id=_STRING, function=_object(("name",), name=_STRING, arguments=_STRING))
    ),
    tool_call_id=_STRING,
)
_FUNCTION = _object(("name",), name=_STRING, description=_STRING, parameters=_OBJECT)
_SAMPLING: Schema = {
    "temperature": _number(0, 2),
    "top_p": _number(0, 1),
    "top_k": _integer(0),
    "min_p": _number(0, 1),
    "repetition_penalty": _number(0.01, 10),
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "logit_bias": {"type": "object", "additionalProperties": _number(-100, 100)},
    "seed": _integer(-(2**63), 2**63 - 1),
}
_STREAMING: Schema = {
    "stream": _FLAG,
    "stream_options": _object((), include_usage=_FLAG),
}

_CHAT = _object(
    ("model", "messages"),
    model=_STRING,
    messages=_list(_MESSAGE),
    tools=_list(_object(("type", "function"), type={"enum": ["function"]}, function=_FUNCTION)),
    tool_choice={"oneOf": [{"enum": ["none", "auto", "required"]}, _OBJECT]},
    parallel_tool_calls=_FLAG,
    response_format=_object(
        ("type",),
        type={"enum": ["text", "json_object", "json_schema"]},
        json_schema=_object(("schema",), name=_STRING, schema=_OBJECT),
    ),
    logprobs=_FLAG,
    top_logprobs=_integer(0, 20),
    n=_integer(1, 16),
    stop={"oneOf": [_STRING, _list(_STRING)]},
    max_tokens=_integer(1),
    max_completion_tokens=_integer(1),
    max_thinking_tokens=_integer(1),
    reasoning_effort=_STRING,
    enable_thinking=_FLAG,
    thinking=_object((), type={"enum": ["enabled", "adaptive", "auto", "disabled"]}),
    chat_template_kwargs=_OBJECT,
    **_SAMPLING,
    **_STREAMING,
)
_COMPLETION = _object(
    ("model", "prompt"),
    model=_STRING,
    prompt={"oneOf": [_STRING, _list(_STRING), _list({"type": "integer", "minimum": 0})]},
    echo=_FLAG,
    logprobs=_integer(0, 5),
    n=_integer(1, 16),
    stop={"oneOf": [_STRING, _list(_STRING)]},
    max_tokens=_integer(1),
    max_completion_tokens=_integer(1),
    **_SAMPLING,
    **_STREAMING,
)
_BLOCK = _object(
    ("type",), type=_STRING, text=_STRING, thinking=_STRING, id=_STRING, name=_STRING, input=_OBJECT
)
_COUNT = _object(
    ("model", "messages"),
    model=_STRING,
    system={"oneOf": [_STRING, _list(_object(("type", "text"), type={"enum": ["text"]}, text=_STRING))]},
    messages=_list(
        _object(
            ("role", "content"),
            role={"enum": ["user", "assistant", "system"]},
            content={"oneOf": [_STRING, _list(_BLOCK)]},
        )
    ),
    tools=_list(_object(("name", "input_schema"), name=_STRING, description=_STRING, input_schema=_OBJECT)),
    tool_choice=_object(
        ("type",),
        type={"enum": ["auto", "any", "tool", "none"]},
        name=_STRING,
        disable_parallel_tool_use=_FLAG,
    ),
    thinking=_object(
        ("type",), type={"enum": ["enabled", "adaptive", "disabled"]}, budget_tokens=_integer(1)
    ),
)
_MESSAGES = _object(
    ("model", "messages", "max_tokens"),
    **_COUNT["properties"],
    max_tokens=_integer(1),
    stop_sequences=_list(_STRING),
    stream=_FLAG,
    **_SAMPLING,
    output_config=_object(
        (), effort=_STRING, format=_object(("type",), type={"enum": ["json_schema"]}, schema=_OBJECT)
    ),
)
_RESPONSE = _object(
    ("model", "input"),
    model=_STRING,
    input={
        "oneOf": [
            _STRING,
            _list(
                _object(
                    (),
                    type=_STRING,
                    role={"enum": ["user", "assistant", "system", "developer"]},
                    content=_TEXT_OR_PARTS,
                    call_id=_STRING,
                    name=_STRING,
                    arguments=_STRING,
                    output=_STRING,
                    summary=_PARTS,
                )
            ),
        ]
    },
    instructions=_STRING,
    tools=_list(_object(("type",), type=_STRING, name=_STRING, parameters=_OBJECT)),
    tool_choice={"oneOf": [{"enum": ["none", "auto", "required"]}, _OBJECT]},
    parallel_tool_calls=_FLAG,
    max_output_tokens=_integer(1),
    reasoning=_object((), effort=_STRING),
    text=_object((), format=_object(("type",), type=_STRING, schema=_OBJECT)),
    metadata=_OBJECT,
    stop={"oneOf": [_STRING, _list(_STRING)]},
    stream=_FLAG,
    **_SAMPLING,
)


def _operation(body: Schema) -> Schema:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": body}}}}


SCHEMAS: Mapping[str, Schema] = {
    "/v1/chat/completions": _operation(_CHAT),
    "/v1/completions": _operation(_COMPLETION),
    "/v1/messages": _operation(_MESSAGES),
    "/v1/messages/count_tokens": _operation(_COUNT),
    "/v1/responses": _operation(_RESPONSE),
    "/v1/models/{name:path}": {
        "parameters": [{"name": "name", "in": "path", "required": True, "schema": _STRING}]
    },
}
