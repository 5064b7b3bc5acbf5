"""Constraints: whatever is sampled under one parses as the request asked."""

import json
import random
import re
from typing import Any

import numpy as np
import pytest

from mlx_step35.chat.grammar import Constraint, GrammarCompiler
from mlx_step35.chat.output import ParsedOutput, parse_output
from mlx_step35.chat.tokenizer import Tokenizer
from mlx_step35.errors import RequestError

PARAMETERS = {
    "type": "object",
    "properties": {
        "path": {"type": "string"},
        "limit": {"type": "integer", "minimum": 0, "maximum": 50},
        "flag": {"type": "boolean"},
        "kind": {"enum": ["a b", "<x>", 3, None, True]},
        "maybe": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        "either": {"type": ["integer", "string"]},
        "config": {"$ref": "#/$defs/Config"},
        "items": {"type": "array", "items": {"$ref": "#/$defs/Config"}, "maxItems": 2},
        'q"\\é': {"const": 1.5},
    },
    "required": ["path", "flag", "kind", "config", "items", "maybe", 'q"\\é'],
    "$defs": {
        "Config": {
            "type": "object",
            "properties": {"n": {"type": "integer"}},
            "required": ["n"],
            "additionalProperties": False,
        }
    },
}


def tool(name: str, parameters: Any = None, **extra: Any) -> dict[str, Any]:
    function = {"name": name, **({} if parameters is None else {"parameters": parameters}), **extra}
    return {"type": "function", "function": function}


TOOLS = [tool("everything", PARAMETERS), tool("ping", {"type": "object", "properties": {}}), tool("bare")]


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer)


# Left to chance a text hardly ever ends, so endings are tried as a whole now and then.
ENDINGS = ["</think>", "\n</parameter>\n", "</parameter>\n", '"', "}", "]", "\n", "0", ", "]


def walk(
    tokenizer: Tokenizer,
    constraint: Constraint,
    seed: int,
    tools: Any = (),
    start: str = "",
) -> ParsedOutput | None:
    """Samples at random under the masks, with steps back in between; None if no end came in time."""
    generator = random.Random(seed)
    ids: list[int] = []
    planned = tokenizer.encode(start)
    while len(ids) < 500:
        allowed = choices(tokenizer, constraint)
        assert allowed
        ends = [token for token in tokenizer.eos_token_ids if token in allowed]
        is_open = not (start and planned) and constraint.mask() is not None
        if len(ends) == len(allowed) or (ends and is_open and generator.random() < 0.7):
            return parse_output(tokenizer.decode(ids), tools or TOOLS)
        if not planned and generator.random() < 0.3:
            planned = tokenizer.encode(generator.choice(ENDINGS))
        token = (
            planned.pop(0)
            if planned and planned[0] in allowed
            else generator.choice(sorted(allowed - {*ends}))
        )
        ids.append(token)
        constraint.advance(token)
        if generator.random() < 0.1:
            step_back(constraint, ids[-generator.randint(1, 6) :])
    return None


def choices(tokenizer: Tokenizer, constraint: Constraint) -> set[int]:
    mask = constraint.mask()
    if mask is None:
        return set(range(tokenizer.vocab_size))
    assert mask.dtype == np.bool_
    assert mask.shape == (tokenizer.vocab_size,)
    return set(np.flatnonzero(mask).tolist())


def step_back(constraint: Constraint, newest: list[int]) -> None:
    """Takes the newest tokens back and gives them again; nothing may have changed."""
    before = constraint.mask()
    constraint.rollback(len(newest))
    for token in newest:
        mask = constraint.mask()
        assert mask is None or mask[token]
        constraint.advance(token)
    after = constraint.mask()
    assert np.array_equal(before, after) if before is not None and after is not None else before is after


