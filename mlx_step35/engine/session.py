"""One mutable token timeline with its caches: the live cache, and what it gives to and takes from the store.

Every caller gives whole prompts; the session decides what to reuse. Around one generation:

    reuse = session.sync(prompt)                  # the cache now covers the first reuse.cached_tokens
    stops = session.stops(boundaries)             # where the prefill should pause and call session.reached()
    ...decode from there...
    session.finish()                              # or session.reset() if the cache cannot be trusted

Rows of full-attention layers stay in the live cache as long as it is on their path (see
`prompt_cache.records`), so extending a conversation copies nothing. When a prompt leaves the path, what
stored snapshots need of the part behind is copied out first.
"""

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from mlx_step35.cache import ModelCache
from mlx_step35.model import Model
from mlx_step35.prompt_cache.disk import DiskTier
from mlx_step35.prompt_cache.files import RecordError
from mlx_step35.prompt_cache.index import Match, TokenArray, as_tokens, common_length
from mlx_step35.prompt_cache.records import (
    BLOCK_TOKENS,
    Block,
    Snapshot,
    block_key,
    cut,
    restore,
    row_bytes,
    shrunk,
    take,
)
from mlx_step35.prompt_cache.store import Entry, PromptCacheStore

logger = logging.getLogger(__name__)

# Without boundaries in the prompt, a long prefill is saved this often.
DEFAULT_INTERVAL = 4096

# Boundaries nearer to the one before are not worth a snapshot: their tokens fit the pass that runs anyway.
MIN_DISTANCE = 16

Source = Literal["none", "live", "memory", "disk"]
Limit = Literal["nothing stored", "boundary", "difference", "whole prompt"]


@dataclass(frozen=True, slots=True)
class Reuse:
    """What a prompt could reuse, and why not more.

    `common_tokens` of the prompt are known; behind them `found` is the known token and `given` the prompt's
    (None where one of the two ends). `cached_tokens` is the boundary that was used.
    """

    prompt_tokens: int
    cached_tokens: int
    common_tokens: int
    found: int | None
    given: int | None
    source: Source

    @property
    def limited_by(self) -> Limit:
        """What kept the reused prefix from being longer."""
        if self.cached_tokens == self.prompt_tokens - 1:
            return "whole prompt"
        if self.common_tokens == 0:
            return "nothing stored"
        return "difference" if self.cached_tokens == self.common_tokens else "boundary"


