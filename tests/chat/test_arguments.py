"""Values as the schema says: every kind of type, and text for whatever cannot be converted."""

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_step35.chat.arguments import Toolbox, convert

ROOT = {
    "type": "object",
    "$defs": {
        "Cfg": {"type": "object", "properties": {"depth": {"type": "integer"}}},
        "Loop": {"$ref": "#/$defs/Loop"},
        "a/b~c": {"type": "integer"},
        "Color": {"enum": ["red", "green"]},
    },
}
INTEGER, NUMBER, BOOLEAN, STRING = ({"type": name} for name in ("integer", "number", "boolean", "string"))
OBJECT, ARRAY, NULL = ({"type": name} for name in ("object", "array", "null"))
OPTIONAL_STRING = {"anyOf": [STRING, NULL]}


@pytest.mark.parametrize(("schema", "text", "value"), [
    (INTEGER, "42", 42),
    (INTEGER, " -7\n", -7),
    (INTEGER, "+5", 5),
    (INTEGER, "9007199254740993", 9007199254740993),
    (INTEGER, "123456789012345678901234567890", 123456789012345678901234567890),
    (INTEGER, "3.0", 3),
    (INTEGER, "1e3", 1000),
    (INTEGER, "9007199254740993.0", 9007199254740993),
    (INTEGER, "3.5", "3.5"),
    (INTEGER, "1e999999999", "1e999999999"),
    (INTEGER, "abc", "abc"),
    (INTEGER, "", ""),
    (INTEGER, "٣", "٣"),
    (INTEGER, "1_000", "1_000"),
    (INTEGER, "None", None),
    (INTEGER, "null", None),
    (INTEGER, "true", "true"),
    (INTEGER, "9" * 5000, "9" * 5000),
    (NUMBER, "3", 3),
    (NUMBER, "3.0", 3.0),
    (NUMBER, "-0.5", -0.5),
    (NUMBER, ".5", 0.5),
    (NUMBER, "1E-3", 0.001),
    (NUMBER, "12345678901234567890", 12345678901234567890),
    (NUMBER, "NaN", "NaN"),
    (NUMBER, "-inf", "-inf"),
    (NUMBER, "Infinity", "Infinity"),
    (NUMBER, "1e999", "1e999"),
    (NUMBER, "0x10", "0x10"),
    (BOOLEAN, "true", True),
    (BOOLEAN, "False", False),
    (BOOLEAN, "TRUE ", True),
    (BOOLEAN, "1", "1"),
    (BOOLEAN, "yes", "yes"),
    (BOOLEAN, "null", None),
    (STRING, "null", "null"),
    (STRING, "None", "None"),
    (STRING, "42", "42"),
    (STRING, " x ", " x "),
    (STRING, '{"a": 1}', '{"a": 1}'),
    (STRING, '"quoted"', '"quoted"'),
    (OBJECT, '{"k": [1, 2.5, true, null]}', {"k": [1, 2.5, True, None]}),
    (OBJECT, "{'k': [1, True, None, 'it\\'s', \"a'b\"]}", {"k": [1, True, None, "it's", "a'b"]}),
    (OBJECT, "{'a': 'x\\ny \\d \\u00e9 \\x41', 'True': 'None'}", {"a": "x\ny \\d é A", "True": "None"}),
    (OBJECT, '{"a": 1,', '{"a": 1,'),
    (OBJECT, "[1]", "[1]"),
    (OBJECT, "{1, 2}", "{1, 2}"),
    (OBJECT, "{'a': b'x'}", "{'a': b'x'}"),
    (OBJECT, '{"a": NaN}', '{"a": NaN}'),
    (OBJECT, '{"a": 1e999}', '{"a": 1e999}'),
    (OBJECT, '{"n": 123456789012345678901}', {"n": 123456789012345678901}),
    (OBJECT, "null", None),
    (OBJECT, "plain", "plain"),
    (OBJECT, '"{}"', '"{}"'),
    (ARRAY, "\n [1, 2] ", [1, 2]),
    (ARRAY, "['a', False]", ["a", False]),
    (ARRAY, "(1, 2)", "(1, 2)"),
    (ARRAY, "a, b", "a, b"),
    (ARRAY, "[" * 3000 + "]" * 3000, "[" * 3000 + "]" * 3000),
    (NULL, "null", None),
    (NULL, "x", "x"),
    ({}, "123", "123"),
    ({}, "null", "null"),
    ({}, "true", "true"),
    ({}, '{"a": [1]}', {"a": [1]}),
    ({}, "[1", "[1"),
    (True, "[1]", [1]),
    ({"description": "any"}, "1", "1"),
    ({"type": ["integer", "null"]}, "None", None),
    ({"type": ["integer", "string"]}, "5", 5),
    ({"type": ["string", "integer"]}, "5", "5"),
    ({"type": ["integer", "string"]}, "null", "null"),
    ({"type": ["boolean", "null"]}, "false", False),
    ({"type": ["string", "null"]}, "none", "none"),
    (OPTIONAL_STRING, "null", None),
    (OPTIONAL_STRING, "nullable", "nullable"),
    ({"anyOf": [INTEGER, STRING]}, "abc", "abc"),
    ({"oneOf": [OBJECT, ARRAY]}, "[1]", [1]),
    ({"anyOf": [{"type": "object"}, {"type": "object"}]}, '{"lat": 1}', {"lat": 1}),
    ({"allOf": [{"$ref": "#/$defs/Cfg"}], "default": None}, '{"depth": 3}', {"depth": 3}),
    ({"allOf": [{"minLength": 1}, STRING]}, "3", "3"),
    ({"$ref": "#/$defs/Cfg"}, '{"depth": 3}', {"depth": 3}),
    ({"anyOf": [{"$ref": "#/$defs/Cfg"}, NULL]}, "null", None),
    ({"$ref": "#/$defs/a~1b~0c"}, "7", 7),
    ({"$ref": "#/$defs/Loop"}, "7", "7"),
    ({"$ref": "#/$defs/Missing"}, "7", "7"),
    ({"$ref": "https://example.com/x"}, "7", "7"),
    ({"$ref": "#/$defs/Color"}, "red", "red"),
    ({"$ref": "#/$defs/Color"}, "blue", "blue"),
    ({"enum": [1, 2, 3]}, "2", 2),
    ({"enum": [1, 2, 3]}, "x", "x"),
    ({"enum": [True, False]}, "True", True),
    ({"enum": ["1", 1]}, "1", "1"),
    ({"enum": [1, "1"]}, "1", 1),
    ({"enum": ["a", None]}, "None", None),
    ({"enum": ["None", None]}, "None", "None"),
    ({"enum": [[1, 2]]}, "[1, 2]", [1, 2]),
    ({"enum": [1.5]}, "1.50", 1.5),
    ({"enum": [1]}, "true", "true"),
    ({"type": "string", "enum": ["null", "b"]}, "null", "null"),
    ({"type": "string", "enum": ["a"]}, "5", "5"),
    ({"const": 5}, "5", 5),
    ({"type": "integer", "nullable": True}, "null", None),
    ({"type": "string", "nullable": True}, "null", None),
    ({"type": "int"}, "5", 5),
    ({"type": "float"}, "5.5", 5.5),
    ({"type": "dict"}, "{}", {}),
    ({"type": "list"}, "[]", []),
    ({"type": "bool"}, "true", True),
    ({"type": "date"}, "today", "today"),
    ({"type": "any"}, "[1]", [1]),
    ({"type": 5}, "5", "5"),
    ({"anyOf": 5}, "5", "5"),
    ({"anyOf": []}, "5", "5"),
])  # fmt: skip
def test_values(schema: Any, text: str, value: Any) -> None:
    result = convert(text, schema, ROOT)
    assert result == value
    assert type(result) is type(value)


