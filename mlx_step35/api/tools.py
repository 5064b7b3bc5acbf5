"""Tools and what the answer has to be, read from the spellings of three dialects."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mlx_step35.api.fields import Fields
from mlx_step35.api.types import ToolChoice
from mlx_step35.errors import RequestError, quoted

Tool = Mapping[str, Any]

# What a tag of the model's output can hold: `<function=NAME>`.
_NAME = re.compile(r"[^<>\s]+")
_NO_PARAMETERS = {"type": "object", "properties": {}}


def read_tool(function: Fields, schema_name: str, code: str = "invalid_function_parameters") -> Tool:
    """One tool in the spelling that all dialects share, so that equal tools are equal prompts.

    `function` holds name, description and, under `schema_name`, the JSON Schema of the arguments.
    """
    name = function.required_text("name")
    if not _NAME.fullmatch(name):
        raise function.refuse("name", "must be a name without blanks and angle brackets")
    schema = function.raw(schema_name)
    if schema is None:
        schema = _NO_PARAMETERS
    if not isinstance(schema, Mapping) or schema.get("type", "object") != "object":
        raise function.refuse(schema_name, 'must be a JSON Schema of "type": "object"', code)
    if not isinstance(schema.get("properties") or {}, Mapping):
        raise function.refuse(schema_name, "properties must be an object", code)
    description = function.text("description")
    described = {} if description is None else {"description": description}
    return {"type": "function", "function": {"name": name, **described, "parameters": dict(schema)}}


def strict_names(functions: Iterable[Fields]) -> frozenset[str]:
    """Names of the tools whose arguments have to follow their schema in every detail."""
    return frozenset(function.required_text("name") for function in functions if function.flag("strict"))


def check_choice(choice: ToolChoice, tools: Sequence[Tool], field: str) -> ToolChoice:
    """Raises RequestError when a call is demanded that cannot be made."""
    if choice.mode in ("required", "named") and not tools:
        raise RequestError(f"{field}: there are no tools to call", field, "invalid_value")
    names = [tool["function"]["name"] for tool in tools]
    if choice.mode == "named" and choice.name not in names:
        raise RequestError(f"{field}: there is no tool named {quoted(choice.name)}", field, "invalid_value")
    return choice


def read_schema(form: Fields | None, *, is_nested: bool) -> Mapping[str, Any] | None:
    """The JSON Schema that the answer has to follow, from a response format; None for free text.

    In chat completions the schema is nested under `json_schema`, elsewhere it is beside the type.
    """
    if form is None:
        return None
    kind = form.choice("type", ("text", "json_object", "json_schema"))
    if kind is None:
        raise form.refuse("type", "Field required", "missing_required_parameter")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    holder = form.object("json_schema") if is_nested else form
    return dict(holder.object("schema").values)


def without_duplicates(tools: Iterable[Tool]) -> tuple[Tool, ...]:
    """Of tools with one name the last: the model could not tell them apart."""
    return tuple({tool["function"]["name"]: tool for tool in tools}.values())
