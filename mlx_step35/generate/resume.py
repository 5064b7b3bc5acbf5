"""`--prompt-cache-file`: start from what an earlier run saved, save what this one did."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mlx_step35.cache import ModelCache
from mlx_step35.chat.boundaries import prompt_boundaries
from mlx_step35.chat.tokenizer import Tokenizer
from mlx_step35.decoding import DecodeOptions
from mlx_step35.engine.session import Session
from mlx_step35.model import Model
from mlx_step35.prompt_cache.archive import read_archive, write_archive
from mlx_step35.prompt_cache.files import RecordError, fingerprint
from mlx_step35.prompt_cache.store import PromptCacheStore

logger = logging.getLogger(__name__)

# One conversation, which fits or does not fit memory without this cache just the same.
NO_LIMIT = 1 << 62


class PromptCacheFile:
    """A session whose saved states come from a file."""

    def __init__(self, path: Path, model: Model, model_path: Path) -> None:
        self._path = path
        self._fingerprint = fingerprint(model_path, str(model.dtype))
        self._session = Session(model, PromptCacheStore(NO_LIMIT))
        if path.exists() and path.stat().st_size:
            self._read()

    def start(
        self, ids: Sequence[int], tokenizer: Tokenizer, options: DecodeOptions
    ) -> tuple[Sequence[int], ModelCache, DecodeOptions]:
        """What is left of a prompt to run, the cache behind the rest, and where to call `reached`."""
        reuse = self._session.sync(ids)
        ends = [end.position for end in prompt_boundaries(ids, tokenizer)]
        options = replace(options, prefill_boundaries=self._session.stops(ends))
        return ids[reuse.cached_tokens :], self._session.cache, options

    def reached(self) -> None:
        """To be called during the prefill."""
        self._session.reached()

    def save(self) -> None:
        """Write the state after the generation. Raises RequestError if that fails."""
        self._session.finish()
        if self._session.cache.offset:
            write_archive(self._path, self._fingerprint, *self._session.export())

    def _read(self) -> None:
        try:
            snapshots = read_archive(self._path, self._fingerprint)
        except RecordError as error:
            logger.warning("the prompt cache file is not used: %s", error)
            return
        for snapshot in snapshots:
            self._session.store.add(snapshot)
