"""Which saved states are prefixes of a prompt: a radix tree over token ids. Pure, no arrays of the model.

A boundary is a position with something stored there; a prompt can be resumed at the longest boundary at or
before the point where it leaves everything known. Conversations and branches share the nodes of their
common part, so the tree's size is that of the distinct tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

Value = TypeVar("Value")
TokenArray = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Match(Generic[Value]):
    """What is known of a prompt.

    `common` tokens of it lead to some boundary. `found` is the token stored after them and `given` the
    prompt's: the reason why nothing longer is usable, None where one of the two ends. `position` and `value`
    are the longest usable boundary, 0 and None if there is none.
    """

    common: int
    found: int | None
    given: int | None
    position: int
    value: Value | None


class PrefixIndex(Generic[Value]):
    """Values at token prefixes, one per prefix."""

    def __init__(self) -> None:
        self._root: _Node[Value] = _Node(as_tokens(()), None)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def insert(self, tokens: Sequence[int] | TokenArray, value: Value) -> None:
        """Store `value` at the end of `tokens`, in place of what was there."""
        node = self._node_at(as_tokens(tokens))
        self._count += node.value is None
        node.value = value

    def get(self, tokens: Sequence[int] | TokenArray) -> Value | None:
        """What is stored at exactly these tokens."""
        ids = as_tokens(tokens)
        *_, (node, reached, inside) = self._walk(ids)
        return node.value if reached == len(ids) and inside == len(node.edge) else None

    def remove(self, tokens: Sequence[int] | TokenArray) -> None:
        """Forget what is stored at exactly these tokens, which must be there."""
        ids = as_tokens(tokens)
        *_, (node, reached, inside) = self._walk(ids)
        if reached != len(ids) or inside != len(node.edge) or node.value is None:
            raise KeyError(f"nothing is stored at these {len(ids)} tokens")
        node.value = None
        self._count -= 1
        _prune(node)

    def find(
        self,
        tokens: Sequence[int] | TokenArray,
        limit: int | None = None,
        usable: Callable[[Value], bool] = lambda value: True,
    ) -> Match[Value]:
        """The longest usable boundary that is a prefix of `tokens` and at most `limit` long."""
        ids = as_tokens(tokens)
        longest = len(ids) if limit is None else limit
        best: tuple[int, Value | None] = (0, None)
        for node, reached, inside in self._walk(ids):
            value = node.value if inside == len(node.edge) and reached <= longest else None
            if value is not None and usable(value):
                best = (reached, value)
        found = int(node.edge[inside]) if inside < len(node.edge) else node.some_child_token
        given = int(ids[reached]) if reached < len(ids) else None
        return Match(reached, found, given, *best)

    def items(self) -> Iterator[tuple[int, int, Value]]:
        """Every boundary: its position, that of the next shorter one on its path (or 0), and its value."""
        todo = [(self._root, 0, 0)]
        while todo:
            node, start, previous = todo.pop()
            position = start + len(node.edge)
            if node.value is not None:
                yield position, previous, node.value
                previous = position
            todo += [(child, position, previous) for child in node.children.values()]

    def _walk(self, ids: TokenArray) -> Iterator[tuple["_Node[Value]", int, int]]:
        """The path of `ids`: each node with the tokens matched so far, and how many of them on its edge."""
        node, reached = self._root, 0
        yield node, 0, 0
        while reached < len(ids) and (child := node.children.get(int(ids[reached]))) is not None:
            inside = common_length(child.edge, ids[reached:])
            reached += inside
            node = child
            yield node, reached, inside
            if inside < len(child.edge):
                return

    def _node_at(self, ids: TokenArray) -> "_Node[Value]":
        """The node that ends exactly at `ids`, made and cut out of a longer one where needed."""
        *_, (node, reached, inside) = self._walk(ids)
        if inside < len(node.edge):
            node = _split(node, inside)
        if reached < len(ids):
            # A copy, so that the node does not keep a longer prompt alive.
            child: _Node[Value] = _Node(ids[reached:].copy(), node)
            node.children[int(child.edge[0])] = child
            node = child
        return node


def as_tokens(tokens: Sequence[int] | TokenArray) -> TokenArray:
    """Token ids as the array type of this package; no copy if they are one."""
    return np.asarray(tokens, dtype=np.int32)


def common_length(first: TokenArray, second: TokenArray) -> int:
    """How many tokens two sequences share at their start."""
    length = min(len(first), len(second))
    different = first[:length] != second[:length]
    return int(different.argmax()) if different.any() else length


@dataclass(slots=True, eq=False)
class _Node(Generic[Value]):
    """The end of a run of tokens, `edge`, that follows the parent's end."""

    edge: TokenArray
    parent: "_Node[Value] | None"
    value: Value | None = None
    children: dict[int, "_Node[Value]"] = field(default_factory=dict)

    @property
    def some_child_token(self) -> int | None:
        return next(iter(self.children), None)


def _split(node: _Node[Value], length: int) -> _Node[Value]:
    """Cut a node in two; returns the new upper one, which ends `length` tokens into the edge."""
    assert node.parent is not None and 0 < length < len(node.edge)
    upper: _Node[Value] = _Node(node.edge[:length].copy(), node.parent)
    node.parent.children[int(upper.edge[0])] = upper
    node.edge = node.edge[length:].copy()
    node.parent = upper
    upper.children[int(node.edge[0])] = node
    return upper


def _prune(node: _Node[Value]) -> None:
    """Remove a node without a value if nothing hangs on it, or join it with its only child."""
    while node.parent is not None and node.value is None and not node.children:
        del node.parent.children[int(node.edge[0])]
        node = node.parent
    if node.parent is not None and node.value is None and len(node.children) == 1:
        (child,) = node.children.values()
        child.edge = np.concatenate([node.edge, child.edge])
        child.parent = node.parent
        node.parent.children[int(child.edge[0])] = child
