"""Types of call arguments: the text between parameter tags becomes JSON as the tool's schema says.

The model writes every value as bare text. What cannot be converted stays text, so a call is never lost: the
client answers a wrong type with an error that the model can read.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

JSON = Any
Schema = Mapping[str, Any]

# Names outside JSON Schema that tools in the wild use.
TYPE_ALIASES = {
    "int": "integer",
    "long": "integer",
    "float": "number",
    "double": "number",
    "bool": "boolean",
    "str": "string",
    "text": "string",
    "dict": "object",
    "list": "array",
    "none": "null",
}
NULLS = frozenset({"null", "None"})
BOOLEANS = {"true": True, "false": False}

_INTEGER = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
# Beyond this a float could not hold it either, and 1e999999999 must not become a number of a billion digits.
_MAX_EXPONENT = 400
# The encoder recurses; whoever nests deeper gets text.
_MAX_DEPTH = 200


class Toolbox:
    """The tools of one request: which names exist, which properties they declare, how values are typed."""

    def __init__(self, tools: Sequence[Mapping[str, Any]] | None) -> None:
        self._parameters: dict[str, Schema] = {}
        for tool in tools or ():
            function = tool.get("function") or tool
            parameters = function.get("parameters", function.get("input_schema"))
            # Tools without a name are those that a provider runs itself; the model cannot call them.
            if isinstance(function.get("name"), str):
                self._parameters[function["name"]] = parameters if isinstance(parameters, Mapping) else {}

    def __bool__(self) -> bool:
        return bool(self._parameters)

    def __contains__(self, name: str) -> bool:
        return name in self._parameters

    def declares(self, name: str, parameter: str) -> bool:
        """Whether the tool's schema names this property."""
        return parameter in self._properties(name)

    def arguments(self, name: str, parameters: Iterable[tuple[str, str]]) -> str:
        """The JSON object of a call. Order is kept; the last of a repeated parameter wins."""
        root = self._parameters.get(name, {})
        properties = self._properties(name)
        other = root.get("additionalProperties")
        values: dict[str, JSON] = {}
        for key, text in parameters:
            schema = properties.get(key, other if isinstance(other, Mapping) and other else None)
            values[key] = text if schema is None else convert(text, schema, root)
        return _dump(values)

    def _properties(self, name: str) -> Mapping[str, Any]:
        root = self._parameters.get(name, {})
        return dict(_properties(root, root, frozenset()))


def convert(text: str, schema: JSON, root: Schema) -> JSON:
    """The value of a parameter's text under its schema; the text itself when no alternative takes it."""
    choices = list(_choices(schema, root, frozenset()))
    for choice in choices:
        for member in choice.members:
            if _is_member(text, member):
                return member
    types = [choice.type for choice in choices if choice.type]
    if not types:
        # An untyped scalar is not guessed at, but a container can only be meant as one.
        types = ["container"]
    elif text.strip() in NULLS and ("null" in types or "string" not in types):
        return None
    for type_name in types:
        converter = _CONVERTERS.get(type_name)
        if converter is None:
            continue
        try:
            return converter(text)
        except ValueError:
            continue
    return text


@dataclass(frozen=True, slots=True)
class _Choice:
    """One alternative of a schema: a type, or a list of allowed members."""

    type: str = ""
    members: tuple[JSON, ...] = ()


def _choices(schema: JSON, root: Schema, seen: frozenset[str]) -> Iterator[_Choice]:
    """Alternatives in the order in which they are tried."""
    if not isinstance(schema, Mapping):
        return
    if isinstance(schema.get("enum"), list):
        yield _Choice(members=tuple(schema["enum"]))
    elif "const" in schema:
        yield _Choice(members=(schema["const"],))
    declared = schema.get("type")
    for name in declared if isinstance(declared, list) else [declared]:
        if isinstance(name, str) and name != "any":
            yield _Choice(TYPE_ALIASES.get(name, name))
    for keyword in ("anyOf", "oneOf", "allOf"):
        if isinstance(schema.get(keyword), list):
            for alternative in schema[keyword]:
                yield from _choices(alternative, root, seen)
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference not in seen:
        yield from _choices(resolve(reference, root), root, seen | {reference})
    if schema.get("nullable") is True:
        yield _Choice("null")


def _properties(schema: JSON, root: Schema, seen: frozenset[str]) -> Iterator[tuple[str, JSON]]:
    """Declared properties, also those behind references and combinations."""
    if not isinstance(schema, Mapping):
        return
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference not in seen:
        yield from _properties(resolve(reference, root), root, seen | {reference})
    for keyword in ("anyOf", "oneOf", "allOf"):
        if isinstance(schema.get(keyword), list):
            for alternative in schema[keyword]:
                yield from _properties(alternative, root, seen)
    if isinstance(schema.get("properties"), Mapping):
        yield from schema["properties"].items()


def resolve(reference: str, root: JSON) -> JSON:
    """What a JSON pointer inside the tool's own schema names; None when it leads nowhere."""
    if not reference.startswith("#"):
        return None
    target = root
    for part in reference[1:].split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(target, Mapping) and key in target:
            target = target[key]
        elif isinstance(target, list) and key.isdecimal() and int(key) < len(target):
            target = target[int(key)]
        else:
            return None
    return target


