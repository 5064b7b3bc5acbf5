"""Speed estimates: decode from bytes and bandwidth, prefill from arithmetic, scaled by published figures.

A decode round takes as long as its reads at a machine's effective bandwidth, which one figure at an empty
context fixes; a prefill as long as its products and attention at an effective rate, likewise. Nothing here
was measured with this package: every estimate is labelled as one where it is shown.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mlx_step35.config import ModelConfig
from mlx_step35.costs import expected_experts, kv_bytes, kv_bytes_per_token, sizes_by_kind, total
from mlx_step35.layout import Recipe, backbone_weights
from mlx_step35.memory import Stored, stored

# No verify is wider: one token and 15 drafts.
MAX_WIDTH = 16

# Share of rounds in which the first, the first two and all three drafts are right; reported for Step-3.7's
# layers on code and prose. The real ones depend on the text.
ACCEPTANCE = (0.80, 0.64, 0.50)


@dataclass(frozen=True, slots=True)
class Chip:
    """An Apple chip: memory bandwidth in bytes per second, and the GPU cores of its largest version."""

    name: str
    bandwidth: float
    gpu_cores: int

    @property
    def generation(self) -> str:
        return self.name.split()[0]


def _chips(*rows: tuple[str, float, int]) -> dict[str, Chip]:
    return {name: Chip(name, gigabytes * 1e9, cores) for name, gigabytes, cores in rows}


# Bandwidths as Apple gives them. Where a name has two, the one of the version with more GPU cores: only that
# one comes with enough memory for this model.
CHIPS = _chips(
    ("M1", 68.25, 8), ("M1 Pro", 200, 16), ("M1 Max", 400, 32), ("M1 Ultra", 800, 64),
    ("M2", 100, 10), ("M2 Pro", 200, 19), ("M2 Max", 400, 38), ("M2 Ultra", 800, 76),
    ("M3", 100, 10), ("M3 Pro", 150, 18), ("M3 Max", 400, 40), ("M3 Ultra", 819, 80),
    ("M4", 120, 10), ("M4 Pro", 273, 20), ("M4 Max", 546, 40),
    ("M5", 153, 10), ("M5 Pro", 307, 20), ("M5 Max", 614, 40),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Published:
    """Decode and prefill in tokens per second by context, as somebody published them.

    `kv_value_bytes` is the size of a cached value there. The weights had 4.5 bits each.
    """

    machine: str
    bandwidth: float
    kv_value_bytes: float
    decode: tuple[tuple[int, float], ...]
    prefill: tuple[tuple[int, float], ...] = ()


# llama.cpp, Q4_K_S; from StepFun's docs/step3.5-flash.md in its llama.cpp fork.
M4_MAX = Published(
    "M4 Max, 128 GB",
    546e9,
    2,
    decode=(
        (0, 48.2), (2048, 46.0), (8192, 43.9), (16384, 41.3), (32768, 38.2), (65536, 31.5), (262144, 8.9)
    ),
    prefill=((2048, 406), (8192, 392), (16384, 373), (32768, 336), (65536, 274), (262144, 120)),
)  # fmt: skip
# The same with keys and values in q8_0: 34 bytes for 32 values.
DGX_SPARK = Published(
    "DGX Spark",
    273e9,
    34 / 32,
    decode=(
        (0, 19.8), (2048, 20.3), (8192, 20.3), (16384, 19.2), (32768, 17.8), (65536, 15.4), (262144, 8.4)
    ),
)  # fmt: skip
PUBLISHED = (M4_MAX, DGX_SPARK)

# Prompt length and tokens per second that fix the prefill rate of a chip generation, and the GPU cores that
# reached it. M3: Step-3.7 at 4 bits with mlx-lm on a 60-core M3 Ultra, "about 430 beyond 10K" (jundot/omlx).
# M5's cores have matrix units, which nothing published speaks of.
_PREFILL_REFERENCES = {"M3": (10240, 430.0, 60), "M4": (2048, 406.0, 40)}


class Reads:
    """Bytes a decode round reads: weights once, experts by the union of what its tokens choose, KV once.

    The embedding is not among `backbone_bytes`: a pass reads one row of it per token.
    """

    def __init__(
        self,
        config: ModelConfig,
        backbone_bytes: int,
        expert_bytes: int,
        mtp_bytes: Sequence[int],
        kv_value_bytes: float = 2,
    ) -> None:
        share = 1 / config.num_experts if config.num_experts else 0.0
        self._pass_bytes = [
            backbone_bytes + expert_bytes * expected_experts(config, width) * share
            for width in range(MAX_WIDTH + 1)
        ]
        self._mtp_bytes = [sum(mtp_bytes[:depth]) for depth in range(len(mtp_bytes) + 1)]
        self._token_bytes = kv_bytes_per_token(config, 1) * kv_value_bytes
        self._window = config.window or 1
        window_bytes = kv_bytes(config, self._window, 1) - kv_bytes_per_token(config, 1) * self._window
        self._window_bytes = window_bytes * kv_value_bytes

    @classmethod
    def of_tensors(cls, config: ModelConfig, tensors: Iterable[Stored], kv_value_bytes: float = 2) -> "Reads":
        """What a checkpoint of these tensors reads."""
        backbone = experts = 0
        heads = [0] * len(config.mtp_layers)
        for entry in tensors:
            if entry.mtp_layer is not None:
                heads[entry.mtp_layer] += entry.tensor.nbytes
            elif entry.kind == "experts":
                experts += entry.tensor.nbytes
            elif entry.kind != "embedding" or config.tie_word_embeddings:
                backbone += entry.tensor.nbytes
        return cls(config, backbone, experts, heads, kv_value_bytes)

    @classmethod
    def of_recipe(cls, config: ModelConfig, recipe: Recipe, kv_value_bytes: float = 2) -> "Reads":
        """What a conversion by that recipe reads."""
        return cls.of_tensors(config, stored(config, recipe), kv_value_bytes)

    def round_bytes(self, num_drafts: int, context: int, *, by_mtp: bool = True) -> float:
        """Bytes of drafting that many tokens and verifying them in one pass."""
        cached = self._token_bytes * context + self._window_bytes * min(context / self._window, 1.0)
        heads = self._mtp_bytes[num_drafts] if by_mtp else 0
        return self._pass_bytes[num_drafts + 1] + heads + cached


@dataclass(frozen=True, slots=True)
class DecodeEstimate:
    """Tokens per second at a context length without drafts, and with 1, 2, ... of them."""

    context: int
    by_depth: tuple[float, ...]


def decode_estimates(
    reads: Reads, bandwidth: float, contexts: Sequence[int], max_depth: int
) -> list[DecodeEstimate]:
    """Decode speed at an effective bandwidth."""
    return [
        DecodeEstimate(
            context,
            tuple(
                (1 + sum(ACCEPTANCE[:depth])) * bandwidth / reads.round_bytes(depth, context)
                for depth in range(max_depth + 1)
            ),
        )
        for context in contexts
    ]


def efficiency(published: Published, config: ModelConfig, recipe: Recipe) -> float:
    """Share of the bandwidth that the machine reached at its first, emptiest context."""
    context, tokens_per_s = published.decode[0]
    reads = Reads.of_recipe(config, recipe, published.kv_value_bytes)
    return tokens_per_s * reads.round_bytes(0, context) / published.bandwidth


def predictions(published: Published, config: ModelConfig, recipe: Recipe) -> list[tuple[int, float, float]]:
    """Context, published and predicted decode speed of every point."""
    reads = Reads.of_recipe(config, recipe, published.kv_value_bytes)
    bandwidth = published.bandwidth * efficiency(published, config, recipe)
    return [
        (context, tokens_per_s, bandwidth / reads.round_bytes(0, context))
        for context, tokens_per_s in published.decode
    ]


def prefill_flops(config: ModelConfig, num_tokens: int) -> float:
    """Arithmetic of a prompt from an empty cache: active weights of every token, and attention."""
    sizes = sizes_by_kind(backbone_weights(config), Recipe("", {}))
    experts = sizes["experts"].parameters * config.top_k / config.num_experts if config.num_experts else 0
    # The head runs for the last token only.
    everything = total(
        {kind: size for kind, size in sizes.items() if kind not in ("embedding", "head", "experts")}
    )
    products = 2 * (everything.parameters + experts) * num_tokens
    attention = 0.0
    for layer in config.layers:
        window = min(layer.window or num_tokens, num_tokens)
        pairs = window * (window + 1) / 2 + window * (num_tokens - window)
        attention += 4 * layer.num_heads * layer.head_dim * pairs
    return products + attention


def prefill_rate(chip: Chip, config: ModelConfig) -> float | None:
    """Arithmetic per second that the chip reaches, None if nothing is published for its generation."""
    if chip.generation not in _PREFILL_REFERENCES:
        return None
    num_tokens, tokens_per_s, cores = _PREFILL_REFERENCES[chip.generation]
    return prefill_flops(config, num_tokens) * tokens_per_s / num_tokens * chip.gpu_cores / cores


def prefill_speed(config: ModelConfig, rate: float, num_tokens: int) -> float:
    """Tokens per second over a whole prompt of that length."""
    return num_tokens * rate / prefill_flops(config, num_tokens)