def walks(tokenizer: Tokenizer, make: Any, num: int) -> list[ParsedOutput]:
    results = [walk(tokenizer, make(), seed) for seed in range(num)]
    done = [result for result in results if result is not None]
    assert len(done) > num // 3
    return done


def check_arguments(arguments: dict[str, Any]) -> None:
    assert set(PARAMETERS["required"]) <= set(arguments) <= set(PARAMETERS["properties"])
    assert isinstance(arguments["path"], str)
    assert isinstance(arguments["flag"], bool)
    assert arguments["kind"] in ("a b", "<x>", 3, None, True)
    assert arguments["maybe"] is None or type(arguments["maybe"]) is int
    assert arguments['q"\\é'] == 1.5
    assert 0 <= arguments.get("limit", 0) <= 50
    assert isinstance(arguments.get("either", ""), int | str)
    for item in [arguments["config"], *arguments["items"]]:
        assert set(item) == {"n"}
        assert type(item["n"]) is int


def test_a_required_call_parses_with_the_right_types(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    results = walks(tokenizer, lambda: compiler.constraint(tools=TOOLS, tool_choice="required"), 30)
    for result in results:
        assert result.finish_reason == "tool_calls"
        assert result.content is None
        for call in result.tool_calls:
            if call.name == "everything":
                check_arguments(json.loads(call.arguments))
    assert {call.name for result in results for call in result.tool_calls} == {"everything", "ping", "bare"}
    assert max(len(result.tool_calls) for result in results) > 1


def test_a_named_call_is_the_only_one(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    for result in walks(tokenizer, lambda: compiler.constraint(tools=TOOLS, tool_name="everything"), 20):
        (call,) = result.tool_calls
        assert call.name == "everything"
        check_arguments(json.loads(call.arguments))


def test_without_parallel_calls_there_is_one_at_most(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    for result in walks(tokenizer, lambda: compiler.constraint(tools=TOOLS, parallel=False), 20):
        assert len(result.tool_calls) <= 1

    def make() -> Constraint | None:
        return compiler.constraint(tools=TOOLS, tool_choice="required", parallel=False)

    for result in walks(tokenizer, make, 20):
        assert len(result.tool_calls) == 1


SCHEMA = {
    "type": "object",
    "properties": {"title": {"type": "string"}, "n": {"type": ["integer", "null"]}},
    "required": ["title", "n"],
    "additionalProperties": False,
}


def test_an_answer_follows_its_schema(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    for result in walks(tokenizer, lambda: compiler.constraint(schema=SCHEMA), 20):
        value = json.loads(result.content or "")
        assert isinstance(value["title"], str) and set(value) == {"title", "n"}
    for result in walks(tokenizer, lambda: compiler.constraint(schema={"type": "object"}), 20):
        assert isinstance(json.loads(result.content or ""), dict)


def test_an_answer_or_a_call(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    results = walks(tokenizer, lambda: compiler.constraint(schema=SCHEMA, tools=TOOLS), 30)
    assert {result.content is None for result in results} == {True, False}
    for result in results:
        assert result.tool_calls or json.loads(result.content or "")


STRICT = {
    "$ref": "#/$defs/Root",
    "$defs": {
        "Root": {
            "type": "object",
            "properties": {
                "unit": {"enum": ["C", "F", None]},
                "days": {"type": "integer", "minimum": 1, "maximum": 7},
                "code": {"type": "string", "pattern": "^[A-Z]{2}/[0-9]+$", "maxLength": 6},
                "note": {"type": "string", "minLength": 3},
                "ids": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "integer"}}]},
                "tree": {"$ref": "#/$defs/Tree"},
            },
            "required": ["unit", "days", "code", "note", "ids", "tree", "more"],
        },
        "Tree": {
            "type": "object",
            "properties": {"left": {"anyOf": [{"$ref": "#/$defs/Tree"}, {"type": "null"}]}},
            "required": ["left"],
            "additionalProperties": False,
        },
    },
}


def check_strict(arguments: dict[str, Any]) -> None:
    """What the schema says, in Python's words."""
    assert set(arguments) == {"unit", "days", "code", "note", "ids", "tree", "more"}
    assert arguments["unit"] in ("C", "F", None)
    assert type(arguments["days"]) is int and 1 <= arguments["days"] <= 7
    assert re.fullmatch("[A-Z]{2}/[0-9]+", arguments["code"]) and len(arguments["code"]) <= 6
    assert isinstance(arguments["note"], str) and len(arguments["note"]) >= 3
    ids = arguments["ids"]
    assert isinstance(ids, str) or all(type(one) is int for one in ids)
    tree = arguments["tree"]
    while tree is not None:
        assert set(tree) == {"left"}
        tree = tree["left"]


@pytest.mark.parametrize("parallel", [True, False])
def test_strict_calls_follow_their_schema_when_calling_is_free(
    tokenizer: Tokenizer, compiler: GrammarCompiler, parallel: bool
) -> None:
    tools = [tool("weather", STRICT, strict=True), tool("ping", {"type": "object", "properties": {}})]
    counts = []
    for seed in range(60):
        constraint = compiler.constraint(tools=tools, parallel=parallel)
        assert constraint is not None
        result = walk(tokenizer, constraint, seed, tools, "</think>\nA" + "<tool_call>\n" * (seed % 3 > 0))
        for call in result.tool_calls if result else ():
            if call.name == "weather":
                check_strict(json.loads(call.arguments))
        counts.append(len(result.tool_calls) if result else 0)
    assert counts.count(0) > 5 and counts.count(1) > 5 and (parallel or max(counts) == 1)


GOOD = (
    "<tool_call>\n<function=weather>\n<parameter=unit>\nC\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
    "<parameter=code>\nAB/12\n</parameter>\n<parameter=note>\nnone\n</parameter>\n<parameter=ids>\n[1, 2]\n"
    '</parameter>\n<parameter=tree>\n{"left": {"left": null}}\n</parameter>\n<parameter=more>\nm\n'
    "</parameter>\n</function>\n</tool_call>"
)


def is_allowed(tokenizer: Tokenizer, compiler: GrammarCompiler, text: str) -> bool:
    """Whether a whole answer can be said, ends included, under the grammar of the strict tool."""
    constraint = compiler.constraint(tools=[tool("weather", STRICT, strict=True)])
    assert constraint is not None
    for token in [*tokenizer.encode(text), tokenizer.eos_token_ids[-1]]:
        if token not in choices(tokenizer, constraint):
            return False
        constraint.advance(token)
    return True


def test_text_around_strict_calls_is_free(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    for text in ("", "Hi.", "a < b\n<function\n", f"Look:{GOOD}", f"{GOOD}{GOOD}", f"{GOOD}\n{GOOD} done"):
        assert is_allowed(tokenizer, compiler, f"think\n</think>\n{text}"), text


@pytest.mark.parametrize(("good", "bad"), [
    ("\nC\n", "\nK\n"), ("\n3\n", "\n8\n"), ("\n3\n", "\nthree\n"), ("AB/12", "AB/12345"), ("AB/12", "xAB/1"),
    ("none", "no"), ("[1, 2]", "[1, 'a']"), ('{"left": null}', '{"right": null}'),
    ("<parameter=more>\nm\n</parameter>\n", ""), ("none", "none</function></tool_call>"),
    ("none", "a\n<parameter=more>\nx"), ("<tool_call>\n", ""), ("<function=weather>", "<function weather>"),
])  # fmt: skip
def test_a_strict_call_cannot_break_its_schema(
    tokenizer: Tokenizer, compiler: GrammarCompiler, good: str, bad: str
) -> None:
    assert good in GOOD
    assert not is_allowed(tokenizer, compiler, f"think\n</think>\n{GOOD.replace(good, bad)}")


@pytest.mark.parametrize(("parameters", "path"), [
    ({"type": "object", "properties": {"a": {"type": "string", "not": {"const": "x"}}}}, ".properties.a"),
    ({"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=a)b"}}}, ""),
    ({"type": "object", "properties": {"a": {"minimum": 3}}}, ".properties.a"),
    ({"type": "object", "properties": {}, "patternProperties": {"a": {}}}, ".patternProperties"),
    ({"type": "object", "properties": {"a": {"$ref": "#/$defs/A"}}, "$defs": {"A": {
        "type": "object", "properties": {"a": {"$ref": "#/$defs/A"}}, "required": ["a"]}}}, ".properties.a"),
])  # fmt: skip
def test_a_strict_schema_that_cannot_be_enforced_is_refused(
    compiler: GrammarCompiler, parameters: Any, path: str
) -> None:
    with pytest.raises(RequestError) as caught:
        compiler.constraint(tools=[tool("t", parameters, strict=True)])
    assert (caught.value.field or "").startswith("tools")
    assert (caught.value.field or "").endswith(path)


