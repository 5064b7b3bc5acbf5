"""What the MTP layers have seen: their caches, the hidden rows they still need, and drafts that are exact.

Row i of layer k turns hidden row h(k)_i and the token i+1+k into h(k+1)_i. With rows 0..n run through the
backbone and one more token pending, layer 0 knows all of its tokens and layer k lacks the last k, which only
drafts can fill in. Such provisional rows are final once their drafts turn out right, and are forgotten and
run again otherwise: a draft equals that of a fresh run over the same tokens.

Only what the newest row can see matters: d drafts need d * (window - 1) rows before it, because the rows in
the window of the last layer have windows of their own. A layer that is not asked for falls behind; when it
is, it runs over what it missed, or starts again from the kept h(0) rows if that is less. Some more rows are
kept for going back; where rows are missing all the same, after an interrupted prompt or many steps back, the
oldest that is left counts as the first of all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_step35.cache import DEFAULT_SLACK, LayerCache
from mlx_step35.mtp import MTP
from mlx_step35.sampling import Proposal

# Hidden rows are kept in the chunks they came in, and joined beyond this number of them: a join copies every
# row, and a chunk keeps alive the whole pass it was cut from.
MAX_CHUNKS = 32

# A layer that is no more rows behind than this is not behind: a round of MTP drafts brings up to four.
NEW_ROWS = 6

# What a row costs that serves for its keys only, beside others: the share of a layer's weights that it uses
# (0.15 on the real model).
KEY_ROW_COST = 0.2

# From draft logits (1, V), the drafts before it and how many these are, to a token (1,) and, where acceptance
# needs them, the log-probabilities (1, V) it was sampled from.
ChooseDraft = Callable[[mx.array, Sequence[mx.array]], tuple[mx.array, mx.array | None]]
Embed = Callable[[mx.array], mx.array]


@dataclass(frozen=True, slots=True)
class DraftSnapshot:
    """The h(0) rows (1, rows, D) from `first` on; the layers' caches are made from them again when needed."""

    first: int
    hidden: mx.array | None

    @property
    def nbytes(self) -> int:
        return 0 if self.hidden is None else self.hidden.nbytes


