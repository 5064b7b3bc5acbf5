"""Grammars as text: what an answer may look like, in llguidance's dialect of Lark.

A forced call is written as the model writes calls, not as JSON: strings stand bare between their tags, every
other value is JSON. The Python spelling of true, false and null is allowed too, because the chat template
shows the model its earlier calls that way.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_step35.chat.arguments import TYPE_ALIASES, resolve

Schema = Mapping[str, Any]

# Some room for indentation, but a model that has lost its way must not fill its budget with blanks.
JSON_BLANKS = r"[ \t\n]{0,20}"
# One spelling inside calls, the one the template prints.
ARGUMENT_STYLE = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": True,
}
ANSWER_STYLE = {"whitespace_pattern": JSON_BLANKS}

_BOOLEAN = '"true" | "false" | "True" | "False"'
_NULL = '"null" | "None"'


@dataclass(frozen=True, slots=True)
class CallTags:
    """How the grammar names the tags around a call: as tokens where the tokenizer has them."""

    opener: str
    closer: str


def answer_grammar(alternatives: Sequence[str], rules: Sequence[str]) -> str:
    """A whole answer behind the thinking: the newline that belongs to `</think>`, then one alternative."""
    return "\n".join([f'start: "\\n"? ({" | ".join(alternatives)})', *rules, ""])


def json_rule(name: str, schema: Schema, style: Mapping[str, Any]) -> str:
    return f"{name}: %json {json.dumps({**schema, 'x-guidance': style}, ensure_ascii=False)}"


def call_rules(tools: Sequence[Mapping[str, Any]], tags: CallTags) -> list[str]:
    """Rules for `call`, any one call of these tools."""
    # Up to the first closer, whatever stands around it: a second one would be a second reading of the text.
    rules = ['text_value: text_body "\\n"', 'text_body[suffix="</parameter>"]: /(.|\\n)*/']
    names: list[str] = []
    for index, tool in enumerate(tools):
        function = tool.get("function", tool)
        names.append(f"tool_{index}")
        rules += _tool_rules(names[-1], function, tags)
    return [f"call: {' | '.join(names)}", *rules]


def value_schemas(tool: Mapping[str, Any]) -> Iterator[tuple[str, Schema]]:
    """The schemas of a tool that its rules hold as JSON, with the path below the function's parameters."""
    root = tool.get("function", tool).get("parameters") or {}
    for name, schema in (root.get("properties") or {}).items():
        for alternative in _alternatives(schema, root, frozenset()) or ():
            if isinstance(alternative, dict):
                yield f".properties.{name}", alternative


def _tool_rules(name: str, function: Mapping[str, Any], tags: CallTags) -> list[str]:
    root = function.get("parameters") or {}
    properties = root.get("properties") or {}
    required = set(root.get("required") or ())
    rules: list[str] = []
    sequence: list[str] = []
    for index, (key, schema) in enumerate(properties.items()):
        rule = f"{name}_p{index}"
        sequence.append(rule if key in required else f"{rule}?")
        rules += _parameter_rules(rule, key, schema, root)
    if not properties and root.get("additionalProperties") is not False and root.get("type") == "object":
        # A tool that names no parameter but takes any: text is what the parser makes of them.
        sequence.append(f"{name}_any*")
        rules.append(f'{name}_any: "<parameter=" /[^>\\n]{{1,64}}/ ">\\n" text_value')
    head = _quoted(f"\n<function={function['name']}>\n")
    parts = [tags.opener, head, *sequence, _quoted("</function>\n"), tags.closer]
    return [f"{name}: {' '.join(parts)}", *rules]


def _parameter_rules(rule: str, key: str, schema: Any, root: Schema) -> list[str]:
    head = _quoted(f"<parameter={key}>\n")
    alternatives = _alternatives(schema, root, frozenset())
    if alternatives is None:
        return [f"{rule}: {head} text_value"]
    rules: list[str] = []
    choices: list[str] = []
    for index, alternative in enumerate(alternatives):
        if isinstance(alternative, str):
            choices.append(alternative)
        else:
            choices.append(f"{rule}_j{index}")
            rules.append(json_rule(choices[-1], alternative, ARGUMENT_STYLE))
    return [f"{rule}: {head} ({' | '.join(choices)}) {_quoted(chr(10) + '</parameter>' + chr(10))}", *rules]


def _alternatives(schema: Any, root: Schema, seen: frozenset[str]) -> list[str | dict[str, Any]] | None:
    """What a value may be: pieces of grammar and JSON schemas; None if it may be any text."""
    if not isinstance(schema, Mapping):
        return None
    reference = schema.get("$ref")
    if isinstance(reference, str):
        if reference in seen:
            return None
        return _alternatives(resolve(reference, root), root, seen | {reference})
    members = schema["enum"] if isinstance(schema.get("enum"), list) else None
    if members is None and "const" in schema:
        members = [schema["const"]]
    if members is not None:
        return [_quoted(member) if isinstance(member, str) else _literal(member) for member in members]
    for keyword in ("anyOf", "oneOf"):
        if isinstance(schema.get(keyword), list):
            return _union([_alternatives(item, root, seen) for item in schema[keyword]])
    combined = schema.get("allOf")
    if isinstance(combined, list) and len(combined) == 1:
        return _alternatives(combined[0], root, seen)
    declared = schema.get("type")
    names = declared if isinstance(declared, list) else [declared]
    types = [TYPE_ALIASES.get(name, name) for name in names if isinstance(name, str)]
    alternatives = _union([_typed(name, schema, root) for name in types]) if types else None
    if alternatives is not None and schema.get("nullable") is True:
        alternatives.append(_NULL)
    return alternatives


def _typed(name: str, schema: Schema, root: Schema) -> list[str | dict[str, Any]] | None:
    if name == "boolean":
        return [_BOOLEAN]
    if name == "null":
        return [_NULL]
    if name not in ("integer", "number", "object", "array"):
        return None
    definitions = {key: root[key] for key in ("$defs", "definitions") if key in root}
    return [{**definitions, **schema, "type": name}]


def _union(parts: Sequence[list[str | dict[str, Any]] | None]) -> list[str | dict[str, Any]] | None:
    union: list[str | dict[str, Any]] = []
    for part in parts:
        if part is None:
            return None
        union += part
    return union or None


def _literal(member: Any) -> str | dict[str, Any]:
    """A member of an enum that is no string."""
    if isinstance(member, bool):
        return f'"{str(member).lower()}" | "{member}"'
    return _NULL if member is None else {"const": member}


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
