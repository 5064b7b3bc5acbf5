"""Grouped-query attention with per-head norms, partial rotary embedding and a sigmoid gate per head.

Full and sliding layers differ only in what their LayerConfig says; which keys a query sees is the mask's
and the cache's business.
"""

import math
from functools import partial

import mlx.core as mx
import mlx.nn as nn

from mlx_step35.cache import AttentionCache, Mask, window_mask
from mlx_step35.config import LayerConfig, Llama3Scaling, ModelConfig, RopeConfig
from mlx_step35.products import attend

# Fewer queries in one attention call than this are not worth a call.
MIN_BLOCK = 128


class Attention(nn.Module):
    """x (B, L, D) to (B, L, D); appends its keys and values to the cache if there is one."""

    def __init__(self, config: ModelConfig, layer: LayerConfig) -> None:
        super().__init__()
        hidden_size, head_dim = config.hidden_size, layer.head_dim
        self.num_heads = layer.num_heads
        self.num_kv_heads = layer.num_kv_heads
        self.head_dim = head_dim
        self.scale = head_dim**-0.5
        self.window = layer.window
        self.q_proj = nn.Linear(hidden_size, layer.num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, layer.num_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, layer.num_kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(layer.num_heads * head_dim, hidden_size, bias=False)
        self.has_gate = config.use_head_gate
        if self.has_gate:
            self.g_proj = nn.Linear(hidden_size, layer.num_heads, bias=False)
        self.q_norm = nn.RMSNorm(head_dim, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(head_dim, eps=config.rms_norm_eps)
        self.rope = Rope(layer.rope)

    def __call__(self, x: mx.array, mask: Mask = None, cache: AttentionCache | None = None) -> mx.array:
        batch, length, _ = x.shape
        offset = 0 if cache is None else cache.offset
        queries = self.q_norm(self.q_proj(x).reshape(batch, length, self.num_heads, self.head_dim))
        queries = self.rope(queries.transpose(0, 2, 1, 3), offset)
        keys, values = self._keys_and_values(x, offset)
        if cache is not None:
            keys, values = cache.update(keys, values)
        output = self._attend(queries, keys, values, mask)
        output = output.transpose(0, 2, 1, 3)
        if self.has_gate:
            # One scalar per head, from the same normed input that feeds q_proj.
            output = _gated(output, self.g_proj(x)[..., None])
        return self.o_proj(output.reshape(batch, length, -1))

    def absorb(self, x: mx.array, cache: AttentionCache) -> None:
        """Append the keys and values of x (B, L, D) and compute nothing else."""
        cache.update(*self._keys_and_values(x, cache.offset))

    def _keys_and_values(self, x: mx.array, offset: int | mx.array) -> tuple[mx.array, mx.array]:
        # Norm before rotation; one weight vector for all heads. (B, L, H, D) -> (B, H, L, D)
        shape = (*x.shape[:2], self.num_kv_heads, self.head_dim)
        keys = self.k_norm(self.k_proj(x).reshape(shape)).transpose(0, 2, 1, 3)
        return self.rope(keys, offset), self.v_proj(x).reshape(shape).transpose(0, 2, 1, 3)

    def _attend(self, queries: mx.array, keys: mx.array, values: mx.array, mask: Mask) -> mx.array:
        length, num_past = queries.shape[2], keys.shape[2] - queries.shape[2]
        block = max(self.window or length, MIN_BLOCK)
        if self.window is None or length < 2 * block:
            return attend(queries, keys, values, self.scale, mask)
        # A long chunk in blocks, each over the keys its windows reach: in one call most scores are masked.
        outputs = []
        for start in range(0, length, block):
            end = min(start + block, length)
            first = max(num_past + start - (self.window - 1), 0)
            outputs.append(
                attend(
                    queries[:, :, start:end],
                    keys[:, :, first : num_past + end],
                    values[:, :, first : num_past + end],
                    self.scale,
                    window_mask(end - start, num_past + start - first, self.window),
                )
            )
        return mx.concatenate(outputs, axis=2)


class Rope(nn.Module):
    """Half-split rotation of the first `rotary_dims` dimensions of each head."""

    def __init__(self, rope: RopeConfig) -> None:
        super().__init__()
        self.dims = rope.rotary_dims
        self._theta = None if rope.scaling else rope.theta
        self._wavelengths = scaled_wavelengths(rope.theta, self.dims, rope.scaling) if rope.scaling else None

    def __call__(self, x: mx.array, offset: int | mx.array) -> mx.array:
        return mx.fast.rope(
            x,
            self.dims,
            traditional=False,
            base=self._theta,
            scale=1.0,
            offset=offset,
            freqs=self._wavelengths,
        )


def scaled_wavelengths(theta: float, dims: int, scaling: Llama3Scaling) -> mx.array:
    """Positions per radian of each rotated pair under llama3 scaling, as `mx.fast.rope` takes them.

    Long wavelengths are stretched by `factor`, short ones kept, with a linear transition in frequency
    between.
    """
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelengths = []
    for pair in range(0, dims, 2):
        wavelength = theta ** (pair / dims)
        turns = scaling.original_context_length / (2 * math.pi * wavelength)
        kept = min(max((turns - low) / (high - low), 0.0), 1.0)
        wavelengths.append(wavelength / (kept + (1 - kept) / scaling.factor))
    return mx.array(wavelengths, dtype=mx.float32)


@partial(mx.compile, shapeless=True)
def _gated(output: mx.array, gate: mx.array) -> mx.array:
    return output * mx.sigmoid(gate)
