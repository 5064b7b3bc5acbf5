"""What a running model takes: resident weights, allocated caches, the workspace of a prefill, their peak.

Pure functions on top of `costs`. Where a file's bytes and memory's differ, memory counts: routers are held in
float32, buffers have spare rows, and on the CPU everything unpacked is float32 and attention scores exist.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod

from mlx_step35.config import LayerConfig, ModelConfig
from mlx_step35.costs import GIB, kv_bytes, kv_bytes_per_token, mtp_kv_bytes
from mlx_step35.layout import DTYPE_BYTES, Kind, Recipe, Tensor, backbone_weights, mtp_weights, stored_tensors

# Spare rows of a cache's buffers: sliding layers keep this many older ones for rollbacks, and write this many
# before they move the window; full layers grow by an eighth in steps of so many.
SLACK = 16
SLIDING_ROOM = 64
GROWTH_ROWS = 256

# Full-attention rows of saved prefixes are shared in blocks of so many tokens; each snapshot owns the rest.
SNAPSHOT_BLOCK = 256

# Queries that attention handles at a time: of a causal product on the CPU, and at least of a sliding layer.
CAUSAL_BLOCK = 128
MIN_BLOCK = 128

# Left to macOS and everything else when the GPU limit is raised; StepFun's own advice for 128 GB is the same.
RESERVE_BYTES = 8 * GIB

# Prompt tokens per pass, widest first: fewer need less workspace and lose speed.
PREFILL_CHUNKS = (2048, 1024, 512, 256, 128, 64)


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a checkpoint and what it is for; MTP tensors are named `mtp.layers.K.`."""

    kind: Kind
    tensor: Tensor

    @property
    def mtp_layer(self) -> int | None:
        name = self.tensor.name
        return int(name.split(".")[2]) if name.startswith("mtp.layers.") else None

    def resident_bytes(self, value_bytes: int) -> int:
        """Bytes in memory when unpacked values have so many bytes each."""
        if self.tensor.dtype in ("U32", "U8"):
            return self.tensor.nbytes
        size = 4 if self.kind in ("router", "bias") else value_bytes
        return prod(self.tensor.shape) * size


def stored(config: ModelConfig, recipe: Recipe, *, mtp: bool = True) -> list[Stored]:
    """Every tensor of a conversion by that recipe."""
    weights = backbone_weights(config) + (mtp_weights(config) if mtp else [])
    return [
        Stored(weight.kind, tensor)
        for weight in weights
        for tensor in stored_tensors(weight, recipe.choice(weight.path), recipe.dtype)
    ]


@dataclass(frozen=True, slots=True)
class Backend:
    """Where the model runs: bytes of a value, and whether attention scores exist in memory."""

    value_bytes: int = 2
    has_fused_attention: bool = True


