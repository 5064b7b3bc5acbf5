"""Finds calls in the answer: one state machine for whole and streamed text.

It is lossless: the `raw` of its events joins to exactly the text fed. Nothing is decided before it is
certain, and no decision reads more than a tag ahead, so every way of cutting the text gives the same events
in linear time. A closer inside a value closes it only if what follows can follow a closer: files that a model
writes may contain the very tags it calls with.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Literal, cast

from mlx_step35.chat.arguments import Toolbox
from mlx_step35.chat.fences import LineTracker

OPENER: Final = "<tool_call>"
CLOSER: Final = "</tool_call>"
FUNCTION_CLOSER: Final = "</function>"
PARAMETER_CLOSER: Final = "</parameter>"

# Longer than any name; a tag that does not close by then is text.
_MAX_NAME = 256
_MAX_TAG = _MAX_NAME + len("<parameter=>")
_TAG = re.compile(
    rf"(?P<literal>{PARAMETER_CLOSER}|{FUNCTION_CLOSER}|{CLOSER}|{OPENER})"
    rf"|<(?P<kind>function|parameter)=(?P<name>[^>\n]{{1,{_MAX_NAME}}})>"
    rf"|<function[ \t]+(?P<slip>[^>\s]{{1,{_MAX_NAME}}})[ \t]*>"
)
_PARTIAL_NAME = re.compile(
    rf"<(?:function|parameter)=[^>\n]{{0,{_MAX_NAME}}}|<function[ \t][^>\n]{{0,{_MAX_NAME}}}"
)
_LITERALS = (PARAMETER_CLOSER, FUNCTION_CLOSER, CLOSER, OPENER, "<function=", "<parameter=")
_BLANK = re.compile(r"[ \t\r\n]*")

TagKind = Literal["</parameter>", "</function>", "</tool_call>", "<tool_call>", "function", "parameter"]
State = Literal["text", "opened", "parameters", "value", "lookahead", "closed", "after_bare"]


@dataclass(frozen=True, slots=True)
class Text:
    """Text outside calls, verbatim."""

    raw: str


@dataclass(frozen=True, slots=True)
class Call:
    """One complete call; values are still text."""

    raw: str
    name: str
    parameters: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Dropped:
    """Markup that belongs to no text: a stray closer, or a call that max_tokens cut off."""

    raw: str


Event = Text | Call | Dropped


@dataclass(frozen=True, slots=True)
class _Tag:
    kind: TagKind
    raw: str
    name: str = ""


@dataclass(slots=True)
class _Candidate:
    """What may become a call; `held` is all of its text so far."""

    held: list[str]
    is_wrapped: bool
    name: str = ""
    parameters: list[tuple[str, str]] = field(default_factory=list)
    parameter: str = ""
    value: list[str] = field(default_factory=list)
    # A closer inside a value and what followed it, until it is known whether it closes.
    chain: list[str] = field(default_factory=list)
    last_closer: TagKind = PARAMETER_CLOSER


class CallScanner:
    """Splits an answer into text and calls."""

    def __init__(self, toolbox: Toolbox) -> None:
        self._toolbox = toolbox
        self._lines = LineTracker()
        self._buffer = ""
        self._position = 0
        self._state: State = "text"
        self._candidate = _Candidate([], is_wrapped=False)
        self._events: list[Event] = []
        self._steps: dict[State, Callable[[], bool]] = {
            "text": self._in_text,
            "opened": self._in_opened,
            "parameters": self._in_parameters,
            "value": self._in_value,
            "lookahead": self._in_lookahead,
            "closed": self._in_closed,
            "after_bare": self._after_bare,
        }

    def feed(self, text: str) -> list[Event]:
        """Events that are certain once this text is known."""
        self._buffer = self._buffer[self._position :] + text
        self._position = 0
        while self._position < len(self._buffer) and self._steps[self._state]():
            pass
        return self._drain()

    def close(self, *, is_complete: bool) -> list[Event]:
        """Events of what was held. `is_complete`: the model ended by itself, so a lost closer is a slip."""
        rest = self._buffer[self._position :]
        if self._state in ("text", "after_bare"):
            self._emit_text(rest)
        elif is_complete and not rest and self._state in ("lookahead", "closed"):
            if self._state == "lookahead":
                self._end_value()
            self._finish("text")
        else:
            raw = self._held() + rest
            if is_complete:
                self._emit_text(raw)
            else:
                self._events.append(Dropped(raw))
        self._buffer, self._position, self._state = "", 0, "text"
        return self._drain()

    def abort(self) -> str:
        """Whatever was held back, as text; the scanner must not be used afterwards."""
        held = self._held() if self._state not in ("text", "after_bare") else ""
        return held + self._buffer[self._position :]

    # One method per state. Each looks at buffer[position:], which is never empty, and says whether it moved
    # on.

    def _in_text(self) -> bool:
        start = self._buffer.find("<", self._position)
        if start < 0:
            start = len(self._buffer)
        if start > self._position:
            self._emit_text(self._take(start))
            return True
        if self._lines.is_code:
            if self._buffer.startswith(OPENER, start):
                self._lines.enter_code()
            elif OPENER.startswith(self._buffer[start:]):
                return False
            self._emit_text(self._take(start + 1))
            return True
        tag = self._peek()
        if tag == "wait":
            if not self._may_open():
                self._emit_text(self._take(start + 1))
                return True
            return False
        if tag is not None and tag.kind == OPENER:
            self._candidate = _Candidate([self._take_tag(tag)], is_wrapped=True)
            self._state = "opened"
        elif (
            tag is not None
            and tag.kind == "function"
            and self._lines.is_line_start
            and tag.name in self._toolbox
        ):
            self._candidate = _Candidate([self._take_tag(tag)], is_wrapped=False, name=tag.name)
            self._state = "parameters"
        else:
            self._emit_text(self._take(start + 1))
        return True

    def _in_opened(self) -> bool:
        self._hold_blank()
        tag = self._peek()
        if tag == "wait":
            return False
        if tag is None or tag.kind != "function":
            return self._reject()
        self._candidate.held.append(self._take_tag(tag))
        self._candidate.name = tag.name
        self._state = "parameters"
        return True

    def _in_parameters(self) -> bool:
        self._hold_blank()
        tag = self._peek()
        if tag == "wait":
            return False
        candidate = self._candidate
        if tag is None or tag.kind == PARAMETER_CLOSER:
            return self._reject()
        if tag.kind == "parameter":
            candidate.held.append(self._take_tag(tag))
            candidate.parameter = tag.name
            candidate.value = []
            self._state = "value"
            return True
        if tag.kind == FUNCTION_CLOSER:
            candidate.held.append(self._take_tag(tag))
            if candidate.is_wrapped:
                self._state = "closed"
            else:
                self._finish("after_bare")
            return True
        if tag.kind == CLOSER:
            candidate.held.append(self._take_tag(tag))
            return self._finish("text")
        return self._finish_before(tag) if candidate.parameters else self._reject()

    def _in_value(self) -> bool:
        start = self._buffer.find("<", self._position)
        if start < 0:
            start = len(self._buffer)
        if start > self._position:
            self._candidate.value.append(self._take(start))
            return True
        tag = self._peek()
        if tag == "wait":
            return False
        candidate = self._candidate
        if tag is not None and tag.kind in (PARAMETER_CLOSER, FUNCTION_CLOSER, CLOSER):
            candidate.chain = [self._take_tag(tag)]
            candidate.last_closer = tag.kind
            self._state = "lookahead"
        elif tag is not None and tag.kind == "parameter" and self._starts_new_parameter(tag.name):
            self._end_value()
            self._state = "parameters"
        else:
            candidate.value.append(self._take(start + 1))
        return True

    def _in_lookahead(self) -> bool:
        candidate = self._candidate
        blank = self._take_blank()
        if blank:
            candidate.chain.append(blank)
        tag = self._peek()
        if tag == "wait":
            return False
        kind = tag.kind if tag is not None else None
        if tag is None or kind not in _FOLLOWERS[candidate.last_closer]:
            # It did not close: the closer was part of the value.
            candidate.value += candidate.chain
            candidate.chain = []
            self._state = "value"
            return True
        if kind == FUNCTION_CLOSER and candidate.is_wrapped:
            candidate.chain.append(self._take_tag(tag))
            candidate.last_closer = FUNCTION_CLOSER
            return True
        self._end_value()
        self._state = "parameters"
        if kind == "parameter" or kind == FUNCTION_CLOSER:
            return True
        if kind == CLOSER:
            candidate.held.append(self._take_tag(tag))
            return self._finish("text")
        return self._finish_before(tag)

    def _in_closed(self) -> bool:
        self._hold_blank()
        tag = self._peek()
        if tag == "wait":
            return False
        if tag is None or tag.kind not in _FOLLOWERS[FUNCTION_CLOSER]:
            return self._reject()
        if tag.kind == CLOSER:
            self._candidate.held.append(self._take_tag(tag))
            return self._finish("text")
        return self._finish_before(tag)

    def _after_bare(self) -> bool:
        """Behind a call without opener, where its closer may still come."""
        blank = self._take_blank()
        if blank:
            self._emit_text(blank)
        tag = self._peek()
        if tag == "wait":
            return False
        if tag is not None and tag.kind == CLOSER:
            self._events.append(Dropped(self._take_tag(tag)))
        self._state = "text"
        return True

    # Transitions.

    def _finish(self, state: State) -> bool:
        candidate = self._candidate
        self._events.append(Call(self._held(), candidate.name, tuple(candidate.parameters)))
        self._lines.start_line()
        self._state = state
        return True

    def _finish_before(self, tag: _Tag) -> bool:
        """Ends a call whose closers are missing where the next one starts."""
        is_wrapped = self._candidate.is_wrapped
        self._finish("text")
        if tag.kind == "function" and is_wrapped:
            self._candidate = _Candidate([], is_wrapped=True)
            self._state = "opened"
        return True

    def _reject(self) -> bool:
        self._emit_text(self._held())
        self._state = "text"
        return True

    def _end_value(self) -> None:
        """Adds the open parameter; a value loses exactly one newline at each end."""
        candidate = self._candidate
        value = "".join(candidate.value)
        candidate.held += [value, *candidate.chain]
        candidate.chain, candidate.value = [], []
        value = value.removeprefix("\n").removesuffix("\n")
        candidate.parameters.append((candidate.parameter, value))
        candidate.parameter = ""

    def _starts_new_parameter(self, name: str) -> bool:
        """Whether a parameter tag inside a value is the next parameter of a value that was never closed."""
        candidate = self._candidate
        if not candidate.value or not candidate.value[-1].endswith("\n"):
            return False
        given = {candidate.parameter, *(key for key, _ in candidate.parameters)}
        return name not in given and self._toolbox.declares(candidate.name, name)

    def _may_open(self) -> bool:
        """Whether a partial tag in text could become an opener: only then is it held back."""
        rest = self._buffer[self._position : self._position + len(OPENER)]
        return OPENER.startswith(rest) or (rest.startswith("<f"[: len(rest)]) and self._lines.is_line_start)

    # Reading.

    def _peek(self) -> _Tag | Literal["wait"] | None:
        """The tag at the position; "wait" if more text could make it one; None if it is none."""
        if self._position == len(self._buffer):
            return "wait"
        match = _TAG.match(self._buffer, self._position)
        if match is None:
            rest = self._buffer[self._position : self._position + _MAX_TAG]
            is_open = _PARTIAL_NAME.fullmatch(rest) or any(literal.startswith(rest) for literal in _LITERALS)
            return "wait" if is_open else None
        if match["literal"]:
            return _Tag(cast(TagKind, match["literal"]), match[0])
        if match["kind"] == "parameter":
            return _Tag("parameter", match[0], match["name"])
        if match["slip"]:
            return _Tag("function", match[0], match["slip"]) if match["slip"] in self._toolbox else None
        name = self._function_name(match["name"])
        return _Tag("function", match[0], name) if name.strip() else None

    def _function_name(self, name: str) -> str:
        """The name as declared, if only spaces or quotes keep it from being that."""
        bare = name.strip().strip("\"'")
        return bare if name not in self._toolbox and bare in self._toolbox else name

    def _take(self, end: int) -> str:
        text = self._buffer[self._position : end]
        self._position = end
        return text

    def _take_tag(self, tag: _Tag) -> str:
        return self._take(self._position + len(tag.raw))

    def _take_blank(self) -> str:
        match = _BLANK.match(self._buffer, self._position)
        assert match is not None
        return self._take(match.end())

    def _hold_blank(self) -> None:
        self._candidate.held.append(self._take_blank())

    def _held(self) -> str:
        candidate = self._candidate
        is_open = self._state in ("value", "lookahead")
        return "".join(
            [*candidate.held, *(candidate.value if is_open else ()), *(candidate.chain if is_open else ())]
        )

    def _emit_text(self, text: str) -> None:
        if text:
            self._lines.feed(text)
            self._events.append(Text(text))

    def _drain(self) -> list[Event]:
        events, self._events = self._events, []
        return events


# What may stand behind a closer inside a value for it to close; the end of the text may always.
_FOLLOWERS: dict[TagKind, frozenset[TagKind]] = {
    PARAMETER_CLOSER: frozenset({"parameter", FUNCTION_CLOSER, CLOSER, OPENER, "function"}),
    FUNCTION_CLOSER: frozenset({CLOSER, OPENER, "function"}),
    CLOSER: frozenset({OPENER}),
}
