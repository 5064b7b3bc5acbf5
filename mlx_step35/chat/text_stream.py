"""From sampled tokens to deltas: detokenizer, output parser and stop strings in one object.

Stop strings are looked for in the content that the client sees, across tokens; neither thinking nor the
arguments of a call can end an answer. What may be the beginning of one is held back.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace

from mlx_step35.chat.output import ContentDelta, Delta, ParsedOutput, Parser
from mlx_step35.chat.tokenizer import Tokenizer


class TextStream:
    """One answer in the making.

    Args:
        tokenizer: what turns tokens into text.
        parser: what turns text into deltas; a `PlainParser` for raw completions.
        stop: strings that end the answer and are cut out of it.
    """

    def __init__(self, tokenizer: Tokenizer, parser: Parser, stop: Sequence[str] = ()) -> None:
        self._eos = frozenset(tokenizer.eos_token_ids)
        self._detokenizer = tokenizer.detokenizer()
        self._parser = parser
        self._stops = _StopStrings(stop) if stop else None
        self._content: list[str] = []
        self._finish_reason = ""
        self._origins = _Origins()
        self.reasoning_tokens = 0
        self.is_ended = False

    @property
    def stopped(self) -> bool:
        """Whether the answer is over: an end token or a stop string came. Later tokens are ignored."""
        return self.is_ended or self.stop_sequence is not None

    @property
    def stop_sequence(self) -> str | None:
        """The stop string that ended the answer."""
        return self._stops.found if self._stops else None

    @property
    def is_reasoning(self) -> bool:
        """Whether the newest token belonged to the thinking."""
        return self._parser.is_reasoning

    @property
    def result(self) -> ParsedOutput:
        """The whole answer; final after `finish`."""
        result = self._parser.result
        if self._stops is None:
            return result
        return replace(result, content="".join(self._content) or None)

    def push(self, token: int) -> list[Delta]:
        """Takes one token; returns what has become certain."""
        if self.stopped:
            return []
        if token in self._eos:
            self.is_ended = True
            return []
        # The token that closes the thinking is still part of it.
        self.reasoning_tokens += self._parser.is_reasoning
        text = self._detokenizer.add(token)
        self._origins.add_token(len(text))
        return self._visible(self._parser.feed(text))

    def finish(self, reason: str = "stop") -> list[Delta]:
        """Ends the answer: "stop", or "length" when it was cut. Returns what was held back."""
        if self.stop_sequence is not None:
            # Text behind a stop string is none, but calls in front of it count.
            self._parser.close("stop")
            return []
        text = self._detokenizer.finish()
        self._origins.add_text(len(text))
        deltas = self._visible(self._parser.feed(text))
        if self.stop_sequence is None:
            deltas += self._visible(self._parser.close(reason))
        if self.stop_sequence is None and self._stops:
            deltas += self._content_delta(self._stops.flush())
        return deltas

    def content_tokens(self) -> list[int]:
        """Which of the tokens pushed so far, by number, became content since this was last asked."""
        return self._origins.take()

    def _visible(self, deltas: list[Delta]) -> list[Delta]:
        """The deltas up to a stop string, without what may be the beginning of one."""
        self._origins.add_content(delta for delta in deltas if isinstance(delta, ContentDelta))
        if self._stops is None:
            self._origins.show(sum(len(delta.text) for delta in deltas if isinstance(delta, ContentDelta)))
            return deltas
        visible: list[Delta] = []
        for delta in deltas:
            if isinstance(delta, ContentDelta):
                visible += self._content_delta(self._stops.feed(delta.text))
            else:
                # A call stands between two pieces of text; a stop string does not reach across.
                visible += [*self._content_delta(self._stops.flush()), delta]
            if self.stopped:
                break
        return visible

    def _content_delta(self, text: str) -> list[Delta]:
        if not text:
            return []
        self._content.append(text)
        self._origins.show(len(text))
        return [ContentDelta(text)]


class _Origins:
    """From which tokens the content comes: those of thinking, calls and what is cut out are none of them.

    A token of which only a part is content counts as a whole.
    """

    def __init__(self) -> None:
        self._num_tokens = 0
        self._num_characters = 0
        # Tokens whose text is not known yet, for each is a part of the next character.
        self._parts: list[int] = []
        # Tokens with start and end of their text. Those that share a character share these.
        self._tokens: deque[tuple[int, int, int]] = deque()
        # Content that came, as start and end in the whole text, as far as it was not shown.
        self._content: deque[tuple[int, int]] = deque()
        self._found: list[int] = []

    def add_token(self, num_characters: int) -> None:
        self._parts.append(self._num_tokens)
        self._num_tokens += 1
        self.add_text(num_characters)

    def add_text(self, num_characters: int) -> None:
        """Characters that the newest tokens completed."""
        if num_characters:
            start, self._num_characters = self._num_characters, self._num_characters + num_characters
            self._tokens += [(number, start, self._num_characters) for number in self._parts]
            self._parts = []

    def add_content(self, deltas: Iterable[ContentDelta]) -> None:
        self._content += [(delta.start, delta.start + len(delta.text)) for delta in deltas]

    def show(self, num_characters: int) -> None:
        """So many more characters of the content are given out."""
        while num_characters:
            start, end = self._content.popleft()
            if end - start > num_characters:
                self._content.appendleft((start + num_characters, end))
                end = start + num_characters
            num_characters -= end - start
            self._find(start, end)

    def take(self) -> list[int]:
        found, self._found = self._found, []
        return found

    def _find(self, start: int, end: int) -> None:
        """The tokens of a stretch of content; those in front of it will not be asked for any more."""
        while self._tokens and self._tokens[0][1] < end:
            number, _, ends_at = self._tokens.popleft()
            if ends_at > start:
                self._found.append(number)


class _StopStrings:
    """Cuts text at the first of several strings."""

    def __init__(self, strings: Sequence[str]) -> None:
        assert all(strings), "an empty stop string would end every answer at once"
        self._strings = tuple(strings)
        self._longest = max(map(len, strings))
        self._held = ""
        self.found: str | None = None

    def feed(self, text: str) -> str:
        """The text that is certain to stand in front of any stop string."""
        text = self._held + text
        places = [(place, string) for string in self._strings if (place := text.find(string)) >= 0]
        if places:
            # The one that is complete first, as when the text comes character by character.
            place, self.found = min(places, key=lambda item: (item[0] + len(item[1]), item[0]))
            self._held = ""
            return text[:place]
        keep = self._partial(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        text, self._held = self._held, ""
        return text

    def _partial(self, text: str) -> int:
        """Length of the longest end of the text that begins a stop string."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            end = text[len(text) - length :]
            if any(string.startswith(end) for string in self._strings):
                return length
        return 0
