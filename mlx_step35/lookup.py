"""Prompt-lookup drafts: when the newest tokens occurred before, what followed them then is a good guess.

Copying a file, applying an edit or repeating a tool call is mostly this. Pure: token ids in, token ids out.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# Shorter matches are mostly chance; the controller learns what longer ones are worth.
MIN_MATCH = 3
# Beyond this a longer match says nothing more.
MAX_MATCH = 32
# Only the newest occurrences of an n-gram are compared, so that a prompt of one repeated line stays cheap.
MAX_CANDIDATES = 8


@dataclass(frozen=True, slots=True)
class LookupProposal:
    """Tokens that followed the longest recent match, and how many tokens matched before them."""

    tokens: tuple[int, ...]
    match_length: int


class LookupIndex:
    """Every n-gram of a growing token sequence, by the positions behind it."""

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], list[int]] = {}
        self.extend(tokens)

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Append tokens; the newest n-gram is indexed once a token follows it, so it never finds itself."""
        for token in tokens:
            if len(self._tokens) >= MIN_MATCH:
                self._ends.setdefault(tuple(self._tokens[-MIN_MATCH:]), []).append(len(self._tokens))
            self._tokens.append(token)

    def propose(self, limit: int) -> LookupProposal | None:
        """Up to `limit` tokens behind the longest match of the newest ones; of equal matches the most recent.

        A match that runs into the present continues periodically: after "a b c a b c" comes "a b c".
        """
        if limit < 1:
            return None
        ends = self._ends.get(tuple(self._tokens[-MIN_MATCH:]), [])
        best_end, best_length = 0, 0
        for end in ends[: -MAX_CANDIDATES - 1 : -1]:
            length = self._match_length(end)
            if length > best_length:
                best_end, best_length = end, length
        if best_length == 0:
            return None
        period = len(self._tokens) - best_end
        known = self._tokens[best_end : best_end + limit]
        tokens = [known[index % period] for index in range(limit)]
        return LookupProposal(tuple(tokens), best_length)

    def _match_length(self, end: int) -> int:
        """How many tokens before `end` equal the newest ones."""
        tokens: Sequence[int] = self._tokens
        longest = min(MAX_MATCH, end)
        length = MIN_MATCH
        while length < longest and tokens[end - 1 - length] == tokens[-1 - length]:
            length += 1
        return length
