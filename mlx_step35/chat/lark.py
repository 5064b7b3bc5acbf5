"""Grammars as text: what an answer may look like, in llguidance's dialect of Lark.

A forced call is written as the model writes calls, not as JSON: strings stand bare between their tags, every
other value is JSON. The Python spelling of true, false and null is allowed too, because the chat template
shows the model its earlier calls that way.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_step35.chat.arguments import TYPE_ALIASES, resolve, schema_types

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
# In strict mode a keyword that cannot be enforced is refused, not skipped.
STRICT_STYLE = {**ARGUMENT_STYLE, "lenient": False}
ANSWER_STYLE = {"whitespace_pattern": JSON_BLANKS}

_BOOLEAN = '"true" | "false" | "True" | "False"'
_NULL = '"null" | "None"'
_ANY = "(?s:.*)"
# What the parser strips before it converts a text.
_BLANKS = r"[\s\x1c-\x1f]*"
# Markup inside a value at which the parser would end the value, or the call.
_ENDS = (
    r"<\/function>[ \t\r\n]*<(\/tool_call>|tool_call>|function)",
    r"<\/tool_call>[ \t\r\n]*<tool_call>",
)
# Keywords that say nothing about the value. A format is one by JSON Schema's own rule.
_NOTES = (
    frozenset({"title", "description", "default", "examples", "example", "$comment", "$id", "$schema"})
    | {"$defs", "definitions", "deprecated", "readOnly", "writeOnly"}
    | {"format", "contentEncoding", "contentMediaType"}
)
_TEXT_KEYWORDS = frozenset({"pattern", "minLength", "maxLength"})
# Where a strict tool's parameters are named; other keywords that constrain the whole object are not enforced.
_ROOT_KEYWORDS = _NOTES | {"type", "properties", "required", "additionalProperties", "unevaluatedProperties"}


@dataclass(frozen=True, slots=True)
class CallTags:
    """How the grammar names the tags around a call: as tokens where the tokenizer has them."""

    opener: str
    closer: str


@dataclass(frozen=True, slots=True)
class Text:
    """Bare text between tags; `limits` are patterns that the whole of it has to match."""

    limits: tuple[str, ...] = ()


Alternative = str | dict[str, Any] | Text


def answer_grammar(alternatives: Sequence[str], rules: Sequence[str]) -> str:
    """A whole answer behind the thinking: the newline that belongs to `</think>`, then one alternative."""
    return "\n".join([f'start: "\\n"? ({" | ".join(alternatives)})', *rules, ""])


def json_rule(name: str, schema: Schema, style: Mapping[str, Any]) -> str:
    return f"{name}: %json {json.dumps({**schema, 'x-guidance': style}, ensure_ascii=False)}"


def prose_rule(names: Sequence[str]) -> str:
    """The rule `prose`: text in which the parser finds no call to a function of these names."""
    anyone = "|".join(map(_escaped, names))
    openers = rf"<tool_call>|<function[= \t][^>\n]*({anyone})[^>\n]*>"
    return f"prose: PROSE?\nPROSE: /(?s:.+)/ & {_without(openers)}"


def call_rules(tools: Sequence[Mapping[str, Any]], tags: CallTags) -> list[str]:
    """Rules for `call`, any one call of these tools."""
    rules: list[str] = []
    names: list[str] = []
    for index, tool in enumerate(tools):
        function = tool.get("function", tool)
        names.append(f"tool_{index}")
        rules += _tool_rules(names[-1], function, tags)
    return [f"call: {' | '.join(names)}", *rules]


def value_schemas(tool: Mapping[str, Any]) -> Iterator[tuple[str, Schema]]:
    """The schemas of a tool that its rules hold as JSON, with the path below the function's parameters."""
    root = parameters_of(tool.get("function", tool))
    for name, schema in (root.get("properties") or {}).items():
        for alternative in _alternatives(schema, root, frozenset()):
            if isinstance(alternative, dict):
                yield f".properties.{name}", alternative


