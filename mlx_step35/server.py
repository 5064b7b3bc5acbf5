"""The command `mlx_step35.server`: one model for the agents on this machine, in three dialects of HTTP."""

import argparse
import asyncio
import contextlib
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args
from urllib.parse import urlsplit

from mlx.utils import tree_flatten

from mlx_step35.api.models import Served
from mlx_step35.chat.template import ChatTemplate
from mlx_step35.chat.tokenizer import Tokenizer
from mlx_step35.checkpoint import DTypeName, load_checkpoint, read_config, resolve_model
from mlx_step35.decoding import MTPChoice, prepare
from mlx_step35.engine.engine import Engine
from mlx_step35.engine.runner import Runner, Settings
from mlx_step35.engine.session import Session
from mlx_step35.errors import CapacityError, RequestError, Step35Error
from mlx_step35.guard import check_load, headroom, planner_of
from mlx_step35.http.access import QuietBreaks
from mlx_step35.http.app import create_app
from mlx_step35.http.gate import is_loopback
from mlx_step35.http.listening import address_of, bind
from mlx_step35.http.preparing import Preparer
from mlx_step35.http.serving import HttpServer
from mlx_step35.http.settings import GenerationDefaults, ServerSettings
from mlx_step35.prompt_cache.budget import default_limit
from mlx_step35.prompt_cache.disk import DiskTier
from mlx_step35.prompt_cache.files import fingerprint
from mlx_step35.prompt_cache.store import PromptCacheStore

EXIT_FAILURE = 1
EXIT_USAGE = 2

DEFAULT_NAME = "step-3.5-flash"
KEY_VARIABLE = "MLX_STEP35_API_KEY"
PROMPT_CACHE_DIR_BYTES = 32 * 2**30

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Job:
    """One run of the command."""

    model: str
    dtype: DTypeName
    host: str
    port: int
    name: str
    aliases: tuple[str, ...]
    defaults: GenerationDefaults
    prefill_step_size: int
    max_context: int | None
    max_queue: int
    api_key: str | None
    cors_origins: frozenset[str]
    max_body_bytes: int
    keepalive_s: float
    request_timeout_s: float
    prompt_cache_bytes: int | None
    prompt_cache_dir: Path | None
    prompt_cache_dir_bytes: int
    log_level: str


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit."""
    code = run(sys.argv[1:] if arguments is None else arguments)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    # Without the interpreter's own way out: MLX aborts a process that ends while another thread has used it.
    os._exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    try:
        job = _job(_parser().parse_args(arguments))
        logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=job.log_level.upper())
        logging.getLogger("uvicorn.error").addFilter(QuietBreaks())
        return asyncio.run(_serve(job))
    except KeyboardInterrupt:
        return 0
    except (Step35Error, OSError) as error:
        return _fail(error)


async def _serve(job: Job) -> int:
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(listener) for listener in bind(job.host, job.port)]
        return await _load_and_serve(job, listeners)


async def _load_and_serve(job: Job, listeners: list[socket.socket]) -> int:
    path = resolve_model(job.model)
    config = read_config(path)
    context_length = job.max_context or config.context_length
    if context_length > config.context_length:
        raise RequestError(
            f"--max-context {context_length}: this model holds {config.context_length} tokens", "max_context"
        )
    check_load(path, context_length if job.max_context else None)
    preparer = Preparer(
        Tokenizer.from_directory(path), ChatTemplate.from_directory(path), job.defaults, context_length
    )
    engine = Engine(lambda: _load(job, path), job.max_queue)
    settings = ServerSettings(
        served=Served(
            job.name, frozenset({*job.aliases, job.model, path.name}), context_length, int(time.time())
        ),
        defaults=job.defaults,
        api_key=job.api_key,
        is_loopback=is_loopback(job.host),
        cors_origins=job.cors_origins,
        max_body_bytes=job.max_body_bytes,
        keepalive_s=job.keepalive_s,
        request_timeout_s=job.request_timeout_s,
    )
    return await serve(engine, preparer, settings, listeners)


async def serve(
    engine: Engine, preparer: Preparer, settings: ServerSettings, listeners: list[socket.socket]
) -> int:
    """Answer requests until a signal comes or the model cannot be loaded; returns the exit code."""
    server = HttpServer(create_app(engine, preparer, settings), engine, settings.shutdown_s)
    serving = asyncio.create_task(server.serve(listeners))
    loading = asyncio.create_task(engine.loaded())
    await asyncio.wait({serving, loading}, return_when=asyncio.FIRST_COMPLETED)
    if engine.load_error is not None:
        server.should_exit = True
        await serving
        return _fail(engine.load_error)
    if not serving.done():
        logger.info("%s is ready at http://%s", settings.served.name, address_of(listeners[0]))
    await serving
    await loading
    return 0 if server.started else EXIT_FAILURE


def _load(job: Job, path: Path) -> Runner:
    """Runs on the engine's thread, which owns all arrays from here on."""
    model = load_checkpoint(path, job.dtype)
    if model.mtp is None and job.defaults.mtp not in ("auto", "off"):
        raise RequestError(f"--mtp {job.defaults.mtp} needs MTP layers: {model.mtp_reason}", "mtp")
    disk = None
    if job.prompt_cache_dir is not None:
        # Before the weights are read: a directory that cannot be used should say so at once.
        identity = fingerprint(path, str(model.dtype))
        disk = DiskTier(job.prompt_cache_dir, job.prompt_cache_dir_bytes, identity)
    prepare(model)
    limit_bytes = job.prompt_cache_bytes
    if limit_bytes is None:
        planner = planner_of(model.config, cast(Any, tree_flatten(cast(Any, model).parameters())))
        limit_bytes = default_limit(planner, job.max_context or model.config.context_length, headroom())
    logger.info("saved prompts may take %.2f GB", limit_bytes / 1e9)
    store = PromptCacheStore(limit_bytes)
    return Runner(model, Session(model, store, disk), Settings(job.prefill_step_size))


