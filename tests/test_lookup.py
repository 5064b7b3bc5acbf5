"""Prompt lookup: the longest recent match, found incrementally."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_step35.lookup import MAX_CANDIDATES, MIN_MATCH, LookupIndex


def test_the_longest_match_wins() -> None:
    index = LookupIndex([7, 1, 2, 3, 4, 0, 9, 2, 3, 4, 5, 0, 7, 1, 2, 3, 4])
    proposal = index.propose(3)
    assert proposal is not None
    assert (proposal.tokens, proposal.match_length) == ((0, 9, 2), 5)


def test_of_equal_matches_the_most_recent_wins() -> None:
    index = LookupIndex([1, 2, 3, 4, 5, 1, 2, 3, 6, 7, 1, 2, 3])
    proposal = index.propose(2)
    assert proposal is not None and proposal.tokens == (6, 7)


def test_a_match_that_reaches_the_present_goes_on_periodically() -> None:
    proposal = LookupIndex([1, 2, 3, 1, 2, 3]).propose(7)
    assert proposal is not None and proposal.tokens == (1, 2, 3, 1, 2, 3, 1)


@pytest.mark.parametrize("tokens", [[], [1], [1, 2, 3], [1, 2, 3, 4, 5, 6], [1, 2, 1, 2]])
def test_without_a_match_nothing_is_proposed(tokens: list[int]) -> None:
    assert LookupIndex(tokens).propose(4) is None


def test_no_room_no_proposal() -> None:
    assert LookupIndex([1, 2, 3, 1, 2, 3]).propose(0) is None


def naive(tokens: list[int], limit: int) -> tuple[int, ...] | None:
    """Compare every earlier place, newest first, with a strictly longer match winning."""
    best_end, best = 0, MIN_MATCH - 1
    ends = [
        end for end in range(MIN_MATCH, len(tokens)) if tokens[end - MIN_MATCH : end] == tokens[-MIN_MATCH:]
    ]
    for end in ends[: -MAX_CANDIDATES - 1 : -1]:
        length = 0
        while length < min(end, 32) and tokens[end - 1 - length] == tokens[-1 - length]:
            length += 1
        if length > best:
            best_end, best = end, length
    if not best_end:
        return None
    text = list(tokens)
    for index in range(limit):
        text.append(text[best_end + index])
    return tuple(text[len(tokens) :])


@given(st.lists(st.integers(0, 2), max_size=60), st.integers(0, 60), st.integers(1, 15))
def test_equals_a_plain_search(tokens: list[int], split: int, limit: int) -> None:
    index = LookupIndex(tokens[:split])
    index.extend(tokens[split:])
    proposal = index.propose(limit)
    assert (proposal.tokens if proposal else None) == naive(tokens, limit)
