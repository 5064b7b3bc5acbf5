"""Constraints on what may be generated: JSON answers, forced calls, and a limit to thinking.

A constraint follows the tokens given to it and says which may come next. It leaves thinking free, only that a
thinking block it has a grammar for must end; the grammar itself begins behind `</think>`. Pure host code:
masks are numpy arrays over the tokenizer's vocabulary.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
from llguidance import LLMatcher, LLTokenizer

from mlx_step35.chat.arguments import schema_types
from mlx_step35.chat.finite import has_finite_value
from mlx_step35.chat.lark import (
    ANSWER_STYLE,
    ARGUMENT_STYLE,
    STRICT_STYLE,
    CallTags,
    answer_grammar,
    call_rules,
    json_rule,
    parameters_of,
    prose_rule,
    unenforced,
    value_schemas,
)
from mlx_step35.chat.output import THINK_CLOSER
from mlx_step35.chat.scanner import CLOSER, OPENER
from mlx_step35.chat.tokenizer import Tokenizer
from mlx_step35.errors import RequestError

Mask = np.ndarray[Any, np.dtype[np.bool_]]
Tools = Sequence[Mapping[str, Any]]


class Constraint:
    """Follows one generation; `rollback` forgets the newest tokens exactly."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        matcher: LLMatcher | None,
        *,
        starts_in_reasoning: bool = True,
        max_thinking_tokens: int | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._matcher = matcher
        self._eos = _known_ends(tokenizer)
        self._closer = tokenizer.token_id(THINK_CLOSER)
        if self._closer is None and starts_in_reasoning:
            raise RequestError(
                f"this model's tokenizer has no token {THINK_CLOSER!r}, so its thinking has no end"
            )
        self._max_thinking_tokens = max_thinking_tokens if starts_in_reasoning else None
        self._tokens: list[int] = []
        # How many tokens make up the thinking, its closer included; None while it goes on.
        self._thinking_end = None if starts_in_reasoning else 0
        # The tokens that close the thinking by force, and where they start.
        self._forced: list[int] = []
        self._forced_start = 0
        # For each token behind the thinking, whether the matcher took it: once stopped it takes none.
        self._consumed: list[bool] = []
        self._plan_end()

    def mask(self) -> Mask | None:
        """True per token id that may come next; None allows everything."""
        place = len(self._tokens) - self._forced_start
        if 0 <= place < len(self._forced):
            return self._only([self._forced[place]])
        if self._matcher is None:
            return None
        if self._thinking_end is None:
            return self._not_ended
        if self._consumed and not self._consumed[-1]:
            return None
        if self._matcher.is_stopped():
            return self._only(self._eos)
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        mask: Mask = np.unpackbits(bits, bitorder="little", count=self._tokenizer.vocab_size).astype(np.bool_)
        assert mask.any(), self._matcher.get_error()
        return mask

    def advance(self, token: int) -> None:
        """Takes a generated token."""
        self._tokens.append(token)
        if self._thinking_end is None:
            if token == self._closer:
                self._thinking_end = len(self._tokens)
            else:
                self._plan_end()
        elif self._matcher is not None:
            self._consumed.append(self._matcher.try_consume_tokens([token]) == 1)

    def rollback(self, num_tokens: int) -> None:
        """Forgets the newest tokens."""
        assert num_tokens <= len(self._tokens)
        if num_tokens == 0:
            return
        del self._tokens[len(self._tokens) - num_tokens :]
        length = len(self._tokens)
        if self._matcher is not None:
            forgotten = self._consumed[max(length - (self._thinking_end or 0), 0) :]
            del self._consumed[len(self._consumed) - len(forgotten) :]
            if sum(forgotten):
                assert self._matcher.rollback(sum(forgotten)), self._matcher.get_error()
        if self._thinking_end is not None and length < self._thinking_end:
            self._thinking_end = None
        if length < self._forced_start:
            self._forced = []

    def _plan_end(self) -> None:
        """Decides to close the thinking once its budget is spent."""
        if self._max_thinking_tokens is None or self._forced or len(self._tokens) < self._max_thinking_tokens:
            return
        text = f"\n{THINK_CLOSER}\n"
        if self._tokens and self._tokenizer.decode(self._tokens[-1:]).endswith("\n"):
            text = text[1:]
        self._forced, self._forced_start = self._tokenizer.encode(text), len(self._tokens)

    def _only(self, tokens: Sequence[int]) -> Mask:
        mask = np.zeros(self._tokenizer.vocab_size, dtype=np.bool_)
        mask[list(tokens)] = True
        return mask

    @cached_property
    def _not_ended(self) -> Mask:
        """All but the end: an answer that must have a form is not skipped by ending inside the thinking."""
        mask = np.ones(self._tokenizer.vocab_size, dtype=np.bool_)
        mask[self._eos] = False
        return mask


