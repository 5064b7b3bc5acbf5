"""The output parser: what the model writes becomes reasoning, content and tool calls.

The generation starts inside the reasoning, which ends at the first `</think>`, wherever that is. One state
machine serves whole and streamed text; the deltas of a call start only when its end is certain, so that a
call that is cut off leaves nothing a client would have to repair.
"""

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from mlx_step35.chat.arguments import Toolbox
from mlx_step35.chat.deltas import ContentDelta as ContentDelta
from mlx_step35.chat.deltas import Delta as Delta
from mlx_step35.chat.deltas import ReasoningDelta as ReasoningDelta
from mlx_step35.chat.deltas import ToolCallArguments as ToolCallArguments
from mlx_step35.chat.deltas import ToolCallStart as ToolCallStart
from mlx_step35.chat.scanner import Call, CallScanner, Dropped, Event, Text

THINK_OPENER = "<think>"
THINK_CLOSER = "</think>"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A finished call; `arguments` is JSON text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ParsedOutput:
    """A finished answer. `unfinished` is the text of a call that max_tokens cut off: not content, kept."""

    content: str | None
    reasoning: str | None
    tool_calls: tuple[ToolCall, ...]
    finish_reason: str
    unfinished: str = ""


class Parser(Protocol):
    """What a text stream needs of a parser."""

    @property
    def is_reasoning(self) -> bool: ...
    @property
    def result(self) -> ParsedOutput: ...
    def feed(self, text: str) -> list[Delta]: ...
    def close(self, finish_reason: str) -> list[Delta]: ...


def parse_output(
    text: str,
    tools: Sequence[Mapping[str, Any]] | None = None,
    finish_reason: str = "stop",
    *,
    starts_in_reasoning: bool = True,
) -> ParsedOutput:
    """Parses a whole generation: the text behind the prompt's `<think>` newline, without the end token."""
    parser = OutputParser(tools, starts_in_reasoning)
    parser.feed(text)
    parser.close(finish_reason)
    return parser.result


def new_call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


