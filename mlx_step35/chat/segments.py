"""Rendered conversations in segments, and how supplied text is told from the template's own.

Text of users and tools may contain the model's control strings. They are marked before rendering, with
characters that occur nowhere else; afterwards the marks say which control strings in the rendered text were
supplied, and those are encoded as plain text.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from mlx_step35.chat.reading import clean
from mlx_step35.errors import RequestError

THINK_PROMPT = "<think>\n"


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
        if not self.segments or self.segments[-1].is_plain:
            return False
        return self.segments[-1].text.rstrip().endswith(THINK_PROMPT.strip())


class Marker:
    """Marks control strings in supplied text, so that a rendered text can be taken apart again.

    A closing tag gets its mark in front and every other string behind, so that templates which look at the
    outer ends of a text still see what they look for. A text that ends or starts inside a control string gets
    a mark at that edge: what the template prints beside it could complete the string.
    """

    def __init__(self, controls: "Controls | None", supplied: Any, source: str) -> None:
        self._controls = controls
        # Nearly always nothing supplied holds a control string, and then nothing is touched.
        self._is_needed = False
        if controls is None:
            return
        texts = list(_strings(supplied))
        if any(controls.concern(text) for text in texts):
            used = set(source).union(*map(set, texts))
            free = (chr(code) for code in _PRIVATE_CHARACTERS if chr(code) not in used)
            marks = list(islice(free, 3))
            if len(marks) < 3:
                raise RequestError(
                    "the messages use every private-use character, so control strings cannot be told apart",
                    "messages",
                )
            self._behind, self._before, self._edge = marks
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


class Controls:
    """The control strings of a tokenizer, and what can be part of one."""

    def __init__(self, strings: Sequence[str]) -> None:
        self.pattern = re.compile(_any_of(sorted(set(strings))))
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


# Private-use characters of the basic plane, then of the last plane: hardly a text uses all of them.
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


def _any_of(strings: Sequence[str]) -> str:
    """A pattern for sorted strings that prefers the longest, as tokenizers do.

    It branches by character: there may be hundreds of control strings, and text has many places where one
    could start.
    """
    branches: dict[str, list[str]] = {}
    for string in strings:
        if string:
            branches.setdefault(string[0], []).append(string[1:])
    if not branches:
        return ""
    pattern = "|".join(re.escape(first) + _any_of(rests) for first, rests in branches.items())
    return f"(?:{pattern}){'?' if '' in strings else ''}"