def _fail(error: Exception) -> int:
    """Say in one line why there is no server; returns the exit code."""
    # A library's message may draw pictures, or say nothing at all.
    reason = " ".join(str(error).split()) or type(error).__name__
    print(f"error: {reason}", file=sys.stderr)
    if not isinstance(error, Step35Error | OSError):
        logger.debug("the traceback", exc_info=error)
    return EXIT_USAGE if isinstance(error, RequestError | CapacityError) else EXIT_FAILURE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mlx_step35.server", description=__doc__)
    add = parser.add_argument
    add("--model", required=True, help="directory, hub repository, or 'nano' for the bundled model")
    add("--model-name", default=DEFAULT_NAME, help="name under which it is served (%(default)s)")
    add("--model-alias", action="append", default=[], help="a further name; claude-* always works")
    add("--dtype", choices=get_args(DTypeName), default="auto")
    add("--host", default="127.0.0.1")
    add("--port", type=_port, default=8080, help="0 is any free one (%(default)s)")
    _add_generation_flags(parser)
    _add_access_flags(parser)
    add("--max-context", type=_positive, help="tokens of prompt and answer together (the model's limit)")
    add("--max-queue", type=_positive, default=32, help="requests running and waiting (%(default)s)")
    add("--max-body-bytes", type=_positive, default=32 * 2**20, help="size of a request (%(default)s)")
    add("--keepalive", type=_seconds, default=10.0, help="seconds of silence before an event (%(default)s)")
    add("--request-timeout", type=_seconds, default=3600.0, help="seconds for an answer (%(default)s)")
    _add_prompt_cache_flags(parser)
    add("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    return parser


def _add_generation_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("generation, where a request says nothing").add_argument
    add("--temp", type=_fraction(2), default=1.0, help="temperature (%(default)s)")
    add("--top-p", type=_fraction(1), default=0.95, help="nucleus sampling (%(default)s)")
    add("--max-tokens", type=_positive, help="tokens of an answer (what is left of the context)")
    add("--mtp", choices=("auto", "off", "1", "2", "3"), default="auto", help="draft depth (%(default)s)")
    add("--no-lookup", action="store_true", help="do not draft by copying from the prompt")
    add("--prefill-step-size", type=_positive, default=2048, help="prompt tokens per pass (%(default)s)")


def _add_prompt_cache_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("prompt cache").add_argument
    add(
        "--prompt-cache-bytes",
        type=_size,
        help="memory for saved prompts, such as 8GB; 0 is none (what weights and the longest context leave)",
    )
    add("--prompt-cache-dir", type=Path, help="keep saved prompts here across restarts (off)")
    add("--prompt-cache-dir-bytes", type=_size, help="size of that directory (32GiB)")
    add(
        "--keep-billing-header",
        action="store_true",
        help="leave Claude Code's x-anthropic-billing-header line, which changes, in the prompt",
    )


def _add_access_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("access").add_argument
    add("--api-key", help=f"key that clients must send (${KEY_VARIABLE}; none)")
    add("--insecure", action="store_true", help="listen beyond this machine without a key")
    add(
        "--cors-origin",
        type=_origin,
        action="append",
        default=[],
        help="web page that may send requests, or '*'",
    )


def _job(options: argparse.Namespace) -> Job:
    """The options as values. Raises RequestError for a combination that is refused."""
    key = options.api_key if options.api_key is not None else os.environ.get(KEY_VARIABLE) or None
    # No header could carry another one; an empty key is a variable that was not set.
    if key is not None and not (key.isascii() and key.isprintable() and key == key.strip() != ""):
        raise RequestError("the API key must be printable ASCII without spaces around it", "api_key")
    if key is None and not is_loopback(options.host) and not options.insecure:
        raise RequestError(
            f"--host {options.host} can be reached from other machines: set --api-key, or --insecure", "host"
        )
    if options.prompt_cache_dir_bytes is not None and options.prompt_cache_dir is None:
        raise RequestError("--prompt-cache-dir-bytes needs --prompt-cache-dir", "prompt_cache_dir_bytes")
    mtp = cast(MTPChoice, options.mtp if options.mtp in ("auto", "off") else int(options.mtp))
    return Job(
        model=options.model,
        dtype=options.dtype,
        host=options.host,
        port=options.port,
        name=options.model_name,
        aliases=tuple(options.model_alias),
        defaults=GenerationDefaults(
            options.temp,
            options.top_p,
            options.max_tokens,
            mtp,
            not options.no_lookup,
            options.keep_billing_header,
        ),
        prefill_step_size=options.prefill_step_size,
        max_context=options.max_context,
        max_queue=options.max_queue,
        api_key=key,
        cors_origins=frozenset(options.cors_origin),
        max_body_bytes=options.max_body_bytes,
        keepalive_s=options.keepalive,
        request_timeout_s=options.request_timeout,
        prompt_cache_bytes=options.prompt_cache_bytes,
        prompt_cache_dir=options.prompt_cache_dir,
        prompt_cache_dir_bytes=PROMPT_CACHE_DIR_BYTES
        if options.prompt_cache_dir_bytes is None
        else options.prompt_cache_dir_bytes,
        log_level=options.log_level,
    )


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value <= 65535:
        raise argparse.ArgumentTypeError("must be between 0 and 65535")
    return value


def _origin(text: str) -> str:
    parts = urlsplit(text)
    # As browsers spell it, since it is compared as it is: nothing behind the host, and no default port.
    is_default = (parts.scheme, parts.port) in (("http", 80), ("https", 443))
    is_origin = bool(parts.netloc) and text == f"{parts.scheme}://{parts.netloc}".lower() and not is_default
    if not is_origin and text not in ("*", "null"):
        raise argparse.ArgumentTypeError(f"{text!r} is no origin; write https://example.com, or '*'")
    return text


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError("must be above 0")
    return value


def _fraction(most: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = float(text)
        if not 0 <= value <= most:
            raise argparse.ArgumentTypeError(f"must be between 0 and {most}")
        return value

    return parse


def _size(text: str) -> int:
    """Bytes: a number, or one with KB, MB, GB, KiB, MiB or GiB."""
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    number = text.rstrip("kKmMgGiIbB ")
    unit = text[len(number) :].strip().upper()
    if unit not in units or not number or not 0 <= float(number) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 8GB, or a number of bytes")
    return int(float(number) * units[unit])


if __name__ == "__main__":
    main()