class OutputParser:
    """Parses a generation piece by piece.

    Args:
        tools: the request's tools as sent; without any, markup of calls is plain text.
        starts_in_reasoning: whether the prompt ended inside a thinking block.
        new_id: makes the id of a call.
    """

    def __init__(
        self,
        tools: Sequence[Mapping[str, Any]] | None = None,
        starts_in_reasoning: bool = True,
        new_id: Callable[[], str] = new_call_id,
    ) -> None:
        self._toolbox = Toolbox(tools)
        self._new_id = new_id
        self._state: Literal["start", "reasoning", "answer"] = "start"
        self._starts_in_reasoning = starts_in_reasoning
        self._scanner = CallScanner(self._toolbox)
        # Text whose meaning is still open: blanks before a first tag, then the beginning of a tag.
        self._blanks: list[str] = []
        self._tail = ""
        # Calls at the end of a thinking block that may yet prove to be closed, and the blanks behind them.
        self._tentative: list[Event] = []
        self._skips_newline = False
        self._reasoning = _Reasoning()
        self._content = _Content()
        self._calls: list[ToolCall] = []
        self._unfinished = ""
        self._finish_reason = ""
        self._deltas: list[Delta] = []
        # Characters fed, and those of them up to the end of the newest event of the answer.
        self._num_fed = 0
        self._position: int | None = None

    @property
    def is_reasoning(self) -> bool:
        """Whether the text fed so far ended inside a thinking block."""
        return self._state == "reasoning" or (self._state == "start" and self._starts_in_reasoning)

    @property
    def result(self) -> ParsedOutput:
        """What has been parsed; final after `close`."""
        return ParsedOutput(
            content=self._content.text,
            reasoning=self._reasoning.text,
            tool_calls=tuple(self._calls),
            finish_reason=self._finish_reason,
            unfinished=self._unfinished,
        )

    def feed(self, text: str) -> list[Delta]:
        """Takes generated text; returns what has become certain."""
        self._num_fed += len(text)
        if self._state == "start":
            text = self._feed_start(text)
        if self._state == "reasoning":
            text = self._feed_reasoning(text)
        if self._state == "answer":
            self._feed_answer(text)
        return self._drain()

    def close(self, finish_reason: str = "stop") -> list[Delta]:
        """Ends the text. "stop" is a normal end, after which lost closers are forgiven; "length" a cut."""
        is_complete = finish_reason in ("stop", "tool_calls")
        if self._state == "start":
            self._leave_start("reasoning" if self._starts_in_reasoning else "answer")
        if self._state == "reasoning":
            self._close_reasoning(is_complete)
        else:
            self._answer_events(self._scanner.close(is_complete=is_complete))
        self._finish_reason = finish_reason
        if is_complete:
            self._finish_reason = "tool_calls" if self._calls else "stop"
        return self._drain()

    def _feed_start(self, text: str) -> str:
        """Waits until it is clear whether the model repeats the opener; returns what is left to parse."""
        if not self._tail:
            stripped = text.lstrip()
            self._blanks.append(text[: len(text) - len(stripped)])
            text = stripped
        self._tail += text
        if len(self._tail) < len(THINK_OPENER) and THINK_OPENER.startswith(self._tail):
            return ""
        if self._tail.startswith(THINK_OPENER):
            text, self._tail, self._blanks = self._tail[len(THINK_OPENER) :], "", []
            self._state = "reasoning"
            return text
        text, self._tail = self._tail, ""
        self._leave_start("reasoning" if self._starts_in_reasoning else "answer", text)
        return ""

    def _leave_start(self, state: Literal["reasoning", "answer"], text: str = "") -> None:
        text = "".join(self._blanks) + self._tail + text
        self._blanks, self._tail, self._state = [], "", state
        if state == "reasoning":
            text = self._feed_reasoning(text)
        if self._state == "answer":
            self._feed_answer(text)

    def _feed_reasoning(self, text: str) -> str:
        """Thinks on; returns what stands behind the closer, if that has come."""
        text = self._tail + text
        end = text.find(THINK_CLOSER)
        if end < 0:
            keep = _length_of_partial(text, THINK_CLOSER)
            self._tail = text[len(text) - keep :]
            self._think(text[: len(text) - keep])
            return ""
        self._think(text[:end])
        self._release_tentative()
        self._emit(self._reasoning.feed(self._scanner.abort()))
        self._reasoning.end()
        self._scanner = CallScanner(self._toolbox)
        self._tail, self._state, self._skips_newline = "", "answer", True
        return text[end + len(THINK_CLOSER) :]

    def _think(self, text: str) -> None:
        if not self._toolbox:
            self._emit(self._reasoning.feed(text))
            return
        for event in self._scanner.feed(text):
            self._think_event(event)

    def _think_event(self, event: Event) -> None:
        """A call in a thinking block can be meant only if the text ends with it; until then it is held."""
        is_call = isinstance(event, Call) and event.name in self._toolbox
        if is_call or (self._tentative and not event.raw.strip()):
            self._tentative.append(event)
        else:
            self._release_tentative()
            self._emit(self._reasoning.feed(event.raw))

    def _release_tentative(self) -> None:
        self._emit(self._reasoning.feed("".join(event.raw for event in self._tentative)))
        self._tentative = []

    def _close_reasoning(self, is_complete: bool) -> None:
        """The block was never closed. The model is known to call from there: calls at the end are meant."""
        self._think(self._tail)
        self._tail = ""
        for event in self._scanner.close(is_complete=is_complete):
            self._think_event(event)
        if is_complete and self._tentative:
            self._reasoning.end()
            self._state = "answer"
            self._answer_events(self._tentative)
        else:
            self._release_tentative()
            self._emit(self._reasoning.flush())

    def _feed_answer(self, text: str) -> None:
        if not text:
            return
        if self._skips_newline:
            text = text.removeprefix("\n")
            self._skips_newline = False
        if self._position is None:
            self._position = self._num_fed - len(text)
        if not self._toolbox:
            self._feed_content(text)
            return
        self._answer_events(self._scanner.feed(text))

    def _feed_content(self, text: str) -> None:
        """Takes the next of the answer's text."""
        self._position = (self._position or 0) + len(text)
        self._emit(self._content.feed(text, self._position))

    def _answer_events(self, events: Sequence[Event]) -> None:
        for event in events:
            match event:
                case Text(raw):
                    self._feed_content(raw)
                case Call(raw):
                    self._position = (self._position or 0) + len(raw)
                    self._content.end_piece()
                    self._emit_call(event)
                case Dropped(raw):
                    self._position = (self._position or 0) + len(raw)
                    self._content.end_piece()
                    self._unfinished += raw

    def _emit_call(self, call: Call) -> None:
        arguments = self._toolbox.arguments(call.name, call.parameters)
        tool_call = ToolCall(self._new_id(), call.name, arguments)
        index = len(self._calls)
        self._calls.append(tool_call)
        self._deltas += [
            ToolCallStart(index, tool_call.id, tool_call.name),
            ToolCallArguments(index, tool_call.arguments),
        ]

    def _emit(self, delta: Delta | None) -> None:
        if delta is None:
            return
        last = self._deltas[-1] if self._deltas else None
        if isinstance(delta, ContentDelta) and isinstance(last, ContentDelta) and _is_next(last, delta):
            self._deltas[-1] = ContentDelta(last.text + delta.text, last.start)
        elif isinstance(delta, ReasoningDelta) and isinstance(last, ReasoningDelta):
            self._deltas[-1] = ReasoningDelta(last.text + delta.text)
        else:
            self._deltas.append(delta)

    def _drain(self) -> list[Delta]:
        deltas, self._deltas = self._deltas, []
        return deltas


