"""`load`, `generate` and `stream_generate` with mlx-lm's signatures."""

import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx

from mlx_step35.cache import ModelCache
from mlx_step35.checkpoint import DTypeName, load_checkpoint, resolve_model
from mlx_step35.decoding import (
    DecodeOptions,
    DecodeStats,
    MTPChoice,
    PrefillCallback,
    decode,
    prepare,
)
from mlx_step35.errors import RequestError
from mlx_step35.guard import check_load
from mlx_step35.model import Model
from mlx_step35.sampling import CustomSampling, LogitsProcessor, SamplerFunction, SamplingParams

# Options of mlx-lm that a caller may pass and this package does not serve.
NOT_SERVED: Mapping[str, str] = {
    "draft_model": "the model drafts with its own MTP layers, see mtp",
    "num_draft_tokens": "how many tokens to draft is set by mtp: auto, off, 1, 2 or 3",
    "max_kv_size": "three of four layers keep only their window already, and the others need every token",
    "kv_bits": "quantised keys and values lose accuracy over several turns and save little here: "
    "48 KiB per token in bfloat16",
    "kv_group_size": "keys and values are not quantised",
    "quantized_kv_start": "keys and values are not quantised",
    "input_embeddings": "the model takes token ids only",
    "adapter_path": "adapters are not supported; fuse them into the weights",
    "model_config": "the checkpoint's config.json is used as it is",
    "revision": "download that revision and pass its directory",
    "xtc_probability": "pass sampler=mlx_lm.sample_utils.make_sampler(..., xtc_probability=...)",
}


_DEFAULTS: Mapping[str, Any] = {
    "num_draft_tokens": 2,
    "kv_group_size": 64,
    "quantized_kv_start": 0,
    "xtc_probability": 0.0,
}


class Detokenizer(Protocol):
    """Tokens to text, never half a character."""

    def add(self, token: int) -> str: ...

    def finish(self) -> str: ...


@dataclass(frozen=True, slots=True)
class GenerationResponse:
    """One step of `stream_generate`: mlx-lm's fields, and statistics that later steps keep updating."""

    text: str
    token: int
    logprobs: mx.array
    from_draft: bool
    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    peak_memory: float
    finish_reason: str | None
    stats: DecodeStats


def load(
    path_or_repo: str | Path,
    tokenizer_config: dict[str, Any] | None = None,
    *,
    dtype: DTypeName = "auto",
    lazy: bool = False,
    return_config: bool = False,
    trust_remote_code: bool = False,
    **not_served: Any,
) -> Any:
    """The model and tokenizer of a directory, a hub repository, or 'nano', the bundled small model.

    The tokenizer is mlx-lm's wrapper of the transformers one. `trust_remote_code` has no effect: no code of a
    checkpoint is ever run. With `return_config` the raw config.json is the third value.
    """
    _refuse(not_served)
    path = resolve_model(path_or_repo)
    if not lazy:
        check_load(path)
    model = load_checkpoint(path, dtype)
    if not lazy:
        prepare(model)
    # Imported here because it brings in transformers.
    from mlx_lm.tokenizer_utils import load as load_tokenizer

    tokenizer = load_tokenizer(path, tokenizer_config, eos_token_ids=list(model.config.eos_token_ids))
    return (model, tokenizer, dict(model.config.raw)) if return_config else (model, tokenizer)


def generate(
    model: Model,
    tokenizer: Any,
    prompt: str | Sequence[int] | mx.array,
    verbose: bool = False,
    **options: Any,
) -> str:
    """The whole text that `stream_generate` streams; `verbose` prints it and a summary."""
    from mlx_step35.generate.report import print_summary

    if verbose:
        print("=" * 10)
    text, response = "", None
    for response in stream_generate(model, tokenizer, prompt, **options):
        text += response.text
        if verbose:
            print(response.text, end="", flush=True)
    if verbose and response:
        print_summary(response)
    return text


