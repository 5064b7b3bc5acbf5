"""The radix tree against a list of prefixes searched by brute force."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_step35.prompt_cache.index import PrefixIndex, common_length

TOKENS = st.lists(st.integers(0, 2), max_size=12)


def brute_force(
    stored: dict[tuple[int, ...], str], prompt: list[int], limit: int
) -> tuple[int, int, str | None]:
    """Common tokens, usable position and its value."""
    common = max((shared(prefix, prompt) for prefix in stored), default=0)
    usable = [p for p in stored if len(p) <= limit and tuple(prompt[: len(p)]) == p]
    best = max(usable, key=len, default=None)
    return common, len(best or ()), None if best is None else stored[best]


def shared(first: tuple[int, ...], second: list[int]) -> int:
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


@given(st.lists(st.tuples(st.booleans(), TOKENS), max_size=30), TOKENS, st.integers(0, 12))
def test_equals_brute_force(edits: list[tuple[bool, list[int]]], prompt: list[int], limit: int) -> None:
    index: PrefixIndex[str] = PrefixIndex()
    stored: dict[tuple[int, ...], str] = {}
    for number, (insert, tokens) in enumerate(edits):
        key = tuple(tokens)
        if insert:
            index.insert(tokens, str(number))
            stored[key] = str(number)
        elif key in stored:
            index.remove(tokens)
            del stored[key]
        else:
            with pytest.raises(KeyError):
                index.remove(tokens)
    match = index.find(prompt, limit)
    assert (match.common, match.position, match.value) == brute_force(stored, prompt, limit)
    assert len(index) == len(stored)
    assert all(index.get(key) == value for key, value in stored.items())
    assert sorted(index.items()) == sorted(
        (
            len(key),
            max((len(other) for other in stored if other == key[: len(other)] != key), default=0),
            value,
        )
        for key, value in stored.items()
    )


def test_says_where_and_why_a_prompt_leaves() -> None:
    index: PrefixIndex[str] = PrefixIndex()
    index.insert([1, 2, 3], "system")
    index.insert([1, 2, 3, 4, 5, 6], "first")
    match = index.find([1, 2, 3, 4, 9, 6, 7])
    assert (match.common, match.found, match.given) == (4, 5, 9)
    assert (match.position, match.value) == (3, "system")
    ended = index.find([1, 2, 3, 4])
    assert (ended.common, ended.found, ended.given, ended.position) == (4, 5, None, 3)
    beyond = index.find([1, 2, 3, 4, 5, 6, 8])
    assert (beyond.common, beyond.found, beyond.given, beyond.position) == (6, None, 8, 6)
    unknown = index.find([8])
    assert (unknown.common, unknown.found, unknown.given, unknown.position) == (0, 1, 8, 0)


def test_a_limit_keeps_a_token_to_run() -> None:
    index: PrefixIndex[str] = PrefixIndex()
    index.insert([1, 2], "short")
    index.insert([1, 2, 3], "whole")
    match = index.find([1, 2, 3], limit=2)
    assert (match.common, match.value) == (3, "short")


def test_common_parts_are_stored_once() -> None:
    index: PrefixIndex[int] = PrefixIndex()
    rng = random.Random(0)
    system = [rng.randrange(100) for _ in range(5_000)]
    for branch in range(50):
        index.insert([*system, branch, 1, 2], branch)
    assert stored_tokens(index) == 5_000 + 50 * 3
    for branch in range(49):
        index.remove([*system, branch, 1, 2])
    assert stored_tokens(index) == 5_003
    index.remove([*system, 49, 1, 2])
    assert stored_tokens(index) == 0


def test_common_length() -> None:
    def length(first: list[int], second: list[int]) -> int:
        return common_length(np.array(first, np.int32), np.array(second, np.int32))

    assert length([], [1]) == 0
    assert length([1, 2, 3], [1, 2]) == 2
    assert length([1, 2, 3], [1, 5, 3]) == 1
    assert length([4], [5]) == 0


def stored_tokens(index: PrefixIndex[int]) -> int:
    def below(node: object) -> int:
        return len(node.edge) + sum(below(child) for child in node.children.values())  # type: ignore[attr-defined]

    return below(index._root)
