"""Snapshots in memory, under a limit of bytes.

Counts every array once: a snapshot's own ones, and each block that some snapshot needs. Blocks lent by the
live cache count nothing here, because its memory is accounted elsewhere; they are counted before they are
copied out. What is cheapest to recompute for the memory it gives back, and was not used for long, goes first.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from mlx_step35.prompt_cache.index import Match, PrefixIndex, TokenArray
from mlx_step35.prompt_cache.records import Block, Rows, Snapshot


@dataclass(slots=True, eq=False)
class Entry:
    """A boundary: its snapshot if that is in memory, and the name of the file that holds it if one does."""

    tokens: TokenArray
    snapshot: Snapshot | None = None
    saved: str | None = None
    last_used: int = 0


class PromptCacheStore:
    """Snapshots by the tokens they cover, at most `limit_bytes` of them."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.nbytes = 0
        self.num_evicted = 0
        self._index: PrefixIndex[Entry] = PrefixIndex()
        self._blocks: dict[bytes, Block] = {}
        self._clock = 0

    def __len__(self) -> int:
        """Boundaries that can be resumed, in memory or on disk."""
        return len(self._index)

    def find(self, tokens: TokenArray, limit: int) -> Match[Entry]:
        """The longest boundary within the first `limit` tokens; counts as a use of it."""
        self._clock += 1
        match = self._index.find(tokens, limit)
        if match.value is not None:
            match.value.last_used = self._clock
        return match

    def find_in_memory(self, tokens: TokenArray, limit: int) -> Match[Entry]:
        """As `find`, without the boundaries that are only on disk."""
        match = self._index.find(tokens, limit, lambda entry: entry.snapshot is not None)
        if match.value is not None:
            match.value.last_used = self._clock
        return match

    def touch(self, tokens: TokenArray) -> bool:
        """Whether a snapshot of exactly these tokens is in memory; counts as a use of it."""
        entry = self._index.get(tokens)
        if entry is None or entry.snapshot is None:
            return False
        entry.last_used = self._clock
        return True

    def on_path(self, tokens: TokenArray) -> list[Snapshot]:
        """The snapshots in memory of every prefix of these tokens."""
        snapshots = [entry.snapshot for _, _, entry in self._index.items() if entry.snapshot is not None]
        return [
            snapshot
            for snapshot in snapshots
            if snapshot.position <= len(tokens) and (snapshot.tokens == tokens[: snapshot.position]).all()
        ]

    def block(self, key: bytes) -> Block | None:
        """The block of that key, if some snapshot holds it."""
        return self._blocks.get(key)

    def add(self, snapshot: Snapshot) -> bool:
        """Keep a snapshot, at the cost of others; False, and nothing done, if it alone is above the limit."""
        if snapshot.nbytes + sum(block.nbytes for block in snapshot.blocks) > self.limit_bytes:
            return False
        for block in snapshot.blocks:
            self.nbytes += 0 if block.references else block.nbytes
            self._blocks[block.key] = block
            block.references += 1
        self.nbytes += snapshot.nbytes
        entry = self._index.get(snapshot.tokens)
        if entry is None:
            entry = Entry(snapshot.tokens)
            self._index.insert(snapshot.tokens, entry)
        elif entry.snapshot is not None:
            self._release(entry)
        entry.snapshot, entry.last_used = snapshot, self._clock
        self._evict_while(lambda: self.nbytes > self.limit_bytes, keep=(entry,))
        return True

    def add_saved(self, tokens: TokenArray, name: str) -> None:
        """Remember that the file `name` holds the snapshot of these tokens."""
        entry = self._index.get(tokens)
        if entry is None:
            entry = Entry(tokens)
            self._index.insert(tokens, entry)
        entry.saved = name

    def forget_saved(self, tokens: TokenArray) -> None:
        """The file of these tokens is gone or not to be trusted."""
        entry = self._index.get(tokens)
        if entry is not None:
            entry.saved = None
            self._drop_if_empty(entry)

    def claim(self, blocks: Sequence[Block], keep: Collection[Entry]) -> list[Block]:
        """Make room for the rows of these lent blocks; returns those that must be copied now, by `fill`.

        Snapshots are evicted until the rest fits, except those of `keep`, which must not need the blocks.
        """

        def lent() -> list[Block]:
            return [block for block in blocks if block.references and block.layers is None]

        self._evict_while(
            lambda: self.nbytes + sum(block.size for block in lent()) > self.limit_bytes, keep=keep
        )
        return lent()

    def fill(self, block: Block, layers: tuple[Rows, ...]) -> None:
        """Give a lent block arrays of its own; `claim` has made the room."""
        assert block.layers is None and block.references
        block.layers = layers
        self.nbytes += block.nbytes

    def lend(self, block: Block) -> None:
        """The live cache holds this block's rows now, so that its own arrays can go."""
        if block.references:
            self.nbytes -= block.nbytes
        block.layers = None

    def drop_lent(self) -> None:
        """Forget every snapshot that needs rows of the live cache, which is lost."""
        for _, _, entry in list(self._index.items()):
            if entry.snapshot and any(block.layers is None for block in entry.snapshot.blocks):
                self._evict(entry)

    def shrink(self, nbytes: int) -> None:
        """Evict until at most so many bytes are kept; the limit stays."""
        self._evict_while(lambda: self.nbytes > nbytes, keep=())

    def clear(self) -> None:
        """Forget every snapshot in memory."""
        for _, _, entry in list(self._index.items()):
            if entry.snapshot is not None:
                self._evict(entry)

    def _evict_while(self, over: Callable[[], bool], keep: Collection[Entry]) -> None:
        while over():
            entry = self._cheapest(keep)
            assert entry is not None, "what must be kept is above the limit"
            self._evict(entry)
            self.num_evicted += 1

    def _cheapest(self, keep: Collection[Entry]) -> Entry | None:
        """The snapshot that loses the fewest tokens per byte it gives back, weighed by its age."""
        candidates = (
            (_worth(entry, position - previous, self._clock), entry)
            for position, previous, entry in self._index.items()
            if entry.snapshot is not None and entry not in keep
        )
        return min(candidates, key=lambda pair: pair[0], default=(0.0, None))[1]

    def _evict(self, entry: Entry) -> None:
        self._release(entry)
        self._drop_if_empty(entry)

    def _release(self, entry: Entry) -> None:
        snapshot, entry.snapshot = entry.snapshot, None
        assert snapshot is not None
        self.nbytes -= snapshot.nbytes
        for block in snapshot.blocks:
            block.references -= 1
            if not block.references:
                del self._blocks[block.key]
                self.nbytes -= block.nbytes

    def _drop_if_empty(self, entry: Entry) -> None:
        if entry.snapshot is None and entry.saved is None:
            self._index.remove(entry.tokens)


def _worth(entry: Entry, lost_tokens: int, clock: int) -> float:
    """Tokens to recompute without this snapshot, per byte and per request since its last use.

    Lent blocks count in full: the snapshot will need their bytes once the live cache leaves its path.
    """
    assert entry.snapshot is not None
    freed = entry.snapshot.nbytes
    # Blocks of a path are shared from its start on, so the first shared one from the end ends the count.
    for block in reversed(entry.snapshot.blocks):
        if block.references > 1:
            break
        freed += block.size
    return lost_tokens / (max(freed, 1) * (clock - entry.last_used + 1))
