"""The command `mlx_step35.generate`: mlx-lm's flags, this model's sampling defaults."""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from tqdm import tqdm

from mlx_step35.chat.template import ChatTemplate, check_options
from mlx_step35.chat.tokenizer import Tokenizer
from mlx_step35.checkpoint import NANO, DTypeName, load_checkpoint, read_config, resolve_model
from mlx_step35.decoding import DecodeOptions, MTPChoice, prepare
from mlx_step35.errors import PromptTooLongError, RequestError
from mlx_step35.exits import EXIT_INTERRUPTED, run_command
from mlx_step35.generate.api import NOT_SERVED, GenerationResponse, stream_tokens
from mlx_step35.generate.report import print_summary, stats_json
from mlx_step35.generate.resume import PromptCacheFile
from mlx_step35.guard import check_load
from mlx_step35.prompt_cache.archive import check_archive_path
from mlx_step35.sampling import CustomSampling, SamplingParams

# What the model's makers recommend.
DEFAULT_TEMPERATURE = 1.0
DEFAULT_TOP_P = 0.95

# mlx-lm's flags that are answered with the reason why they are not served.
_REFUSED = (
    "adapter_path",
    "draft_model",
    "kv_bits",
    "kv_group_size",
    "max_kv_size",
    "num_draft_tokens",
    "quantized_kv_start",
)

NANO_NOTE = (
    "no --model given: running step35-nano, the small demonstration model in this package; "
    "name a real one with --model DIRECTORY or --model OWNER/REPOSITORY"
)


@dataclass(frozen=True, slots=True)
class Job:
    """One run of the command."""

    model: str | None
    dtype: DTypeName
    prompt: str
    system_prompt: str | None
    prefill_response: str | None
    template_options: dict[str, Any]
    use_chat_template: bool
    extra_eos_tokens: tuple[str, ...]
    sampling: SamplingParams | CustomSampling
    options: DecodeOptions
    max_context: int | None
    is_verbose: bool
    stats_path: Path | None
    prompt_cache_path: Path | None