class GrammarCompiler:
    """Makes constraints for one tokenizer; keep it, the tokenizer's tables take a while to build."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def constraint(
        self,
        *,
        schema: Mapping[str, Any] | None = None,
        tools: Tools = (),
        tool_choice: Literal["none", "auto", "required"] = "auto",
        tool_name: str | None = None,
        parallel: bool = True,
        starts_in_reasoning: bool = True,
        max_thinking_tokens: int | None = None,
        schema_field: str = "response_format.json_schema.schema",
    ) -> Constraint | None:
        """The constraint a request needs, or None if it needs none.

        Args:
            schema: JSON schema of the answer; `{"type": "object"}` for any JSON object.
            tools: the request's tools.
            tool_choice: "none", "auto" or "required".
            tool_name: the one tool to call, whatever `tool_choice` says.
            parallel: whether several calls are allowed.
            starts_in_reasoning: whether the prompt ended inside a thinking block.
            max_thinking_tokens: after so many tokens the thinking is closed.
            schema_field: what a refusal of the schema names.

        Raises RequestError for what cannot be enforced, with the field's path.
        """
        if tool_name is not None:
            tools = [tool for tool in tools if tool.get("function", tool).get("name") == tool_name]
            tool_choice, parallel = "required", False
        if tool_choice == "required" and not tools:
            named = "any" if tool_name is None else repr(tool_name)
            raise RequestError(
                f"tool_choice asks for {named}, which is no tool of this request", "tool_choice"
            )
        if tool_choice == "none":
            tools = ()
        grammar = self._grammar(schema, tools, tool_choice == "required", parallel, schema_field)
        if grammar is None and (max_thinking_tokens is None or not starts_in_reasoning):
            return None
        matcher = None
        if grammar is not None:
            matcher = LLMatcher(self._tables, LLMatcher.grammar_from_lark(grammar), log_level=0)
            if matcher.is_error():
                field = schema_field if schema is not None else "tools"
                raise RequestError(f"{field} cannot be enforced: {_first_line(matcher.get_error())}", field)
        return Constraint(
            self._tokenizer,
            matcher,
            starts_in_reasoning=starts_in_reasoning,
            max_thinking_tokens=max_thinking_tokens,
        )

    def _grammar(
        self, schema: Mapping[str, Any] | None, tools: Tools, is_forced: bool, parallel: bool, field: str
    ) -> str | None:
        """The grammar of the answer; None if any text will do."""
        is_free = schema is None and not is_forced
        if is_free and not (any(map(_is_strict, tools)) or (tools and not parallel)):
            return None
        rules: list[str] = []
        alternatives: list[str] = []
        if schema is not None and not is_forced:
            self._check_schema(schema, field)
            alternatives.append("answer")
            rules.append(json_rule("answer", schema, ANSWER_STYLE))
        if tools:
            calls = 'call ("\\n"? call)*' if parallel else "call"
            if is_free:
                calls = "prose (call prose)*" if parallel else "prose call?"
                rules.append(prose_rule([tool.get("function", tool)["name"] for tool in tools]))
            alternatives.append(calls)
            rules += call_rules(self._enforceable(tools), self._tags)
        return answer_grammar(alternatives, rules)

    def _check_schema(self, schema: Mapping[str, Any], field: str) -> None:
        message = self._fault(schema, ANSWER_STYLE)
        if message:
            path = self._locate(schema, schema, field)
            raise RequestError(f"{path} cannot be enforced: {message}", path, "unsupported_schema")

    def _enforceable(self, tools: Tools) -> list[Mapping[str, Any]]:
        """The tools with parameters that can be enforced: outside strict mode the types are enough."""
        result: list[Mapping[str, Any]] = []
        for index, tool in enumerate(tools):
            function = tool.get("function", tool)
            for name in (function.get("parameters") or {}).get("properties") or ():
                if not name or ">" in name or "\n" in name:
                    field = f"tools[{index}].function.parameters.properties"
                    raise RequestError(f"{field}: {name!r} cannot stand in a call of this model", field)
            if _is_strict(tool):
                self._check_strict(tool, f"tools[{index}].function.parameters")
            else:
                for path, schema in value_schemas(tool):
                    if self._fault(schema, ARGUMENT_STYLE, parameters_of(function)):
                        function = _loosened(function, path.removeprefix(".properties."))
            result.append({"type": "function", "function": function})
        return result

    def _check_strict(self, tool: Mapping[str, Any], field: str) -> None:
        """Raises RequestError for a part of a strict tool's schema that its calls could break."""
        function = tool.get("function", tool)
        faults = list(unenforced(function))
        for path, schema in value_schemas(tool):
            if message := self._fault(schema, STRICT_STYLE, parameters_of(function)):
                faults.append((path, message))
        for path, message in faults:
            raise RequestError(
                f"{field}{path} cannot be enforced: {message}", field + path, "unsupported_schema"
            )

    def _locate(self, schema: Mapping[str, Any], root: Mapping[str, Any], path: str) -> str:
        """The deepest part of a schema that cannot be enforced by itself."""
        definitions = {key: root[key] for key in ("$defs", "definitions") if key in root}
        for name, child in _children(schema):
            if isinstance(child, Mapping) and self._fault({**definitions, **child}, ANSWER_STYLE, root):
                return self._locate(child, root, f"{path}.{name}")
        return path

    def _fault(
        self, schema: Mapping[str, Any], style: Mapping[str, Any], root: Mapping[str, Any] | None = None
    ) -> str:
        """Why a schema cannot be enforced; empty if it can. `root` is where its references lead."""
        grammar = LLMatcher.grammar_from_json_schema(json.dumps({**schema, "x-guidance": style}))
        message = _first_line(LLMatcher.validate_grammar(grammar, self._tables))
        if not message and not has_finite_value(schema, schema if root is None else root):
            return "every value contains itself, so none can end"
        return message

    @cached_property
    def _tables(self) -> LLTokenizer:
        definition = self._tokenizer.backend.definition
        if definition is None:
            raise RequestError("constrained output needs a model with a tokenizer.json", "response_format")
        return LLTokenizer(definition, eos_token=_known_ends(self._tokenizer))

    @cached_property
    def _tags(self) -> CallTags:
        ids = [self._tokenizer.token_id(tag) for tag in (OPENER, CLOSER)]
        names = [
            json.dumps(tag) if token is None else f"<[{token}]>"
            for tag, token in zip((OPENER, CLOSER), ids, strict=True)
        ]
        return CallTags(*names)


