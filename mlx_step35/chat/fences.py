"""Where in Markdown a text stands: at the start of a line, or in code, where a call is an example."""

import re

# Enough to tell what kind of line it is; the rest of a long line is not kept.
_MAX_PREFIX = 200
_FENCE = re.compile(
    r"[ \t]*(?:(?:>|[-*+]|[0-9]{1,9}[.)])[ \t]*)*(?P<marks>`{3,}|~{3,})(?P<info>.*)", re.DOTALL
)


class LineTracker:
    """Follows text line by line."""

    def __init__(self) -> None:
        self._line = ""
        self._ticks = 0
        self._last = "\n"
        self._fence = ""
        self._is_span = False

    @property
    def is_line_start(self) -> bool:
        """Nothing but blanks since the last newline or call."""
        return not self._line.strip()

    @property
    def is_code(self) -> bool:
        """Inside a fenced block, or directly behind the tick that opens inline code."""
        if self._fence:
            # Text may be glued to the fence's end, as calls are to any text.
            return not self._closes_fence()
        return self._is_span or bool(self._opened_fence()) or (self._last == "`" and self._ticks % 2 == 1)

    def feed(self, text: str) -> None:
        if self._is_span and "`" in text:
            self._is_span = False
        *lines, rest = text.split("\n")
        for line in lines:
            self._extend(line)
            self._end_line()
        self._extend(rest)

    def enter_code(self) -> None:
        """Markup was found inside code: inline code then lasts until its tick, over line ends too."""
        self._is_span = not self._fence and not self._opened_fence()

    def start_line(self) -> None:
        """A call ended: what follows counts as a new line."""
        if not self._fence:
            self._line, self._ticks, self._last = "", 0, "\n"

    def _extend(self, text: str) -> None:
        if not text:
            return
        self._line += text[: _MAX_PREFIX - len(self._line)] if len(self._line) < _MAX_PREFIX else ""
        if "`" in text:
            # Runs, not ticks: a span may open with two.
            runs = len(re.findall("`+", text))
            self._ticks += runs - (self._last == "`" and text[0] == "`")
        self._last = text[-1]

    def _end_line(self) -> None:
        if not self._line.strip():
            self._is_span = False
        if self._fence:
            if self._closes_fence():
                self._fence = ""
        else:
            self._fence = self._opened_fence()
        self._line, self._ticks, self._last = "", 0, "\n"

    def _opened_fence(self) -> str:
        """The marks of the fence this line opens; a line with more ticks behind is inline code."""
        match = _FENCE.fullmatch(self._line)
        if match is None or (match["marks"][0] == "`" and "`" in match["info"]):
            return ""
        return match["marks"]

    def _closes_fence(self) -> bool:
        match = _FENCE.fullmatch(self._line)
        if match is None or match["info"].strip():
            return False
        return match["marks"].startswith(self._fence)