def unenforced(function: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What the rules of a function skip of its schema: paths below its parameters, and why."""
    root = parameters_of(function)
    for keyword in root.keys() - _ROOT_KEYWORDS:
        yield f".{keyword}", f"{keyword} is not supported beside properties"
    for name, schema in (root.get("properties") or {}).items():
        for keyword in _skipped(schema, root, frozenset()):
            yield f".properties.{name}", f"{keyword} is not supported here"


def parameters_of(function: Mapping[str, Any]) -> Schema:
    """The schema of a function's arguments, looked up where it is a reference."""
    root: Schema = function.get("parameters") or {}
    schema: Any = root
    seen: set[str] = set()
    while isinstance(schema, Mapping) and isinstance(name := schema.get("$ref"), str) and name not in seen:
        seen.add(name)
        schema = resolve(name, root)
    if schema is root or not isinstance(schema, Mapping) or "$ref" in schema:
        return root
    return {**{key: root[key] for key in ("$defs", "definitions") if key in root}, **schema}


def _tool_rules(name: str, function: Mapping[str, Any], tags: CallTags) -> list[str]:
    root = parameters_of(function)
    required = list(root.get("required") or ())
    is_strict = function.get("strict") is True
    properties = dict(root.get("properties") or {})
    if is_strict:
        # A parameter may be demanded without being described.
        properties |= {key: {} for key in required if key not in properties}
    rules = [_text_rule(f"{name}_text", list(properties), ())]
    sequence: list[str] = []
    for index, (key, schema) in enumerate(properties.items()):
        rule = f"{name}_p{index}"
        sequence.append(rule if key in required else f"{rule}?")
        rules += _parameter_rules(rule, key, schema, root, list(properties), is_strict)
    if not properties and root.get("additionalProperties") in (None, True) and root.get("type") == "object":
        # A tool that names no parameter but takes any: text is what the parser makes of them.
        sequence.append(f"{name}_any*")
        rules.append(f'{name}_any: "<parameter=" /[^>\\n]{{1,64}}/ ">\\n" {name}_text "\\n"')
    head = _quoted(f"\n<function={function['name']}>\n")
    parts = [tags.opener, head, *sequence, _quoted("</function>\n"), tags.closer]
    return [f"{name}: {' '.join(parts)}", *rules]


def _parameter_rules(
    rule: str, key: str, schema: Any, root: Schema, names: Sequence[str], is_strict: bool
) -> list[str]:
    head = _quoted(f"<parameter={key}>\n")
    plain = f"{rule.rpartition('_')[0]}_text"
    alternatives = _alternatives(schema, root, frozenset())
    texts = [one for one in alternatives if isinstance(one, Text)]
    others = [one for one in alternatives if not isinstance(one, Text)]
    guards = _guards(schema, root) if others else ()
    if texts and not (is_strict and (guards or all(text.limits for text in texts))):
        # Any text is allowed, and what the others say is text too.
        return [f'{rule}: {head} {plain} "\\n"']
    rules: list[str] = []
    choices: list[str] = []
    for index, alternative in enumerate(alternatives):
        if isinstance(alternative, Text):
            choices.append(f'{rule}_t{index} "\\n"')
            rules.append(_text_rule(f"{rule}_t{index}", names, (*alternative.limits, *guards)))
            continue
        inner = alternative
        if isinstance(alternative, dict):
            inner = f"{rule}_j{index}"
            rules.append(json_rule(inner, alternative, STRICT_STYLE if is_strict else ARGUMENT_STYLE))
        choices.append(f"({inner}) {_quoted(chr(10) + '</parameter>' + chr(10))}")
    return [f"{rule}: {head} ({' | '.join(choices)})", *rules]


def _text_rule(rule: str, names: Sequence[str], limits: Sequence[str]) -> str:
    """Text and its closer, the first there is: a second one would be a second reading of the text."""
    closer = _quoted("\n</parameter>" if limits else "</parameter>")
    unwanted = list(_ENDS)
    guards = list(limits)
    if names:
        # A declared parameter at the start of a line begins, whatever the value before it is.
        tag = f"<parameter=({'|'.join(map(_escaped, names))})>"
        unwanted.append(rf"\n{tag}")
        guards.append(rf"~/{tag}{_ANY}/")
    body = " & ".join([f"/{_ANY}/", *guards, _without("|".join(unwanted))])
    return f"{rule}[suffix={closer}]: {body}"


def _guards(schema: Any, root: Schema) -> tuple[str, ...]:
    """Texts that the parser would convert to another type, so that as text they are none."""
    types = set(schema_types(schema, root))
    starts = []
    if types & {"object", "array"}:
        starts.append(r"[\[{]")
    if types & {"integer", "number"}:
        starts.append("[-+.0-9]")
    return (f"~/{_BLANKS}({'|'.join(starts)}){_ANY}/",) if starts else ()


def _alternatives(schema: Any, root: Schema, seen: frozenset[str]) -> list[Alternative]:
    """What a value may be: pieces of grammar, JSON schemas, and text; never none."""
    if not isinstance(schema, Mapping):
        return [Text()]
    reference = schema.get("$ref")
    if isinstance(reference, str):
        if reference in seen:
            return [Text()]
        return _alternatives(resolve(reference, root), root, seen | {reference})
    members = schema["enum"] if isinstance(schema.get("enum"), list) else None
    if members is None and "const" in schema:
        members = [schema["const"]]
    if members is not None:
        literals = [_quoted(member) if isinstance(member, str) else _literal(member) for member in members]
        return [*literals] or [Text()]
    for keyword in ("anyOf", "oneOf"):
        if isinstance(schema.get(keyword), list) and schema[keyword]:
            return [one for item in schema[keyword] for one in _alternatives(item, root, seen)]
    combined = schema.get("allOf")
    if isinstance(combined, list) and len(combined) == 1:
        return _alternatives(combined[0], root, seen)
    types = _types(schema)
    alternatives = [_typed(name, schema, root) for name in types] or [Text()]
    if schema.get("nullable") is True and types:
        alternatives.append(_NULL)
    return alternatives


def _types(schema: Schema) -> list[str]:
    declared = schema.get("type")
    names = declared if isinstance(declared, list) else [declared]
    return [TYPE_ALIASES.get(name, name) for name in names if isinstance(name, str)]


def _typed(name: str, schema: Schema, root: Schema) -> Alternative:
    if name == "boolean":
        return _BOOLEAN
    if name == "null":
        return _NULL
    if name not in ("integer", "number", "object", "array"):
        return Text(tuple(_limits(schema)))
    definitions = {key: root[key] for key in ("$defs", "definitions") if key in root}
    return {**definitions, **schema, "type": name}


def _limits(schema: Schema) -> Iterator[str]:
    """What a string's schema demands, as patterns of the whole text."""
    least, most = schema.get("minLength"), schema.get("maxLength")
    if isinstance(least, int) or isinstance(most, int):
        yield f"/(?s:.{{{least or 0},{'' if most is None else most}}})/"
    pattern = schema.get("pattern")
    if isinstance(pattern, str):
        yield f"/{_whole(pattern)}/"


def _whole(pattern: str) -> str:
    """A pattern that finds a place in a text, as one of the whole text."""
    # With alternatives an anchor may belong to one of them; it then stays, and is refused.
    is_single = "|" not in pattern
    start, end = _ANY, _ANY
    if is_single and pattern.startswith("^"):
        start, pattern = "", pattern[1:]
    if is_single and pattern.endswith("$") and not pattern.endswith("\\$"):
        end, pattern = "", pattern[:-1]
    return f"{start}({_slashed(pattern)}){end}"


def _skipped(schema: Any, root: Schema, seen: frozenset[str]) -> Iterator[str]:
    """Keywords of a parameter that `_alternatives` does not look at."""
    if not isinstance(schema, Mapping):
        return
    keywords = schema.keys() - _NOTES - {"nullable"}
    reference = schema.get("$ref")
    if isinstance(reference, str):
        if reference in seen:
            yield "$ref"
        else:
            yield from _skipped(resolve(reference, root), root, seen | {reference})
        yield from keywords - {"$ref"}
        return
    for keyword in ("enum", "const"):
        if keyword in keywords:
            return
    for keyword in ("anyOf", "oneOf", "allOf"):
        parts = schema.get(keyword)
        if isinstance(parts, list) and (len(parts) == 1 or (keyword != "allOf" and parts)):
            for part in parts:
                yield from _skipped(part, root, seen)
            yield from keywords - {keyword, "type"}
            return
    types = _types(schema)
    if not types:
        yield from keywords
    elif "string" in types and len(types) == 1:
        yield from keywords - _TEXT_KEYWORDS - {"type"}
    elif any(name not in JSON_TYPES for name in types):
        yield "type"


JSON_TYPES = frozenset({"string", "integer", "number", "boolean", "null", "object", "array"})


def _literal(member: Any) -> Alternative:
    """A member of an enum that is no string."""
    if isinstance(member, bool):
        return f'"{str(member).lower()}" | "{member}"'
    return _NULL if member is None else {"const": member}


def _without(pattern: str) -> str:
    return f"~/{_ANY}({pattern}){_ANY}/"


def _escaped(text: str) -> str:
    """Text as part of a pattern between slashes."""
    return _slashed(re.escape(text))


def _slashed(pattern: str) -> str:
    return re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\\/", pattern).replace("\n", r"\n")


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
