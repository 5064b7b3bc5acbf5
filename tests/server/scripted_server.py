"""The real server on a scripted engine: `python -m tests.server.scripted_server --port 8090`."""

import argparse
import asyncio
import logging
import sys

from mlx_step35.api.models import Served
from mlx_step35.chat.replay import LIMIT_BYTES
from mlx_step35.engine.engine import Engine
from mlx_step35.http.access import QuietBreaks
from mlx_step35.http.listening import bind
from mlx_step35.http.preparing import Preparer
from mlx_step35.http.settings import GenerationDefaults, ServerSettings
from mlx_step35.server import serve
from tests.server.scripted import Script, nano_texts, obey, scripted_runner


def main(script: Script = obey) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8090)
    parser.add_argument("--key", default="sk-test")
    parser.add_argument("--ctx", type=int, default=4096)
    parser.add_argument("--max-body", type=int, default=1_000_000)
    parser.add_argument("--queue", type=int, default=4)
    parser.add_argument("--keepalive", type=float, default=1.5)
    parser.add_argument("--token-s", type=float, default=0.0)
    parser.add_argument("--prompt-cache-bytes", type=int, default=10**9)
    parser.add_argument("--turn-memory-bytes", type=int, default=LIMIT_BYTES)
    parser.add_argument("--shutdown-s", type=float, default=10.0)
    options = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    logging.getLogger("uvicorn.error").addFilter(QuietBreaks())
    tokenizer, template = nano_texts()
    preparer = Preparer(tokenizer, template, GenerationDefaults(), options.ctx, options.turn_memory_bytes)
    engine = Engine(
        lambda: scripted_runner(tokenizer, options.ctx, script, options.token_s, options.prompt_cache_bytes),
        options.queue,
    )
    settings = ServerSettings(
        served=Served("step-3.5-flash", frozenset({"nano"}), options.ctx, 1_760_000_000),
        api_key=options.key,
        max_body_bytes=options.max_body,
        keepalive_s=options.keepalive,
        shutdown_s=options.shutdown_s,
    )
    return asyncio.run(serve(engine, preparer, settings, bind("127.0.0.1", options.port)))


if __name__ == "__main__":
    sys.exit(main())
