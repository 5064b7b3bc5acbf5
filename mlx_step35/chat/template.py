"""The chat template: a conversation becomes the text the model was trained on.

It renders the checkpoint's own template with transformers' conventions, in jinja's sandbox: a template is
code from the internet. What surprises: text of users and tools may contain the model's control strings. They
are marked before rendering, with characters that occur nowhere else, and taken apart from the template's own
afterwards.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.meta
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mlx_step35.chat.messages import normalize_messages
from mlx_step35.chat.reading import configured_tokens, read_json
from mlx_step35.chat.segments import THINK_PROMPT, Controls, Marker, Segment
from mlx_step35.chat.segments import Rendered as Rendered
from mlx_step35.errors import CheckpointError, RequestError

CLOSED_THINKING = "\n</think>\n"

# What a template can do wrong with a conversation, besides raising by itself.
_TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError)

TOKEN_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")


def check_options(options: Mapping[str, Any], name: str) -> None:
    """Raises RequestError when variables for the template, given as `name`, take the place of its own."""
    for taken in sorted(RESERVED & options.keys()):
        raise RequestError(f"{name} cannot set '{taken}'", field=f"{name}.{taken}")


class ChatTemplate:
    """A checkpoint's chat template.

    Args:
        source: the template's text.
        tokens: names of special tokens that the template may print, such as `bos_token`.
        control_strings: strings that the tokenizer turns into single tokens.
    """

    def __init__(self, source: str, tokens: Mapping[str, str], control_strings: Sequence[str] = ()) -> None:
        self.source = source
        self._tokens = dict(tokens)
        self._controls = Controls(control_strings) if control_strings else None
        environment = _environment()
        try:
            self.variables = frozenset(jinja2.meta.find_undeclared_variables(environment.parse(source)))
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise CheckpointError(f"the chat template cannot be read: {error}") from error

    @classmethod
    def from_directory(cls, path: Path | str) -> "ChatTemplate":
        """Reads chat_template.jinja, or else the one inside tokenizer_config.json. Raises CheckpointError."""
        directory = Path(path)
        settings = read_json(directory / "tokenizer_config.json")
        file = directory / "chat_template.jinja"
        if file.is_file():
            try:
                source = file.read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise CheckpointError(f"cannot read {file}: {error}") from error
        else:
            source = _configured_template(settings, directory)
        return cls(source, _named_tokens(settings), _control_strings(directory, settings))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> Rendered:
        """The conversation as text; `variables` are the caller's own for the template.

        `enable_thinking` False or `reasoning_effort` "none" among them gives an empty thinking block where
        the template has no switch of its own. Raises RequestError for messages that cannot be rendered, and
        for variables that would take the place of the template's own.
        """
        check_options(variables or {}, "chat_template_kwargs")
        normalized = normalize_messages(messages)
        variables = {name: value for name, value in (variables or {}).items() if value is not None}
        is_thinking = _is_thinking(variables)
        supplied = Marker(self._controls, [normalized, list(tools or ()), variables], self.source)
        context: dict[str, Any] = {
            **supplied.mark(variables),
            **self._tokens,
            "messages": supplied.mark(normalized),
            "tools": supplied.mark(list(tools)) if tools else None,
            "add_generation_prompt": add_generation_prompt,
        }
        if not is_thinking:
            context["enable_thinking"] = False
        try:
            text = self._template.render(context)
        except _TEMPLATE_ERRORS as error:
            raise RequestError(f"the chat template refuses this conversation: {error}", "messages") from error
        segments = supplied.split(text)
        if (
            not is_thinking
            and add_generation_prompt
            and segments
            and segments[-1].text.endswith(THINK_PROMPT)
        ):
            segments[-1] = Segment(segments[-1].text + CLOSED_THINKING, is_plain=False)
        return Rendered(tuple(segments))


class _Generation(Extension):
    """`{% generation %}` marks what an assistant wrote, for training; here it only prints its body."""

    tags = {"generation"}  # noqa: RUF012 jinja's own declaration

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Any) -> str:
        text: str = caller()
        return text


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers prints it: jinja's own filter would escape HTML characters."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _is_thinking(variables: Mapping[str, Any]) -> bool:
    return variables.get("enable_thinking") is not False and variables.get("reasoning_effort") != "none"


def _configured_template(settings: Mapping[str, Any], directory: Path) -> str:
    """The template in tokenizer_config.json: a text, or a list of named ones."""
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, Mapping)}
        template = named.get("default")
    if not isinstance(template, str):
        raise CheckpointError(
            f"{directory} has no chat template: neither chat_template.jinja nor one in tokenizer_config.json"
        )
    return template


def _named_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens under the names templates use."""
    tokens: dict[str, str] = {}
    for name in TOKEN_NAMES:
        token = settings.get(name)
        if isinstance(token, Mapping):
            token = token.get("content")
        if isinstance(token, str):
            tokens[name] = token
    return tokens


def _control_strings(directory: Path, settings: Mapping[str, Any]) -> list[str]:
    """Strings that the tokenizer beside the template turns into single tokens."""
    added = configured_tokens(settings, directory / "tokenizer_config.json")
    strings = [entry["content"] for entry in added.values()]
    listed = read_json(directory / "tokenizer.json").get("added_tokens", ())
    strings += [entry["content"] for entry in listed if isinstance(entry, Mapping)]
    return [string for string in dict.fromkeys(strings) if string]


# What a caller's own variables for the template may not be called: its context, its functions, jinja's words.
RESERVED = frozenset(
    {"messages", "tools", "add_generation_prompt", *TOKEN_NAMES, *_environment().globals}
    | {"self", "super", "caller"}
)