def run(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    args = _parser().parse_args(arguments)
    return run_command(lambda: _generate(_job(args)))


def _generate(job: Job) -> int:
    if job.model is None:
        print(NANO_NOTE, file=sys.stderr)
    path = resolve_model(NANO if job.model is None else job.model)
    tokenizer = Tokenizer.from_directory(path)
    ids = _prompt_ids(job, path, tokenizer)
    # Known before the weights are read, which takes minutes with the real model.
    context_length = read_config(path).context_length
    limit = min(job.max_context or context_length, context_length)
    if len(ids) >= limit:
        raise PromptTooLongError(len(ids), limit - 1)
    options = replace(job.options, max_tokens=_bounded(job.options.max_tokens, limit - len(ids)))
    check_load(path, job.max_context or len(ids))
    model = load_checkpoint(path, job.dtype)
    prepare(model)
    eos_token_ids = {*model.config.eos_token_ids, *(_token_id(tokenizer, t) for t in job.extra_eos_tokens)}
    token_ids: list[int] = []
    response: GenerationResponse | None = None
    exit_code = 0
    if job.is_verbose:
        print("=" * 10)
    bar = _PrefillBar(job.options.prefill_step_size)
    saved = PromptCacheFile(job.prompt_cache_path, model, path) if job.prompt_cache_path else None
    rest, cache, options = saved.start(ids, tokenizer, options) if saved else (ids, None, options)

    def on_prefill(done: int, total: int) -> None:
        bar.update(done, total)
        if saved:
            saved.reached()

    stream = stream_tokens(
        model,
        rest,
        tokenizer.detokenizer(),
        frozenset(eos_token_ids),
        job.sampling,
        options,
        cache=cache,
        on_prefill=on_prefill,
    )
    with closing(stream):
        try:
            for response in stream:
                token_ids.append(response.token)
                print(response.text, end="", flush=True)
        except KeyboardInterrupt:
            exit_code = EXIT_INTERRUPTED
        finally:
            bar.close()
    if response and job.is_verbose:
        print_summary(response)
    else:
        print()
    if saved:
        saved.save()
    if job.stats_path:
        _write_stats(job.stats_path, stats_json(response, token_ids))
    return exit_code


def _prompt_ids(job: Job, path: Path, tokenizer: Tokenizer) -> list[int]:
    """The prompt as tokens; what the user wrote cannot become a control token of the template."""
    if not job.prompt.strip():
        raise RequestError("the prompt is empty", field="prompt")
    if not job.use_chat_template:
        ids = tokenizer.encode(job.prompt)
        bos = tokenizer.bos_token_id
        return ids if bos is None or ids[:1] == [bos] else [bos, *ids]
    messages = [{"role": "user", "content": job.prompt}]
    if job.system_prompt is not None:
        messages.insert(0, {"role": "system", "content": job.system_prompt})
    rendered = ChatTemplate.from_directory(path).render(messages, variables=job.template_options)
    return tokenizer.encode_rendered(rendered) + tokenizer.encode(job.prefill_response or "")


def _bounded(max_tokens: int, room: int) -> int:
    return room if max_tokens < 0 else min(max_tokens, room)


def _token_id(tokenizer: Tokenizer, token: str) -> int:
    found = int(token) if token.isdecimal() else tokenizer.token_id(token)
    if found is None or found >= tokenizer.vocab_size:
        raise RequestError(f"'{token}' is not a token of this model", field="extra_eos_token")
    return found


def _write_stats(path: Path, stats: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(stats, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise RequestError(f"cannot write {path}: {error.strerror}", field="stats") from None


class _PrefillBar:
    """A progress bar on a terminal, for prompts of more than one chunk."""

    def __init__(self, chunk_tokens: int) -> None:
        self._chunk_tokens = chunk_tokens
        self._bar: tqdm[Any] | None = None

    def update(self, done: int, total: int) -> None:
        if self._bar is None and done == 0 and total > self._chunk_tokens and sys.stderr.isatty():
            self._bar = tqdm(total=total, unit=" tokens", desc="Prompt", leave=False, file=sys.stderr)
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
            if done == total:
                self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _job(args: argparse.Namespace) -> Job:
    """What the flags ask for. Raises RequestError for those that are not served or contradict each other."""
    for name in _REFUSED:
        if getattr(args, name) is not None:
            raise RequestError(f"--{name.replace('_', '-')} is not served: {NOT_SERVED[name]}", field=name)
    if args.ignore_chat_template:
        for name in ("system_prompt", "prefill_response", "chat_template_config"):
            if getattr(args, name) is not None:
                flag = name.replace("_", "-")
                raise RequestError(
                    f"--{flag} needs the chat template, which --ignore-chat-template omits", name
                )
    if args.prompt_cache_file is not None:
        check_archive_path(args.prompt_cache_file)
    if args.stats is not None and (args.stats.is_dir() or not args.stats.parent.is_dir()):
        raise RequestError(f"cannot write {args.stats}: no such file is possible", field="stats")
    prompt = args.prompt.replace("\\n", "\n").replace("\\t", "\t")
    return Job(
        model=args.model,
        dtype=args.dtype,
        prompt=_stdin() if prompt == "-" else prompt,
        system_prompt=args.system_prompt,
        prefill_response=args.prefill_response,
        template_options=_template_options(args.chat_template_config),
        use_chat_template=not args.ignore_chat_template,
        extra_eos_tokens=tuple(args.extra_eos_token),
        sampling=_sampling(args),
        options=DecodeOptions(args.max_tokens, args.mtp, not args.no_lookup, args.prefill_step_size),
        max_context=args.max_context,
        is_verbose=args.verbose,
        stats_path=args.stats,
        prompt_cache_path=args.prompt_cache_file,
    )


def _stdin() -> str:
    if sys.stdin is None:
        raise RequestError("--prompt - reads stdin, which is closed", field="prompt")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise RequestError(f"stdin is not text: {error}", field="prompt") from None


def _sampling(args: argparse.Namespace) -> SamplingParams | CustomSampling:
    params = SamplingParams(
        temperature=args.temp,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        min_tokens_to_keep=args.min_tokens_to_keep,
        seed=args.seed,
    )
    for name, highest in (("xtc_probability", 1), ("xtc_threshold", 0.5)):
        value = getattr(args, name)
        if not 0 <= value <= highest:
            raise RequestError(f"{name} must be between 0 and {highest}, found {value}", field=name)
    if args.xtc_probability == 0:
        return params
    # A random filter cannot be applied to draft and target alike, so it runs as mlx-lm's sampler.
    import mlx.core as mx
    from mlx_lm.sample_utils import make_sampler

    if args.seed is not None:
        mx.random.seed(args.seed)
    sampler = make_sampler(
        args.temp,
        args.top_p,
        args.min_p,
        args.min_tokens_to_keep,
        args.top_k,
        xtc_probability=args.xtc_probability,
        xtc_threshold=args.xtc_threshold,
    )
    return CustomSampling(params, sampler)


def _template_options(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        options = json.loads(text)
    except json.JSONDecodeError as error:
        raise RequestError(
            f"--chat-template-config is not JSON: {error}", field="chat_template_config"
        ) from None
    if not isinstance(options, dict):
        raise RequestError("--chat-template-config must be a JSON object", field="chat_template_config")
    check_options(options, "--chat-template-config")
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlx_step35.generate", description="Generate text with Step-3.5-Flash."
    )
    add: Callable[..., Any] = parser.add_argument
    add("--model", help=f"directory or hub repository; '{NANO}' is the small model in this package (default)")
    add("--prompt", "-p", default="hello", help="message to the model; '-' reads stdin")
    add("--system-prompt", help="system message before it")
    add("--prefill-response", help="text that the answer continues")
    add(
        "--max-tokens", "-m", type=int, default=1024, help="tokens to generate at most (default: %(default)s)"
    )
    add(
        "--temp",
        type=float,
        default=DEFAULT_TEMPERATURE,
        help="temperature; 0 is greedy (default: %(default)s)",
    )
    add("--top-p", type=float, default=DEFAULT_TOP_P, help="nucleus sampling (default: %(default)s)")
    add("--min-p", type=float, default=0.0, help="drop tokens this much less likely than the best")
    add("--min-tokens-to-keep", type=int, default=1, help="tokens that --min-p keeps at least")
    add("--top-k", type=int, default=0, help="sample from the k most likely tokens")
    add("--xtc-probability", type=float, default=0.0, help="how often XTC drops the most likely tokens")
    add("--xtc-threshold", type=float, default=0.1, help="probability from which XTC drops tokens")
    add("--seed", type=int, help="makes the output reproducible, up to rounding with any --mtp")
    add("--mtp", type=_mtp, default="auto", help="drafts by the MTP layers: auto (default), off, 1, 2 or 3")
    add("--no-lookup", action="store_true", help="do not draft by copying from the prompt and the output")
    add("--ignore-chat-template", action="store_true", help="use the prompt as it is")
    add("--chat-template-config", help="JSON object of further variables for the chat template")
    add("--extra-eos-token", nargs="+", default=(), help="more tokens that end the text, by name or id")
    add("--max-context", type=_positive, help="tokens of prompt and output together, at most")
    add("--prefill-step-size", type=int, default=2048, help="prompt tokens per pass (default: %(default)s)")
    add(
        "--dtype",
        choices=get_args(DTypeName),
        default="auto",
        help="dtype of activations (default: %(default)s)",
    )
    add("--verbose", type=_boolean, default=True, help="print a summary after the text (default: True)")
    add(
        "--prompt-cache-file",
        type=Path,
        metavar="FILE",
        help="continue from this file as far as the prompt is the same; written at the end",
    )
    add("--stats", type=Path, metavar="FILE", help="write what was measured to a JSON file")
    for name in _REFUSED:
        add(f"--{name.replace('_', '-')}", help=argparse.SUPPRESS)
    # Accepted because they cannot matter here: no code is loaded, and there is one chat template.
    for flag in ("--trust-remote-code", "--use-default-chat-template"):
        add(flag, action="store_true", help=argparse.SUPPRESS)
    return parser


def _mtp(text: str) -> MTPChoice | int:
    if text in ("auto", "off"):
        # mypy does not narrow a string by the tuple it was found in.
        return text  # type: ignore[return-value]
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected auto, off, 1, 2 or 3, found '{text}'") from None


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of tokens, found '{text}'")
    return int(text)


def _boolean(text: str) -> bool:
    known = {"true": True, "t": True, "false": False, "f": False}
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"expected True or False, found '{text}'")
    return known[text.lower()]
