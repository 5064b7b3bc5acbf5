"""The chat template: a conversation becomes the text the model was trained on.

It renders the checkpoint's own template with transformers' conventions, in jinja's sandbox: a template is
code from the internet. What surprises: text of users and tools may contain the model's control strings. They
are marked before rendering, with characters that occur nowhere else, and taken apart from the template's own
afterwards.
"""

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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
from mlx_step35.chat.reading import clean, configured_tokens, read_json
from mlx_step35.errors import CheckpointError, RequestError

THINK_PROMPT = "<think>\n"
CLOSED_THINKING = "\n</think>\n"


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a rendered text; nothing in a plain one is a control token."""

    text: str
    is_plain: bool


@dataclass(frozen=True, slots=True)
class Rendered:
    """A rendered conversation; the segments join to the text."""

    segments: tuple[Segment, ...]

    @property
    def text(self) -> str:
        return "".join(segment.text for segment in self.segments)

    @property
    def starts_in_reasoning(self) -> bool:
        """Whether what the model writes next continues a thinking block."""
        last = self.segments[-1].text if self.segments else ""
        return last.rstrip().endswith(THINK_PROMPT.strip())


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
        self._controls = _Controls(control_strings) if control_strings else None
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
        **kwargs: Any,
    ) -> Rendered:
        """The conversation as text.

        `enable_thinking=False` or `reasoning_effort="none"` gives an empty thinking block where the template
        has no switch of its own. Raises RequestError for messages that cannot be rendered.
        """
        normalized = normalize_messages(messages)
        variables = {name: value for name, value in kwargs.items() if value is not None}
        is_thinking = _is_thinking(variables)
        supplied = _Marker(self._controls, [normalized, list(tools or ()), variables], self.source)
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
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
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


class _Marker:
    """Marks control strings in supplied text, so that a rendered text can be taken apart again.

    A closing tag gets its mark in front and every other string behind, so that templates which look at the
    outer ends of a text still see what they look for. A text that ends or starts inside a control string gets
    a mark at that edge: what the template prints beside it could complete the string.
    """

    def __init__(self, controls: "_Controls | None", supplied: Any, source: str) -> None:
        self._controls = controls
        # Nearly always nothing supplied holds a control string, and then nothing is touched.
        self._is_needed = False
        if controls is None:
            return
        texts = list(_strings(supplied))
        if any(controls.concern(text) for text in texts):
            used = set(source).union(*map(set, texts))
            free = (chr(code) for code in _PRIVATE_CHARACTERS if chr(code) not in used)
            self._behind, self._before, self._edge = next(free), next(free), next(free)
            self._marks = re.compile(f"[{self._behind}{self._before}{self._edge}]")
            self._is_needed = True

    def mark(self, value: Any) -> Any:
        """A copy of the value with clean and marked strings."""
        if isinstance(value, str):
            return self._mark(clean(value))
        if isinstance(value, Mapping):
            return {self.mark(key): self.mark(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark(item) for item in value]
        return value

    def split(self, text: str) -> list[Segment]:
        """The rendered text without marks, in segments."""
        if self._controls is None or not self._is_needed:
            return [Segment(text, is_plain=False)]
        pieces: list[str] = []
        places: dict[str, list[int]] = {self._behind: [], self._before: [], self._edge: []}
        position = length = 0
        for match in self._marks.finditer(text):
            pieces.append(text[position : match.start()])
            length += match.start() - position
            places[match[0]].append(length)
            position = match.end()
        unmarked = "".join([*pieces, text[position:]])
        behind, before, edges = set(places[self._behind]), set(places[self._before]), places[self._edge]
        real: list[tuple[int, int]] = []
        plain: list[int] = []
        for match in self._controls.pattern.finditer(unmarked):
            start, end = match.span()
            is_marked = start in before if _is_closing(match[0]) else end in behind
            is_completed = bisect_right(edges, start) < bisect_left(edges, end)
            if is_marked or is_completed:
                plain.append(start)
            else:
                real.append((start, end))
        return _segments(unmarked, real, plain)

    def _mark(self, text: str) -> str:
        if self._controls is None or not self._is_needed:
            return text
        marked = self._controls.pattern.sub(
            lambda m: self._before + m[0] if _is_closing(m[0]) else m[0] + self._behind, text
        )
        bare = text.rstrip()
        if self._controls.is_begun_by(bare):
            blanks = len(text) - len(bare)
            marked = marked[: len(marked) - blanks] + self._edge + text[len(bare) :]
        bare = text.lstrip()
        if self._controls.is_ended_by(bare):
            blanks = len(text) - len(bare)
            marked = marked[:blanks] + self._edge + marked[blanks:]
        return marked


class _Controls:
    """The control strings of a tokenizer, and what can be part of one."""

    def __init__(self, strings: Sequence[str]) -> None:
        # Longest first: of two strings that start alike the tokenizer takes the longer one.
        self.pattern = re.compile("|".join(map(re.escape, sorted(strings, key=len, reverse=True))))
        self._beginnings = {string[:length] for string in strings for length in range(1, len(string))}
        self._ends = {string[length:] for string in strings for length in range(1, len(string))}
        self._longest = max(map(len, strings))

    def concern(self, text: str) -> bool:
        """Whether a supplied text holds a control string or could be completed to one."""
        return bool(
            self.pattern.search(text) or self.is_begun_by(text.rstrip()) or self.is_ended_by(text.lstrip())
        )

    def is_begun_by(self, text: str) -> bool:
        """Whether the text ends in the beginning of a control string."""
        return any(
            text[-length:] in self._beginnings for length in range(1, min(self._longest, len(text) + 1))
        )

    def is_ended_by(self, text: str) -> bool:
        """Whether the text starts with the end of a control string."""
        return any(text[:length] in self._ends for length in range(1, min(self._longest, len(text) + 1)))


# Private-use characters of the basic plane, then of the last plane: no text uses all of them.
_PRIVATE_CHARACTERS = (*range(0xE000, 0xF900), *range(0x100000, 0x10FFFE))


def _segments(text: str, real: list[tuple[int, int]], plain: list[int]) -> list[Segment]:
    """Cuts a text around supplied control strings.

    A plain segment reaches from one real control token to the next, as the tokenizer would cut it: merges at
    the borders of the supplied string are those of ordinary text.
    """
    starts, ends = [start for start, _ in real], [end for _, end in real]
    segments: list[Segment] = []
    position = 0
    for place in plain:
        if place < position:
            continue
        index = bisect_right(ends, place)
        left = ends[index - 1] if index else 0
        right = starts[index] if index < len(starts) else len(text)
        if left > position:
            segments.append(Segment(text[position:left], is_plain=False))
        segments.append(Segment(text[left:right], is_plain=True))
        position = right
    if position < len(text):
        segments.append(Segment(text[position:], is_plain=False))
    return segments


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


def _is_closing(control: str) -> bool:
    return control.startswith("</")


def _strings(value: Any) -> Iterator[str]:
    """Every string in a JSON value, keys included."""
    if isinstance(value, str):
        yield clean(value)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


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
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
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
