"""What a running model takes: resident weights, allocated caches, the workspace of a prefill, their peak.

Pure functions on top of `costs`. Where a file's bytes and memory's differ, memory counts: routers are held in
float32, buffers have spare rows, and on the CPU everything unpacked is float32 and attention scores exist.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod

from mlx_step35.config import LayerConfig, ModelConfig
from mlx_step35.costs import GIB, mtp_kv_bytes
from mlx_step35.layout import DTYPE_BYTES, Kind, Recipe, Tensor, backbone_weights, mtp_weights, stored_tensors

# Spare rows of a cache's buffers: sliding layers keep this many older ones for rollbacks, and write this many
# before they move the window; full layers grow by an eighth in steps of so many.
SLACK = 16
SLIDING_ROOM = 64
GROWTH_ROWS = 256

# Queries that attention handles at a time where it works in blocks, if the window is not longer.
CAUSAL_BLOCK = 128

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


def workspace_bytes(config: ModelConfig, chunk: int, context: int, backend: Backend = GPU) -> int:
    """Intermediate arrays of the widest layer of a prefill pass over `chunk` tokens.

    Layers run one after the other, so one layer's arrays are the peak; twice, because MLX allocates for
    operations ahead while those before them are still running. Measured: 1.0 to 2.1 times one layer's.
    """
    return 2 * max(_layer_workspace(config, layer, chunk, context, backend) for layer in config.layers)


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
    size, hidden = backend.value_bytes, chunk * config.hidden_size
    heads = chunk * layer.num_heads
    # Queries before and after the norm and the rotation, and the output.
    attention = 4 * heads * layer.head_dim * size
    row_bytes = 2 * layer.num_kv_heads * layer.head_dim * size
    if layer.window is None:
        # The buffer is copied into a larger one, so for a moment there are both.
        queries, keys = min(chunk, CAUSAL_BLOCK), context
        attention += keys * row_bytes
    else:
        queries = min(chunk, max(layer.window, CAUSAL_BLOCK))
        keys = min(context, queries + layer.window - 1)
        # The mask of a block and the distances it is made from; keys and values of the chunk in one piece.
        attention += 5 * queries * keys + min(context, chunk + layer.window - 1) * row_bytes
    if not backend.has_fused_attention:
        # Scores and their softmax of a block in float32, and keys transposed.
        attention += 2 * queries * layer.num_heads * keys * 4 + keys * row_bytes
    if layer.is_moe:
        pairs = chunk * config.top_k
        # The experts' outputs in sorted and in token order, or the latter and its float32 product with the
        # routing weights; before that their inputs, gate, up and what these give.
        outputs = pairs * config.hidden_size * max(2 * size, size + 4)
        inside = pairs * (config.hidden_size + 3 * config.moe_intermediate_size) * size
        feed_forward = max(outputs, inside)
    else:
        feed_forward = 3 * chunk * layer.intermediate_size * size
    return 3 * hidden * size + max(attention, feed_forward)
