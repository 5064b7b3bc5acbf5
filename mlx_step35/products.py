"""Softmax attention, of many queries on the CPU from plain products.

MLX's CPU backend has no fused attention: it multiplies with the transpose of the keys, which its BLAS does at
half speed, and computes what the causal mask then throws away. A GPU always gets the fused kernel.
"""

import mlx.core as mx

from mlx_step35.cache import MAX_STEP_TOKENS, Mask

# Queries per block of a causal product: blocks leave out the keys after them, and bound the scores in memory.
CAUSAL_BLOCK = 128


def attend(queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: Mask) -> mx.array:
    """Queries (B, H, L, D) over keys and values (B, KV, T, D); a causal mask is the lower-right triangle."""
    is_cpu = mx.default_device().type == mx.DeviceType.cpu
    if not is_cpu or queries.shape[2] <= MAX_STEP_TOKENS or queries.dtype != mx.float32:
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)
    transposed = mx.contiguous(keys.swapaxes(-1, -2))
    if not isinstance(mask, str):
        return _products(queries, transposed, values, scale, mask)
    num_tokens, past = queries.shape[2], keys.shape[2] - queries.shape[2]
    outputs = []
    for start in range(0, num_tokens, CAUSAL_BLOCK):
        stop = min(start + CAUSAL_BLOCK, num_tokens)
        end = past + stop
        visible = mx.arange(end)[None] <= mx.arange(past + start, end)[:, None]
        outputs.append(
            _products(queries[:, :, start:stop], transposed[..., :end], values[:, :, :end], scale, visible)
        )
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2)


def _products(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, mask: mx.array | None
) -> mx.array:
    """Attention with keys (B, KV, D, T) and a mask (L, T)."""
    batch, num_heads, num_tokens, head_dim = queries.shape
    num_kv_heads, num_keys = keys.shape[1], keys.shape[3]
    # The heads that share keys are more rows of the same product.
    rows = (queries * scale).reshape(batch, num_kv_heads, -1, head_dim)
    scores = (rows @ keys).reshape(batch, num_kv_heads, -1, num_tokens, num_keys)
    if mask is not None:
        scores = mx.where(mask, scores, -mx.inf)
    weights = mx.softmax(scores, axis=-1).reshape(batch, num_kv_heads, -1, num_keys)
    return (weights @ values).reshape(batch, num_heads, num_tokens, head_dim)