def _known_ends(tokenizer: Tokenizer) -> list[int]:
    """End tokens that exist: the list in config.json may name more than the tokenizer has."""
    return [token for token in tokenizer.eos_token_ids if token < tokenizer.vocab_size]


def _is_strict(tool: Mapping[str, Any]) -> bool:
    return tool.get("function", tool).get("strict") is True


def _loosened(function: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The function with one parameter reduced to its types."""
    parameters = parameters_of(function)
    types = list(schema_types(parameters["properties"][name], parameters))
    properties = {**parameters["properties"], name: {"type": types}}
    return {**function, "parameters": {**parameters, "properties": properties}}


def _children(schema: Mapping[str, Any]) -> list[tuple[str, Any]]:
    children: list[tuple[str, Any]] = []
    for keyword in ("properties", "$defs", "definitions"):
        if isinstance(schema.get(keyword), Mapping):
            children += [(f"{keyword}.{name}", child) for name, child in schema[keyword].items()]
    for keyword in ("items", "additionalProperties"):
        children.append((keyword, schema.get(keyword)))
    for keyword in ("anyOf", "oneOf", "allOf", "prefixItems"):
        if isinstance(schema.get(keyword), list):
            children += [(f"{keyword}[{index}]", child) for index, child in enumerate(schema[keyword])]
    return children


def _first_line(message: str) -> str:
    """A message of the library, which may draw a picture below its first line."""
    return " ".join(message.split())[:200] if message and not message.startswith("WARNING") else ""