class DraftState:
    """The MTP layers' side of one token timeline; belongs to a ModelCache over the same tokens."""

    def __init__(self, mtp: MTP, embed: Embed, first_row: int = 0) -> None:
        self._mtp = mtp
        self._embed = embed
        # A layer that sees everything has no window to fall back to.
        reaches = [(layer.window or mtp.config.context_length) - 1 for layer in mtp.config.mtp_layers]
        self._reach = max(reaches)
        self._layers = [_Layer(cache) for cache in mtp.make_cache()]
        self._hidden = [
            _Rows(first_row, (self.max_depth - k) * self._reach + 1 + DEFAULT_SLACK)
            for k in range(self.max_depth)
        ]
        self._origin = first_row

    @property
    def max_depth(self) -> int:
        return self._mtp.num_layers

    @property
    def end(self) -> int:
        """Backbone rows seen."""
        return self._hidden[0].end

    @property
    def nbytes(self) -> int:
        """Bytes of the hidden rows and of the layers' caches."""
        return sum(rows.nbytes for rows in self._hidden) + sum(layer.cache.nbytes for layer in self._layers)

    @classmethod
    def from_snapshot(cls, mtp: MTP, embed: Embed, snapshot: DraftSnapshot) -> "DraftState":
        """The state whose `snapshot` this was."""
        state = cls(mtp, embed, snapshot.first)
        if snapshot.hidden is not None:
            state.extend(snapshot.hidden, snapshot.first)
        return state

    @property
    def num_useful_rows(self) -> int:
        """How many of the newest h(0) rows a draft of any depth can depend on."""
        return self.max_depth * self._reach + 1

    @property
    def num_kept_rows(self) -> int:
        """How many of the newest h(0) rows to give to `extend`: those, and as many as one can go back."""
        return self.num_useful_rows + DEFAULT_SLACK

    def extend(self, hidden: mx.array, at: int) -> None:
        """Take the residual stream (1, L, D) of rows at..at+L-1, whose tokens are certain.

        Rows between the last seen and `at` may be left out if they will not be among those to keep.
        """
        self._hidden[0].append(hidden, at)

    def rows_behind(self, depth: int) -> int:
        """Rows that `propose` would run beyond those of the newest round, over all layers it uses.

        Counted by what they cost: rows that serve for their keys only are parts of a row.
        """
        return sum(max(round(self._cost(run)) - NEW_ROWS, 0) for run in self._plan(depth))

    def propose(self, depth: int, tokens: Sequence[int], choose: ChooseDraft) -> Proposal:
        """Draft `depth` tokens that follow `tokens`, all of them: one per row seen, and the pending one."""
        assert len(tokens) == self.end + 1 and 1 <= depth <= self.max_depth
        drafts: list[mx.array] = []
        logprobs: list[mx.array] = []
        for k, run in enumerate(self._plan(depth)):
            hidden = self._run(k, run, tokens, drafts)
            token, sampled_from = choose(self._mtp.logits(k, hidden[:, -1:])[:, 0], drafts)
            drafts.append(token)
            if sampled_from is not None:
                logprobs.append(sampled_from)
        return Proposal(mx.concatenate(drafts), mx.concatenate(logprobs) if logprobs else None)

    def settle(self, num_right: int) -> None:
        """Keep the provisional rows that used the first `num_right` drafts, forget the others."""
        for k, layer in enumerate(self._layers):
            self._truncate(k, min(layer.end, self.end - k + min(num_right, k)))

    def rollback(self, num_rows: int) -> None:
        """Forget the newest rows; what then follows them may differ, so every layer gives up one more."""
        self._hidden[0].truncate(self.end - num_rows)
        for k, layer in enumerate(self._layers):
            self._truncate(k, min(layer.end, self.end - 1 - k))

    def snapshot(self) -> DraftSnapshot:
        """The present h(0) rows as far as they are kept; later calls do not touch them."""
        rows = self._hidden[0]
        first = max(rows.first, rows.end - self.num_kept_rows)
        return DraftSnapshot(first, rows.read(first, rows.end) if rows.end > first else None)

    def _plan(self, depth: int) -> list["_Run"]:
        """Where each of the first `depth` layers must start so that all can draft from the newest row."""
        newest, origin = self.end - 1, self._first_row()
        runs: list[_Run] = []
        # The last layer only has to give the newest row; what it reads, the layer before it has to give.
        wanted = newest
        for k in reversed(range(depth)):
            layer, hidden = self._layers[k], self._hidden[k]
            visible = max(wanted - self._reach, origin)
            resume = min(layer.end, wanted)
            has_window = layer.first <= visible <= resume and layer.exact <= wanted
            if has_window and layer.can_end_at(resume):
                run = _Run(resume, max(resume, layer.exact), False)
            else:
                # Rows whose window is cut off serve for their keys only.
                run = _Run(visible, visible if visible == origin else wanted, True)
            has_input = hidden.first <= run.start <= hidden.end
            wanted = min(hidden.end if has_input else run.start, newest)
            runs.append(run)
        return runs[::-1]

    def _first_row(self) -> int:
        """The row before which nothing is seen: the first, or the oldest left if too many are gone."""
        kept = self._hidden[0]
        return kept.first if self.end - kept.first < self.num_useful_rows else self._origin

    def _cost(self, run: "_Run") -> float:
        return self.end - run.exact + KEY_ROW_COST * (run.exact - run.start)

    def _run(self, k: int, run: "_Run", tokens: Sequence[int], drafts: Sequence[mx.array]) -> mx.array:
        """Bring layer k from the start of its run to the newest row; returns its exact outputs."""
        layer = self._layers[k]
        if run.resets:
            layer.cache = self._mtp.make_cache()[k]
            layer.first, layer.exact = run.start, run.exact
        else:
            layer.end_at(run.start)
        known = list(tokens[run.start + 1 + k :])
        num_unknown = self.end - run.start - len(known)
        ids = [mx.array(known, dtype=mx.uint32)] if known else []
        ids += drafts[k - num_unknown : k]
        embeddings = self._embed(mx.concatenate(ids)[None])
        hidden = self._hidden[k].read(run.start, self.end)
        if num_keys := run.exact - run.start:
            self._mtp.absorb(k, embeddings[:, :num_keys], hidden[:, :num_keys], layer.cache)
        hidden = self._mtp.step(k, embeddings[:, num_keys:], hidden[:, num_keys:], layer.cache)
        layer.end = self.end
        if k + 1 < self.max_depth:
            self._hidden[k + 1].append(hidden, run.exact)
        return hidden

    def _truncate(self, k: int, end: int) -> None:
        """Layer k forgets its rows from `end` on, at most its own end, and with them its outputs."""
        layer = self._layers[k]
        if layer.can_end_at(end):
            layer.end_at(end)
        else:
            layer.first = layer.exact = layer.end = -1
        if k + 1 < self.max_depth:
            self._hidden[k + 1].truncate(end)