def arguments(parameters: Any, *values: tuple[str, str]) -> str:
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    return Toolbox([tool]).arguments("f", values)


def test_properties_behind_references_and_combinations() -> None:
    schema = {
        "$ref": "#/$defs/Args",
        "$defs": {
            "Args": {"allOf": [{"properties": {"a": INTEGER}}, {"anyOf": [{"properties": {"b": INTEGER}}]}]}
        },
    }
    assert json.loads(arguments(schema, ("a", "1"), ("b", "2"), ("c", "3"))) == {"a": 1, "b": 2, "c": "3"}


def test_undeclared_parameters_are_text_unless_the_schema_types_them() -> None:
    assert json.loads(arguments({"properties": {}, "additionalProperties": True}, ("a", "1"))) == {"a": "1"}
    assert json.loads(arguments({"additionalProperties": INTEGER}, ("a", "1"))) == {"a": 1}
    assert json.loads(arguments(None, ("a", "[1]"))) == {"a": "[1]"}


def test_order_is_kept_and_the_last_value_wins() -> None:
    text = arguments({"properties": {"a": INTEGER}}, ("z", "x"), ("a", "1"), ("z", "y"))
    assert text == '{"z": "y", "a": 1}'


def test_arguments_can_always_be_sent() -> None:
    text = arguments({"properties": {"o": OBJECT}}, ("o", '{"a": "\\ud800 é"}'))
    assert json.loads(text.encode("utf-8")) == {"o": {"a": "\ud800 é"}}
    assert arguments({}, ("a", "é😀")) == '{"a": "é😀"}'


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text(max_size=5), JSON_VALUES, max_size=3))
def test_containers_in_either_spelling(value: dict[str, Any]) -> None:
    assert convert(json.dumps(value), OBJECT, {}) == value
    assert convert(json.dumps(value, ensure_ascii=False), OBJECT, {}) == value
    assert convert(repr(value), OBJECT, {}) == value


@settings(max_examples=300, deadline=None)
@given(
    st.text(max_size=30),
    st.sampled_from([INTEGER, NUMBER, BOOLEAN, OBJECT, ARRAY, {}, OPTIONAL_STRING, {"enum": [1]}]),
)
def test_any_text_gives_json(text: str, schema: Any) -> None:
    value = convert(text, schema, {})
    json.dumps(value, allow_nan=False)
    assert not isinstance(value, float) or math.isfinite(value)