class Session:
    """The live cache of a model and a store of earlier states; belongs to the thread that owns the arrays."""

    def __init__(
        self,
        model: Model,
        store: PromptCacheStore,
        disk: DiskTier | None = None,
        *,
        interval: int = DEFAULT_INTERVAL,
        block_tokens: int = BLOCK_TOKENS,
    ) -> None:
        self.store = store
        self.cache: ModelCache = model.make_cache()
        self._model = model
        self._disk = disk
        self._interval = interval
        self._block_tokens = block_tokens
        self._prompt = as_tokens(())
        self._stops: tuple[int, ...] = ()
        # The blocks of the cache's rows, from the first on, as far as snapshots needed them; all lent.
        self._blocks: list[Block] = []
        # What the prefill took so far, and when and where it was last looked at.
        self._prefill_s, self._prefill_tokens = 0.0, 0
        self._mark = 0.0, 0
        if disk is not None:
            for tokens, name in disk.boundaries():
                store.add_saved(tokens, name)

    def sync(self, tokens: Sequence[int]) -> Reuse:
        """Bring the cache to the longest usable prefix of a prompt; at least one token is left to run."""
        self._prompt = as_tokens(tokens)
        self._stops = ()
        is_done = False
        try:
            reuse = self._sync(self._prompt)
            is_done = True
        finally:
            if not is_done:
                self.reset()
        self._mark = time.perf_counter(), self.cache.offset
        return reuse

    def stops(self, boundaries: Iterable[int] = ()) -> tuple[int, ...]:
        """Offsets at which the prefill of the synced prompt must pause, for snapshots.

        `boundaries` are ends of turns; a long prompt gets regular ones between them, and the last token's
        start is one, so that the same prompt again has a single token to run.
        """
        start, limit = self.cache.offset, len(self._prompt) - 1
        chosen: list[int] = []
        regular = range(self._interval, limit, self._interval)
        for group in (sorted(boundaries), regular, [limit]):
            for stop in group:
                near = any(abs(stop - other) < MIN_DISTANCE for other in chosen)
                if start < stop <= limit and not near:
                    chosen.append(stop)
        self._stops = tuple(sorted(chosen))
        return self._stops

    def reached(self) -> None:
        """To be called whenever the prefill pauses: saves the state if this is one of the stops."""
        now_s, (then_s, offset) = time.perf_counter(), self._mark
        self._prefill_s += now_s - then_s
        self._prefill_tokens += self.cache.offset - offset
        if self.cache.offset in self._stops:
            self._save()
        self._mark = time.perf_counter(), self.cache.offset

    def finish(self) -> None:
        """Save the state after a generation; the newest token stays pending in the cache."""
        if self.cache.offset:
            self._save()

    def export(self) -> tuple[Snapshot, list[Snapshot]]:
        """The present state with all its rows, and the saved states on the way to it."""
        tokens = as_tokens(self.cache.tokens)
        return take(self.cache, tokens, ()), self.store.on_path(tokens)

    def close(self) -> None:
        """Write to the disk what waits for it, and let go of its directory."""
        if self._disk is not None:
            self._disk.close()

    def reset(self) -> None:
        """Give up the live cache, and the snapshots that need rows of it."""
        self.store.drop_lent()
        self._blocks = []
        self.cache = self._model.make_cache()

    def _sync(self, prompt: TokenArray) -> Reuse:
        limit = len(prompt) - 1
        known = as_tokens([*self.cache.tokens, *self.cache.pending])
        # Without room for any saved state nothing is kept from one prompt to the next.
        live = common_length(known, prompt) if self.store.limit_bytes else 0
        here = min(live, limit, self.cache.offset)
        reachable = here if self._can_go_back(self.cache.offset - here) else 0
        match, snapshot, source = self._find(prompt, limit, reachable)
        common, found, given = match.common, match.found, match.given
        if live > common:
            common, given = live, int(prompt[live]) if live < len(prompt) else None
            found = int(known[live]) if live < len(known) else None
        if here >= match.position and self._can_go_back(self.cache.offset - here):
            self._go_back(here)
            source = "live"
        elif match.value is not None and snapshot is not None:
            self._restore(match.value, snapshot, min(here, match.position))
        else:
            self._start_anew()
        if not self.cache.offset:
            source = "none"
        return Reuse(len(prompt), self.cache.offset, common, found, given, source)

    def _find(
        self, prompt: TokenArray, limit: int, reachable: int
    ) -> tuple[Match[Entry], Snapshot | None, Source]:
        """The longest boundary, loaded if it is on disk and that is quicker than running its tokens.

        The live cache itself can go to `reachable` tokens.
        """
        while True:
            self._poll()
            match = self.store.find(prompt, limit)
            entry = match.value
            if entry is None or entry.snapshot is not None:
                return match, entry.snapshot if entry else None, "memory"
            nearer = self.store.find_in_memory(prompt, limit)
            num_gained = match.position - max(nearer.position, reachable)
            if self._disk is None or entry.saved is None or not self._is_worth_loading(entry, num_gained):
                return nearer, nearer.value.snapshot if nearer.value else None, "memory"
            try:
                snapshot = self._disk.load(entry.saved, entry.tokens, self.store.block)
            except RecordError as error:
                logger.warning("the prompt cache skips a file: %s", error)
                continue
            self.store.add(snapshot)
            return match, snapshot, "disk"

    def _is_worth_loading(self, entry: Entry, num_tokens: int) -> bool:
        if num_tokens < MIN_DISTANCE or self._disk is None or entry.saved is None:
            return False
        if not self._prefill_tokens:
            return True
        running_s = num_tokens * self._prefill_s / self._prefill_tokens
        return self._disk.estimated_load_s(entry.saved, self.store.block) < running_s

    def _poll(self) -> None:
        """Learn what became of files."""
        if self._disk is not None:
            added, gone = self._disk.poll()
            for tokens, name in added:
                self.store.add_saved(tokens, name)
            for tokens in gone:
                self.store.forget_saved(tokens)

    def _can_go_back(self, num_tokens: int) -> bool:
        """Whether the live cache itself can forget so many tokens."""
        return num_tokens <= self.cache.slack and self.cache.can_rollback(num_tokens)

    def _go_back(self, position: int) -> None:
        self._leave(position, ())
        excess = self.cache.offset - position
        if self.cache.mtp is not None:
            self.cache.mtp.rollback(excess)
        self.cache.rollback(excess)
        self.cache.pending = []
        # Draft rows may not reach back as far; decoding makes a new state where there is none.
        if self.cache.mtp is not None and self.cache.mtp.end != position:
            self.cache.mtp = None

    def _restore(self, entry: Entry, snapshot: Snapshot, common: int) -> None:
        position = snapshot.position
        kept = position if common == position else common // self._block_tokens * self._block_tokens
        self._leave(kept, (entry,))
        if 2 * position < self.cache.offset:
            self.cache = shrunk(self._model, self.cache, kept)
        restore(self._model, self.cache, snapshot, kept)
        self._blocks = list(snapshot.blocks)
        for block in self._blocks:
            self.store.lend(block)

    def _start_anew(self) -> None:
        self._leave(0, ())
        self.cache = self._model.make_cache()

    def _leave(self, kept: int, keep: Sequence[Entry]) -> None:
        """Copy out what snapshots need of the cache's rows behind the first `kept`."""
        num_kept = kept // self._block_tokens
        wanted = self.store.claim(self._blocks[num_kept:], keep)
        for block, layers in zip(wanted, cut(self.cache, wanted), strict=True):
            self.store.fill(block, layers)
        del self._blocks[num_kept:]

    def _save(self) -> None:
        """Keep the present state, unless it is kept already."""
        tokens = as_tokens(self.cache.tokens)
        if not self.store.touch(tokens):
            self._extend_blocks(tokens)
            snapshot = take(self.cache, tokens, self._blocks)
            self.store.add(snapshot)
            self._write(snapshot)

    def _write(self, snapshot: Snapshot) -> None:
        """Hand a new snapshot to the disk, with copies of the rows that it does not have yet."""
        if self._disk is None:
            return
        self._poll()
        blocks = self._disk.missing(snapshot)
        self._disk.save(
            snapshot, {block.key: rows for block, rows in zip(blocks, cut(self.cache, blocks), strict=True)}
        )

    def _extend_blocks(self, tokens: TokenArray) -> None:
        """Name the whole blocks of `tokens`; blocks that the store has already are those."""
        width = self._block_tokens
        size = row_bytes(self.cache) * width
        for start in range(len(self._blocks) * width, len(tokens) - width + 1, width):
            parent = self._blocks[-1].key if self._blocks else b""
            key = block_key(parent, tokens[start : start + width])
            block = self.store.block(key) or Block(key, start, start + width, size)
            self.store.lend(block)
            self._blocks.append(block)
