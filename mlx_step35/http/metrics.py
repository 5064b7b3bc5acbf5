"""Figures for Prometheus, in a registry of their own."""

import logging

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mlx_step35.engine.engine import Engine
from mlx_step35.engine.request import Finished, Token
from mlx_step35.engine.session import Reuse

logger = logging.getLogger(__name__)

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)
# Names of unknown fields that are logged; more than clients can have meant.
_MAX_NAMES = 1000
_MAX_NAME_LENGTH = 100


class Metrics:
    """Counters of one server."""

    def __init__(self, engine: Engine) -> None:
        self.registry = registry = CollectorRegistry()
        name = "mlx_step35_"
        self.requests = Counter(name + "requests", "Requests", ["endpoint", "status"], registry=registry)
        self.tokens = Counter(
            name + "tokens",
            "Tokens: prompt, cached (part of prompt), generated, reasoning",
            ["kind"],
            registry=registry,
        )
        self._generated = self.tokens.labels("generated")
        self._reasoning = self.tokens.labels("reasoning")
        self.first_token = Histogram(
            name + "first_token_seconds",
            "Time to the first text, waiting included",
            ["endpoint"],
            registry=registry,
            buckets=_SECONDS,
        )
        self.duration = Histogram(
            name + "request_seconds",
            "Time to the end of an answer, waiting included",
            ["endpoint"],
            registry=registry,
            buckets=_SECONDS,
        )
        self.prefill_s = Counter(name + "prefill_seconds", "Time spent on prompts", registry=registry)
        self.decode_s = Counter(name + "decode_seconds", "Time spent on generating", registry=registry)
        self.passes = Counter(name + "forward_passes", "Forward passes of generating", registry=registry)
        self.drafts = Counter(
            name + "drafts",
            "Drafted and accepted tokens by source and place in the round",
            ["outcome", "source", "depth"],
            registry=registry,
        )
        self.reuse = Counter(
            name + "prompt_reuse",
            "Prompts by what kept the reused prefix from being longer",
            ["source", "limited_by"],
            registry=registry,
        )
        self.unknown_fields = Counter(
            name + "unknown_fields", "Request fields that nobody knows", ["endpoint"], registry=registry
        )
        self.failed_streams = Counter(
            name + "failed_streams",
            "Streams that ended in an error, by its code; their status is 200",
            ["endpoint", "error"],
            registry=registry,
        )
        self.abandoned = Counter(
            name + "abandoned", "Requests whose client left", ["endpoint"], registry=registry
        )
        self._memory = Gauge(
            name + "memory_bytes", "Bytes of arrays: active, peak, prompt_cache", ["kind"], registry=registry
        )
        open_requests = Gauge(name + "open_requests", "Requests running and waiting", registry=registry)
        open_requests.set_function(lambda: engine.num_open)
        waiting = Gauge(name + "waiting_requests", "Requests waiting", registry=registry)
        waiting.set_function(lambda: engine.num_waiting)
        self._seen: set[str] = set()

    def text(self) -> bytes:
        """All figures in Prometheus' format."""
        return generate_latest(self.registry)

    def note_started(self, reuse: Reuse) -> None:
        """Add a prompt that the model begins to read."""
        self.tokens.labels("prompt").inc(reuse.prompt_tokens)
        self.tokens.labels("cached").inc(reuse.cached_tokens)
        self.reuse.labels(reuse.source, reuse.limited_by).inc()

    def note_token(self, event: Token) -> None:
        """Add a token; answers that are cut or abandoned have some, too."""
        self._generated.inc()
        self._reasoning.inc(event.is_reasoning)

    def note_finished(self, event: Finished) -> None:
        """Add a finished answer."""
        stats = event.stats
        self.prefill_s.inc(stats.prompt_s)
        self.decode_s.inc(stats.generation_s)
        self.passes.inc(stats.forward_passes)
        for outcome, table in (("drafted", stats.drafted), ("accepted", stats.accepted)):
            for source, row in table.items():
                for depth, count in enumerate(row, 1):
                    self.drafts.labels(outcome, source, str(depth)).inc(count)
        memory = event.memory
        self._memory.labels("active").set(memory.active_bytes)
        self._memory.labels("peak").set(memory.peak_bytes)
        self._memory.labels("prompt_cache").set(memory.prompt_cache_bytes)

    def note_unknown(self, endpoint: str, names: tuple[str, ...]) -> None:
        """Count fields nobody knows; each name is logged once."""
        for name in names:
            self.unknown_fields.labels(endpoint).inc()
            # A name may be as long as a body.
            shown = name[:_MAX_NAME_LENGTH]
            if shown not in self._seen and len(self._seen) < _MAX_NAMES:
                self._seen.add(shown)
                logger.warning("%s: the request field %r is unknown and ignored", endpoint, shown)