def stream_generate(
    model: Model,
    tokenizer: Any,
    prompt: str | Sequence[int] | mx.array,
    max_tokens: int = 256,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    seed: int | None = None,
    mtp: MTPChoice = "auto",
    lookup: bool = True,
    sampler: SamplerFunction | None = None,
    logits_processors: Sequence[LogitsProcessor] | None = None,
    prompt_cache: ModelCache | None = None,
    prefill_step_size: int = 2048,
    prompt_progress_callback: PrefillCallback | None = None,
    **not_served: Any,
) -> Generator[GenerationResponse, None, None]:
    """Stream text for a prompt of text or token ids; greedy unless a temperature or a `sampler` is given.

    `mtp` ('auto', 'off', 1, 2 or 3) and `lookup` choose where drafts come from; the output's distribution
    does not depend on them. A `prompt_cache` from `model.make_cache()` is continued and updated: pass only
    new tokens.
    """
    _refuse(not_served)
    params = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed)
    sampling = CustomSampling(params, sampler, tuple(logits_processors or ()))
    options = DecodeOptions(max_tokens, mtp, lookup, prefill_step_size)
    if prompt_cache is not None and not isinstance(prompt_cache, ModelCache):
        raise RequestError("prompt_cache must come from model.make_cache()", field="prompt_cache")
    tokenizer = _wrapped(tokenizer)
    return stream_tokens(
        model,
        _token_ids(tokenizer, prompt),
        _LMDetokenizer(tokenizer.detokenizer),
        frozenset(tokenizer.eos_token_ids),
        sampling,
        options,
        cache=prompt_cache,
        on_prefill=prompt_progress_callback,
    )


def stream_tokens(
    model: Model,
    prompt: Sequence[int],
    detokenizer: Detokenizer,
    eos_token_ids: frozenset[int],
    sampling: SamplingParams | CustomSampling,
    options: DecodeOptions,
    *,
    cache: ModelCache | None = None,
    on_prefill: PrefillCallback | None = None,
) -> Generator[GenerationResponse, None, None]:
    """`stream_generate` behind its tokenizer: decode, detokenize, stop at an end-of-text token."""
    cache = model.make_cache() if cache is None else cache
    stats = DecodeStats()
    start_s = time.perf_counter()
    prompt_s = 0.0
    # Closed when the caller stops early too, so that its cache ends where the text does.
    with closing(
        decode(model, prompt, cache, sampling, options, on_prefill=on_prefill, stats=stats)
    ) as decoded:
        for count, item in enumerate(decoded, 1):
            if count == 1:
                prompt_s = time.perf_counter() - start_s
                start_s = time.perf_counter()
            is_stop = item.token in eos_token_ids
            is_last = is_stop or count == stats.token_limit
            text = "" if is_stop else detokenizer.add(item.token)
            yield GenerationResponse(
                text=text + detokenizer.finish() if is_last else text,
                token=item.token,
                logprobs=item.logprobs,
                from_draft=item.from_draft,
                prompt_tokens=len(prompt),
                prompt_tps=len(prompt) / prompt_s,
                generation_tokens=count,
                generation_tps=count / (time.perf_counter() - start_s),
                peak_memory=mx.get_peak_memory() / 1e9,
                finish_reason="stop" if is_stop else "length" if is_last else None,
                stats=stats,
            )
            if is_last:
                return


class _LMDetokenizer:
    """mlx-lm's streaming detokenizer behind our two calls."""

    def __init__(self, detokenizer: Any) -> None:
        self._detokenizer = detokenizer

    def add(self, token: int) -> str:
        self._detokenizer.add_token(token)
        return str(self._detokenizer.last_segment)

    def finish(self) -> str:
        self._detokenizer.finalize()
        return str(self._detokenizer.last_segment)


def _wrapped(tokenizer: Any) -> Any:
    """mlx-lm's wrapper round a transformers tokenizer, unless it has one."""
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    return tokenizer if isinstance(tokenizer, TokenizerWrapper) else TokenizerWrapper(tokenizer)


def _token_ids(tokenizer: Any, prompt: str | Sequence[int] | mx.array) -> list[int]:
    """Text starts with the token that begins every text, written out or added."""
    if isinstance(prompt, str):
        begins = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
        return list(tokenizer.encode(prompt, add_special_tokens=not begins))
    if isinstance(prompt, mx.array) and prompt.ndim != 1:
        raise RequestError(f"the prompt has shape {list(prompt.shape)}, expected one row", field="prompt")
    tokens: Any = prompt.tolist() if isinstance(prompt, mx.array) else prompt
    try:
        return [index(token) for token in tokens]
    except TypeError:
        raise RequestError("the prompt must be text or a list of integers", field="prompt") from None


def _refuse(options: Mapping[str, Any]) -> None:
    """mlx-lm's own defaults mean that an option was left alone."""
    for name, value in options.items():
        if name not in NOT_SERVED:
            raise TypeError(f"unexpected keyword argument '{name}'")
        if value not in (None, {}, _DEFAULTS.get(name)):
            raise RequestError(f"{name} is not served: {NOT_SERVED[name]}", field=name)
