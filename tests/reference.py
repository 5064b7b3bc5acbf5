"""The model written a second time from its formulas, in plain numpy and float64, one sequence, no caches.

Slow and obvious on purpose: it shares no code with the package beyond the parsed config.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_step35.config import LayerConfig, ModelConfig

Array = NDArray[np.float64]


class Reference:
    """Takes tensors under the release's names, norms stored as w."""

    def __init__(self, raw: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
        self.config = ModelConfig.from_hf(raw)
        self.tensors = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}

    def hidden(self, ids: list[int]) -> Array:
        """The residual stream after the last backbone layer, before the final norm: (T, D)."""
        x = self.tensors["model.embed_tokens.weight"][ids]
        for layer in self.config.layers:
            x = self.block(layer, x)
        return x

    def logits(self, ids: list[int]) -> Array:
        return self.norm(self.hidden(ids), "model.norm") @ self.tensors["lm_head.weight"].T

    def mtp_hidden(self, ids: list[int]) -> list[Array]:
        """Per MTP layer k its output for rows 0 .. T-2-k: row i has seen token i+1+k."""
        embeddings = self.tensors["model.embed_tokens.weight"][ids]
        carry, outputs = self.hidden(ids), []
        for k, layer in enumerate(self.config.mtp_layers):
            rows = len(ids) - 1 - k
            prefix = f"model.layers.{layer.index}"
            tokens = self.norm(embeddings[1 + k :], f"{prefix}.enorm")
            states = self.norm(carry[:rows], f"{prefix}.hnorm")
            fused = np.concatenate([tokens, states], axis=-1) @ self.tensors[f"{prefix}.eh_proj.weight"].T
            carry = self.block(layer, fused)
            outputs.append(carry)
        return outputs

    def mtp_logits(self, k: int, hidden: Array) -> Array:
        prefix = f"model.layers.{self.config.mtp_layers[k].index}.transformer.shared_head"
        return self.norm(hidden, f"{prefix}.norm") @ self.tensors[f"{prefix}.output.weight"].T

    def block(self, layer: LayerConfig, x: Array) -> Array:
        prefix = f"model.layers.{layer.index}"
        x = x + self.attention(layer, self.norm(x, f"{prefix}.input_layernorm"))
        normed = self.norm(x, f"{prefix}.post_attention_layernorm")
        if layer.is_moe:
            return x + self.moe(layer, normed)
        return x + self.mlp(f"{prefix}.mlp", normed, layer.swiglu_limit_shared)

    def norm(self, x: Array, name: str) -> Array:
        scale = 1.0 / np.sqrt((x * x).mean(-1, keepdims=True) + self.config.rms_norm_eps)
        return x * scale * (1.0 + self.tensors[f"{name}.weight"])

    def attention(self, layer: LayerConfig, x: Array) -> Array:
        prefix, length = f"model.layers.{layer.index}.self_attn", len(x)

        def heads(name: str) -> Array:
            projected = x @ self.tensors[f"{prefix}.{name}_proj.weight"].T
            return projected.reshape(length, -1, layer.head_dim)

        queries = rotate(layer, self.norm(heads("q"), f"{prefix}.q_norm"))
        keys = rotate(layer, self.norm(heads("k"), f"{prefix}.k_norm"))
        values = heads("v")
        gate = sigmoid(x @ self.tensors[f"{prefix}.g_proj.weight"].T)
        output = np.zeros_like(queries)
        group = layer.num_heads // layer.num_kv_heads
        for head in range(layer.num_heads):
            for i in range(length):
                first = 0 if layer.window is None else max(0, i - layer.window + 1)
                scores = keys[first : i + 1, head // group] @ queries[i, head] / np.sqrt(layer.head_dim)
                weights = np.exp(scores - scores.max())
                output[i, head] = weights / weights.sum() @ values[first : i + 1, head // group]
        gated = output * gate[:, :, None]
        return gated.reshape(length, -1) @ self.tensors[f"{prefix}.o_proj.weight"].T

    def moe(self, layer: LayerConfig, x: Array) -> Array:
        prefix = f"model.layers.{layer.index}"
        scores = sigmoid(x @ self.tensors[f"{prefix}.moe.gate.weight"].T)
        ranking = scores + self.tensors[f"{prefix}.moe.router_bias"]
        routed = np.zeros_like(x)
        for i, row in enumerate(x):
            chosen = np.argsort(-ranking[i])[: self.config.top_k]
            weights = scores[i, chosen] / (scores[i, chosen].sum() + 1e-20)
            for expert, weight in zip(chosen, weights * self.config.router_scaling_factor, strict=True):
                routed[i] += weight * self.expert(f"{prefix}.moe", int(expert), row, layer.swiglu_limit)
        return routed + self.mlp(f"{prefix}.share_expert", x, layer.swiglu_limit_shared)

    def expert(self, prefix: str, expert: int, x: Array, limit: float | None) -> Array:
        gate, up, down = (
            self.tensors[f"{prefix}.{name}_proj.weight"][expert] for name in ("gate", "up", "down")
        )
        return swiglu(x @ gate.T, x @ up.T, limit) @ down.T

    def mlp(self, prefix: str, x: Array, limit: float | None) -> Array:
        gate, up, down = (self.tensors[f"{prefix}.{name}_proj.weight"] for name in ("gate", "up", "down"))
        return swiglu(x @ gate.T, x @ up.T, limit) @ down.T


def sigmoid(x: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-x))


def swiglu(gate: Array, up: Array, limit: float | None) -> Array:
    activated = gate * sigmoid(gate)
    if limit is not None:
        activated, up = np.minimum(activated, limit), np.clip(up, -limit, limit)
    return activated * up


def rotate(layer: LayerConfig, x: Array) -> Array:
    """Half-split rotation of (T, H, D) at positions 0 .. T-1, the first `rotary_dims` only."""
    dims = layer.rope.rotary_dims
    angles = np.arange(len(x))[:, None] * inverse_frequencies(layer)[None]
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    first, second, rest = x[..., : dims // 2], x[..., dims // 2 : dims], x[..., dims:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def inverse_frequencies(layer: LayerConfig) -> Array:
    """Radians per position of each rotated pair."""
    rope = layer.rope
    frequencies = rope.theta ** (-np.arange(0, rope.rotary_dims, 2) / rope.rotary_dims)
    if rope.scaling is None:
        return frequencies
    scaling, scaled = rope.scaling, []
    for frequency in frequencies:
        wavelength = 2 * np.pi / frequency
        if wavelength < scaling.original_context_length / scaling.high_freq_factor:
            scaled.append(frequency)
        elif wavelength > scaling.original_context_length / scaling.low_freq_factor:
            scaled.append(frequency / scaling.factor)
        else:
            smooth = (scaling.original_context_length / wavelength - scaling.low_freq_factor) / (
                scaling.high_freq_factor - scaling.low_freq_factor
            )
            scaled.append((1 - smooth) * frequency / scaling.factor + smooth * frequency)
    return np.array(scaled)