def test_nothing_to_enforce(compiler: GrammarCompiler) -> None:
    assert compiler.constraint() is None
    assert compiler.constraint(tools=TOOLS) is None
    assert compiler.constraint(tools=TOOLS, tool_choice="none", parallel=False) is None
    assert compiler.constraint(max_thinking_tokens=5, starts_in_reasoning=False) is None


def test_thinking_is_free_but_must_end(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    constraint = compiler.constraint(schema=SCHEMA)
    assert constraint is not None
    for token in tokenizer.encode("Any <tool_call> text {"):
        mask = constraint.mask()
        assert mask is not None and mask.sum() == tokenizer.vocab_size - len(tokenizer.eos_token_ids)
        constraint.advance(token)
    closer = tokenizer.token_id("</think>")
    assert closer is not None
    constraint.advance(closer)
    mask = constraint.mask()
    assert mask is not None and mask.sum() < 10
    constraint.rollback(1)
    mask = constraint.mask()
    assert mask is not None and mask.sum() > 10


def test_without_thinking_the_grammar_starts_at_once(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    constraint = compiler.constraint(schema=SCHEMA, starts_in_reasoning=False)
    assert constraint is not None
    mask = constraint.mask()
    assert mask is not None and mask.sum() < 10


@pytest.mark.parametrize("schema", [None, SCHEMA])
@pytest.mark.parametrize(
    ("thought", "budget", "text"),
    [
        ("", 0, "\n</think>\n"),
        ("a b c d", 3, None),
        ("abcd\n", 5, "abcd\n</think>\n"),
        ("ab\n</think>\n", 100, "ab\n</think>\n"),
    ],
)
def test_a_thinking_budget(
    tokenizer: Tokenizer, compiler: GrammarCompiler, thought: str, budget: int, text: str | None, schema: Any
) -> None:
    constraint = compiler.constraint(schema=schema, max_thinking_tokens=budget)
    assert constraint is not None
    ids: list[int] = []
    wanted = [token for part in thought for token in tokenizer.encode(part)] if "<" not in thought else []
    wanted = wanted or tokenizer.encode(thought)
    while not tokenizer.decode(ids).endswith("</think>\n"):
        allowed = choices(tokenizer, constraint)
        token = wanted[len(ids)] if len(ids) < len(wanted) and wanted[len(ids)] in allowed else min(allowed)
        ids.append(token)
        constraint.advance(token)
        step_back(constraint, ids[-3:])
    if text is None:
        text = tokenizer.decode(wanted[:budget]) + "\n</think>\n"
    assert tokenizer.decode(ids) == text
    assert len(choices(tokenizer, constraint)) == tokenizer.vocab_size if schema is None else 10
    step_back(constraint, ids)


@pytest.mark.parametrize(("schema", "path"), [
    ({"type": "foo"}, ""),
    ({"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=a)b"}}}, ".properties.a"),
    ({"anyOf": [{"type": "null"}, {"type": "array", "items": {"not": {}}}]}, ".anyOf[1].items"),
    ({"properties": {"a": {"$ref": "#/$defs/B"}}, "$defs": {"B": {"not": {}}}}, ".properties.a"),
    ({"type": "integer", "minimum": 5, "maximum": 1}, ""),
    ({"$ref": "#"}, ""),
    ({"anyOf": [{"$ref": "#"}]}, ""),
    ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, ""),
    ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, ""),
    ({"type": "object", "additionalProperties": {"$ref": "#"}, "minProperties": 1}, ""),
    ({"$ref": "#/$defs/A", "$defs": {"A": {"$ref": "#/$defs/B"}, "B": {"$ref": "#/$defs/A"}}}, None),
    ({"type": "array", "items": {"$ref": "#/$defs/A"}, "minItems": 1, "$defs": {
        "A": {"type": "object", "properties": {"a": {"$ref": "#/$defs/A"}}, "required": ["a"]}}}, None),
])  # fmt: skip
def test_schemas_that_cannot_be_enforced_are_named(
    compiler: GrammarCompiler, schema: Any, path: str | None
) -> None:
    with pytest.raises(RequestError) as caught:
        compiler.constraint(schema=schema)
    assert (caught.value.field or "").startswith("response_format.json_schema.schema" + (path or ""))
    assert path is None or (caught.value.field or "").endswith(path)
    assert "cannot be enforced" in str(caught.value) and caught.value.code == "unsupported_schema"