GPU = Backend()
CPU = Backend(4, False)


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes in memory at a context length, at the moment of the last prefill chunk."""

    weights: int
    mtp: int
    cache: int
    drafts: int
    workspace: int

    @property
    def peak(self) -> int:
        return self.weights + self.mtp + self.cache + self.drafts + self.workspace


class Planner:
    """Footprints of one checkpoint on one backend."""

    def __init__(
        self, config: ModelConfig, weight_bytes: int, mtp_bytes: int, backend: Backend = GPU
    ) -> None:
        self._config = config
        self._weights = weight_bytes
        self._mtp = mtp_bytes
        self._backend = backend

    @classmethod
    def of_tensors(cls, config: ModelConfig, tensors: Iterable[Stored], backend: Backend = GPU) -> "Planner":
        """For a checkpoint of these tensors."""
        weights = heads = 0
        for entry in tensors:
            size = entry.resident_bytes(backend.value_bytes)
            if entry.mtp_layer is None:
                weights += size
            else:
                heads += size
        return cls(config, weights, heads, backend)

    @property
    def loaded_bytes(self) -> int:
        """Bytes of the weights alone."""
        return self._weights + self._mtp

    def footprint(self, context: int, chunk: int = PREFILL_CHUNKS[0]) -> Footprint:
        """What a prompt of `context` tokens takes, in chunks of `chunk`, with drafts if there are heads."""
        config, value_bytes = self._config, self._backend.value_bytes
        return Footprint(
            self._weights,
            self._mtp,
            allocated_bytes(config, [context], value_bytes),
            draft_bytes(config, context, value_bytes) if self._mtp else 0,
            workspace_bytes(config, min(chunk, context), context, self._backend),
        )

    def max_context(self, limit: int, chunk: int = PREFILL_CHUNKS[0]) -> int:
        """The longest context whose peak is within `limit` bytes, 0 if there is none."""
        low, high = 0, self._config.context_length
        while low < high:
            middle = (low + high + 1) // 2
            if self.footprint(middle, chunk).peak <= limit:
                low = middle
            else:
                high = middle - 1
        return low

    def growth_bytes(self, now: int, then: int, chunk: int) -> int:
        """What going from one context length to a longer one takes beyond what is allocated already."""
        config, value_bytes = self._config, self._backend.value_bytes
        before = allocated_bytes(config, [now] if now else [], value_bytes)
        added = allocated_bytes(config, [then], value_bytes) - before
        return max(added, 0) + workspace_bytes(config, min(chunk, then - now), then, self._backend)


def allocated_bytes(
    config: ModelConfig, passes: Sequence[int], value_bytes: int = 2, slack: int = SLACK
) -> int:
    """Bytes of the backbone's cache after passes of so many tokens each, spare rows included.

    A single pass is the upper bound for any other way to the same length.
    """
    rows = full_rows(passes)
    return sum(_layer_bytes(layer, rows, value_bytes, slack) for layer in config.layers)


def full_rows(passes: Sequence[int]) -> int:
    """Rows of a full layer's buffer after passes of so many tokens each."""
    capacity = end = 0
    for num_tokens in passes:
        end += num_tokens
        if end > capacity:
            capacity = full_capacity(end)
    return capacity