def schema_types(schema: JSON, root: Schema) -> Iterator[str]:
    """Names of the types a value may have, each once."""
    yield from dict.fromkeys(choice.type for choice in _choices(schema, root, frozenset()) if choice.type)


def _is_member(text: str, member: JSON) -> bool:
    """Whether the text spells this member of an enum, in JSON or in Python spelling."""
    if isinstance(member, str):
        return text == member
    try:
        if member is None:
            return text.strip() in NULLS
        if isinstance(member, bool):
            return _boolean(text) is member
        if isinstance(member, int | float):
            return bool(_number(text) == member)
        return bool(_container(text) == member)
    except ValueError:
        return False


def _integer(text: str) -> int:
    text = text.strip()
    if _INTEGER.fullmatch(text):
        return int(text)
    # 3.0 is an integer for JSON Schema, and the template prints a float of an earlier call that way.
    if _NUMBER.fullmatch(text):
        number = Decimal(text)
        if number.adjusted() < _MAX_EXPONENT and number == number.to_integral_value():
            return int(number)
    raise ValueError(text)


def _number(text: str) -> int | float:
    text = text.strip()
    if _INTEGER.fullmatch(text):
        return int(text)
    if _NUMBER.fullmatch(text):
        number = float(text)
        if math.isfinite(number):
            return number
    raise ValueError(text)


def _boolean(text: str) -> bool:
    value = BOOLEANS.get(text.strip().lower())
    if value is None:
        raise ValueError(text)
    return value


def _object(text: str) -> dict[str, JSON]:
    value = _container(text)
    if not isinstance(value, dict):
        raise ValueError(text)
    return value


def _array(text: str) -> list[JSON]:
    value = _container(text)
    if not isinstance(value, list):
        raise ValueError(text)
    return value


def _container(text: str) -> JSON:
    """An object or array, as JSON or else as Python prints it."""
    text = text.strip()
    if not text.startswith(("{", "[")):
        raise ValueError(text)
    try:
        value = _load(text)
    except ValueError:
        value = _load(_python_to_json(text))
    if _depth(value) > _MAX_DEPTH:
        raise ValueError("nested too deeply")
    return value


def _null(text: str) -> None:
    raise ValueError(text)


_CONVERTERS: Mapping[str, Callable[[str], JSON]] = {
    "integer": _integer,
    "number": _number,
    "boolean": _boolean,
    "object": _object,
    "array": _array,
    "container": _container,
    "string": str,
    "null": _null,
}


def _load(text: str) -> JSON:
    try:
        return json.loads(text, parse_constant=_refuse_constant, parse_float=_number)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _refuse_constant(name: str) -> JSON:
    """NaN and Infinity are not JSON, and a client's parser may refuse the whole answer for them."""
    raise ValueError(name)


def _depth(value: JSON) -> int:
    """Levels of nesting, counted without recursion."""
    depth, level = 0, [value]
    while level:
        containers = [item for item in level if isinstance(item, dict | list)]
        depth += bool(containers)
        level = [
            child for item in containers for child in (item.values() if isinstance(item, dict) else item)
        ]
    return depth


def _dump(value: JSON) -> str:
    text = json.dumps(value, ensure_ascii=False)
    if text.isascii():
        return text
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        # A lone surrogate written as an escape can only be sent on as one.
        return json.dumps(value)
    return text


_PYTHON_TOKEN = re.compile(
    r"'(?P<single>(?:[^'\\\n]|\\.)*)'"
    r'|"(?P<double>(?:[^"\\\n]|\\.)*)"'
    r"|(?P<word>[A-Za-z_][A-Za-z_0-9]*)"
    r"|[^'\"A-Za-z_]+|.",
    re.DOTALL,
)
_PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}
_PYTHON_ESCAPE = re.compile(
    r"\\(?:x(?P<x>[0-9a-fA-F]{2})|u(?P<u>[0-9a-fA-F]{4})|U(?P<U>[0-9a-fA-F]{8})|(?P<c>.))", re.DOTALL
)
_PYTHON_CHARACTERS = {
    "n": "\n",
    "t": "\t",
    "r": "\r",
    "b": "\b",
    "f": "\f",
    "a": "\a",
    "v": "\v",
    "0": "\0",
    "\n": "",
    "'": "'",
    '"': '"',
    "\\": "\\",
}


def _python_to_json(text: str) -> str:
    """Python's spelling of a list or dict in JSON's; whatever JSON has no word for is left to fail there."""
    pieces: list[str] = []
    for match in _PYTHON_TOKEN.finditer(text):
        string = match["single"] if match["single"] is not None else match["double"]
        if string is not None:
            pieces.append(json.dumps(_PYTHON_ESCAPE.sub(_unescape, string)))
        else:
            pieces.append(_PYTHON_WORDS.get(match[0], match[0]))
    return "".join(pieces)


def _unescape(match: re.Match[str]) -> str:
    code = match["x"] or match["u"] or match["U"]
    if code is not None:
        number = int(code, 16)
        return chr(number) if number <= 0x10FFFF else match[0]
    return _PYTHON_CHARACTERS.get(match["c"], match[0])