@pytest.mark.parametrize("schema", [
    {"type": "array", "items": {"$ref": "#"}},
    {"anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": "#"}, "minItems": 1}]},
    {"type": "object", "properties": {"a": {"$ref": "#"}}},
    {"type": "object", "properties": {"a": {"$ref": "#/$defs/T"}}, "required": ["a"], "$defs": {
        "T": {"type": "object", "properties": {"n": {"type": ["object", "null"]}}, "required": ["n"]}}},
])  # fmt: skip
def test_schemas_that_recurse_with_an_end_are_served(compiler: GrammarCompiler, schema: Any) -> None:
    assert compiler.constraint(schema=schema) is not None


def test_strict_tools_are_enforced_and_others_at_least_by_type(
    tokenizer: Tokenizer, compiler: GrammarCompiler
) -> None:
    odd = {
        "type": "object",
        "properties": {"o": {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=a)"}}}},
    }
    with pytest.raises(RequestError) as caught:
        compiler.constraint(tools=[tool("t", odd), tool("f", odd, strict=True)], tool_choice="required")
    assert caught.value.field == "tools[1].function.parameters.properties.o"
    constraint = compiler.constraint(tools=[tool("f", odd)], tool_name="f")
    assert constraint is not None
    with pytest.raises(RequestError, match="'g'") as caught:
        compiler.constraint(tools=TOOLS, tool_name="g")
    assert caught.value.field == "tool_choice"
    with pytest.raises(RequestError):
        compiler.constraint(tool_choice="required")


def test_after_the_end_everything_is_allowed(tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    """Drafts behind an end token are looked at too; none of them is given out."""
    constraint = compiler.constraint(schema=SCHEMA, starts_in_reasoning=False)
    assert constraint is not None
    for token in tokenizer.encode('{"title":"","n":1}'):
        constraint.advance(token)
    mask = constraint.mask()
    assert mask is not None and np.flatnonzero(mask).tolist() == sorted(tokenizer.eos_token_ids)
    end = tokenizer.eos_token_ids[-1]
    constraint.advance(end)
    assert constraint.mask() is None
    constraint.advance(end)
    constraint.rollback(2)
    again = constraint.mask()
    assert again is not None and (again == mask).all()
    constraint.rollback(3)
    assert constraint.mask() is not None