def full_capacity(num_tokens: int) -> int:
    """Rows to allocate for a full layer that must hold `num_tokens`: an eighth more, in whole steps."""
    wanted = num_tokens + max(num_tokens // 8, 1)
    return -(-wanted // GROWTH_ROWS) * GROWTH_ROWS


def draft_bytes(config: ModelConfig, context: int, value_bytes: int = 2, slack: int = SLACK) -> int:
    """Caches of the MTP layers, and the hidden rows they may have to run again."""
    caches = sum(_layer_bytes(layer, context, value_bytes, slack) for layer in config.mtp_layers)
    reach = mtp_kv_bytes(config, context, 1) and (config.window or context)
    depth = len(config.mtp_layers)
    rows = sum(min(context, 2 * (depth - k) * reach) for k in range(depth))
    return caches + rows * config.hidden_size * value_bytes


def snapshot_bytes(config: ModelConfig, context: int, value_bytes: int = 2, *, mtp: bool = True) -> int:
    """A saved prefix without the blocks of full-attention rows that it shares with others.

    The rows of sliding layers that a rollback may need, full-attention rows behind the last block, and the
    hidden rows from which drafts start.
    """
    kept = SLACK - 1
    sliding = kv_bytes(config, context, value_bytes, kept) - kv_bytes_per_token(config, value_bytes) * context
    tail = kv_bytes_per_token(config, value_bytes) * (context % SNAPSHOT_BLOCK)
    if not (mtp and config.mtp_layers):
        return sliding + tail
    reach = max(layer.window or config.context_length for layer in config.mtp_layers) - 1
    rows = min(context, len(config.mtp_layers) * reach + 1 + SLACK)
    return sliding + tail + rows * config.hidden_size * value_bytes


def workspace_bytes(config: ModelConfig, chunk: int, context: int, backend: Backend = GPU) -> int:
    """Intermediate arrays of the widest layer of the prefill pass that ends at `context`.

    Three quarters of all of them at once, though each is needed only by the next: MLX allocates for what is
    ahead while the operations before it still run. On the CPU peaks were 0.60 to 0.74 of all.
    """
    return 3 * max(_layer_workspace(config, layer, chunk, context, backend) for layer in config.layers) // 4


def raised_limit(memory_bytes: int) -> int:
    """Bytes the GPU may use when the wired limit is raised as far as is reasonable."""
    return max(memory_bytes - RESERVE_BYTES, 0)


def raise_command(limit_bytes: int) -> str:
    """The command line that raises the limit on macOS until the next restart."""
    return f"sudo sysctl iogpu.wired_limit_mb={limit_bytes >> 20}"


def resident_recipe(recipe: Recipe, backend: Backend) -> Recipe:
    """The recipe as memory holds it, for reads: on the CPU all that is not packed is float32."""
    return replace(recipe, dtype="F32") if backend.value_bytes == DTYPE_BYTES["F32"] else recipe


def _layer_bytes(layer: LayerConfig, rows: int, value_bytes: int, slack: int = SLACK) -> int:
    """Bytes of one layer's buffers; a full layer's have so many rows."""
    if layer.window is not None:
        rows = layer.window - 1 + slack + max(SLIDING_ROOM, slack) if rows else 0
    return 2 * layer.num_kv_heads * layer.head_dim * value_bytes * rows


def _layer_workspace(
    config: ModelConfig, layer: LayerConfig, chunk: int, context: int, backend: Backend
) -> int:
    # Both norms, both parts' outputs and both sums with the residual stream.
    stream = 6 * chunk * config.hidden_size * backend.value_bytes
    feed_forward = _feed_forward_workspace(config, layer, chunk, backend)
    return stream + _attention_workspace(layer, chunk, context, backend) + feed_forward


def _attention_workspace(layer: LayerConfig, chunk: int, context: int, backend: Backend) -> int:
    size = backend.value_bytes
    row_bytes = 2 * layer.num_kv_heads * layer.head_dim * size
    # A full layer's buffer is copied into a larger one; a sliding layer joins its rows and the chunk's.
    reach = context if layer.window is None else min(context, chunk + layer.window - 1)
    # Queries projected, normed and rotated; the output of blocks, joined, and gated.
    queries = 6 * chunk * layer.num_heads * layer.head_dim * size
    cells = _score_cells(layer.window, chunk, context - chunk)
    # A mask, and the distances it is made from.
    attention = queries + reach * row_bytes + (0 if layer.window is None else 7 * cells)
    if not backend.has_fused_attention:
        # Scores, which their softmax replaces; queries scaled, and keys transposed.
        scaled = chunk * layer.num_heads * layer.head_dim * size
        attention += 4 * cells * layer.num_heads + scaled + reach * row_bytes // 2
    return attention


def _feed_forward_workspace(config: ModelConfig, layer: LayerConfig, chunk: int, backend: Backend) -> int:
    size = backend.value_bytes
    if not layer.is_moe:
        return 3 * chunk * layer.intermediate_size * size
    # The experts' inputs, their outputs in sorted and in token order, and the float32 product of the latter
    # with the routing weights; gate, up and what these give; the same three of the shared expert.
    outside = config.top_k * config.hidden_size * (3 * size + 4)
    inside = 3 * (config.top_k * config.moe_intermediate_size + config.share_expert_dim) * size
    return chunk * (outside + inside)


def _score_cells(window: int | None, chunk: int, past: int) -> int:
    """Pairs of a query and a key in the blocks that attention works in, masked ones included."""
    if window is None or past + chunk <= window:
        return sum(length * (past + end) for end, length in _blocks(chunk, CAUSAL_BLOCK))
    block = max(window, MIN_BLOCK)
    if chunk < 2 * block:
        return chunk * (min(past, window - 1) + chunk)
    return sum(
        length * (min(past + end - length, window - 1) + length) for end, length in _blocks(chunk, block)
    )


def _blocks(chunk: int, block: int) -> list[tuple[int, int]]:
    """End and length of every block of a chunk."""
    ends = [*range(block, chunk, block), chunk]
    return [(end, end - start) for start, end in zip([0, *ends], ends, strict=False)]