class PlainParser:
    """For raw completions: all text is content, to the last blank."""

    is_reasoning = False

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._num_fed = 0
        self._finish_reason = ""

    @property
    def result(self) -> ParsedOutput:
        return ParsedOutput("".join(self._pieces), None, (), self._finish_reason)

    def feed(self, text: str) -> list[Delta]:
        if not text:
            return []
        self._pieces.append(text)
        self._num_fed += len(text)
        return [ContentDelta(text, self._num_fed - len(text))]

    def close(self, finish_reason: str = "stop") -> list[Delta]:
        self._finish_reason = finish_reason
        return []


class _Reasoning:
    """The thinking: blank thinking is none, and the newline before the closer belongs to the tag."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._held: list[str] = []

    @property
    def text(self) -> str | None:
        return "".join(self._pieces) or None

    def feed(self, text: str) -> ReasoningDelta | None:
        if not self._pieces and not text.strip():
            self._held.append(text)
            return None
        if not text:
            return None
        text = "".join(self._held) + text
        self._held = ["\n"] if text.endswith("\n") else []
        return self._add(text.removesuffix("\n"))

    def end(self) -> None:
        self._held = []

    def flush(self) -> ReasoningDelta | None:
        """At an end without closer the newline is text."""
        text = "".join(self._held) if self._pieces else ""
        self._held = []
        return self._add(text)

    def _add(self, text: str) -> ReasoningDelta | None:
        if not text:
            return None
        self._pieces.append(text)
        return ReasoningDelta(text)


class _Content:
    """The text around calls: a piece that is blank is dropped, every other is kept to the last blank."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._blanks: list[str] = []
        self._is_open = False

    @property
    def text(self) -> str | None:
        return "".join(self._pieces) or None

    def feed(self, text: str, end: int) -> ContentDelta | None:
        """`end` is where the text ends in all that was generated; blanks held back stand in front of it."""
        if not self._is_open:
            if not text.strip():
                self._blanks.append(text)
                return None
            text = "".join(self._blanks) + text
            self._blanks, self._is_open = [], True
        if not text:
            return None
        self._pieces.append(text)
        return ContentDelta(text, end - len(text))

    def end_piece(self) -> None:
        self._blanks, self._is_open = [], False


def _is_next(last: ContentDelta, delta: ContentDelta) -> bool:
    return last.start + len(last.text) == delta.start


def _length_of_partial(text: str, tag: str) -> int:
    """Length of the longest end of the text that may be the beginning of the tag."""
    for length in range(min(len(text), len(tag) - 1), 0, -1):
        if text.endswith(tag[:length]):
            return length
    return 0