@dataclass(frozen=True, slots=True)
class _Run:
    """The rows a layer runs for one draft: from `start` to the newest, with outputs from `exact` on.

    A reset empties the layer's cache first.
    """

    start: int
    exact: int
    resets: bool


class _Layer:
    """One layer's cache, which holds the keys of rows first..end-1; `first` is the row at its position 0.

    Its outputs are right from row `exact` on. After an interrupted round the cache may have gone further than
    `end`.
    """

    def __init__(self, cache: LayerCache) -> None:
        self.cache = cache
        self.first = 0
        self.exact = 0
        self.end = 0

    def can_end_at(self, end: int) -> bool:
        return self.cache.can_rollback(self.cache.offset - (end - self.first))

    def end_at(self, end: int) -> None:
        """Forget the rows from `end` on."""
        self.cache.rollback(self.cache.offset - (end - self.first))
        self.end = end


class _Rows:
    """Hidden rows first..end-1 (1, rows, D), at least the newest `capacity` of those appended."""

    def __init__(self, first: int, capacity: int) -> None:
        self._capacity = capacity
        self._chunks: list[mx.array] = []
        self.first = first
        self.end = first

    @property
    def nbytes(self) -> int:
        return sum(chunk.nbytes for chunk in self._chunks)

    def append(self, rows: mx.array, at: int) -> None:
        """Take rows at..at+L-1 as the newest, in place of what was there; older rows stay if they adjoin."""
        if not self.first <= at <= self.end:
            self._chunks, self.first, self.end = [], at, at
        self.truncate(at)
        if rows.shape[1] == 0:
            return
        self._chunks.append(rows)
        self.end += rows.shape[1]
        self._drop_old()

    def truncate(self, end: int) -> None:
        """Forget the rows from `end` on."""
        if end <= self.first:
            self._chunks, self.end = [], self.first
            return
        while self.end > end:
            chunk = self._chunks.pop()
            kept = chunk.shape[1] - (self.end - end)
            self.end -= chunk.shape[1]
            if kept > 0:
                self._chunks.append(chunk[:, :kept])
                self.end += kept

    def read(self, start: int, end: int) -> mx.array:
        """Rows start..end-1, all of which must be here."""
        assert self.first <= start < end <= self.end
        chunks: list[mx.array] = []
        chunk_end = self.end
        for chunk in reversed(self._chunks):
            chunk_start = chunk_end - chunk.shape[1]
            if chunk_start < end and chunk_end > start:
                low, high = max(start - chunk_start, 0), min(end - chunk_start, chunk.shape[1])
                chunks.append(chunk if high - low == chunk.shape[1] else chunk[:, low:high])
            chunk_end = chunk_start
            if chunk_end <= start:
                break
        return chunks[0] if len(chunks) == 1 else mx.concatenate(chunks[::-1], axis=1)

    def _drop_old(self) -> None:
        """Let go of rows beyond the capacity; chunks are cut only when they are joined or much too long."""
        while self.end - self.first - self._chunks[0].shape[1] >= self._capacity:
            self.first += self._chunks.pop(0).shape[1]
        if len(self._chunks) > MAX_CHUNKS or self.end - self.first > 2 * self._capacity:
            first = max(self.end - self._capacity, self.first)
            self._chunks = [mx.contiguous(self.read(first, self.end))]
            self.first = first
