"""The multi-token-prediction layers: what each computes for one row, and their chain.

With h0 the backbone's residual stream before the final norm, layer k turns row i into

    h(k+1)_i = block_k(eh_proj([enorm(embedding of token i+1+k) ; hnorm(h(k)_i)]))

and its own head predicts token i+2+k. The chain carries h before the head's norm. Each layer has its own
keys and values and its own window; the embedding is the backbone's.
"""

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_step35.attention import Attention
from mlx_step35.cache import (
    DEFAULT_SLACK,
    AttentionCache,
    CompiledStep,
    LayerCache,
    Mask,
    make_layer_cache,
    window_mask,
)
from mlx_step35.config import LayerConfig, ModelConfig
from mlx_step35.moe import MLP


class SharedHead(nn.Module):
    """Norm and output matrix of one layer; despite the checkpoint's name nothing is shared."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def __call__(self, hidden: mx.array) -> mx.array:
        return self.output(self.norm(hidden))


class MTPLayer(nn.Module):
    """One prediction layer: the fusion of embedding and hidden state, a decoder block, a head."""

    def __init__(self, config: ModelConfig, layer: LayerConfig) -> None:
        super().__init__()
        hidden_size, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = nn.RMSNorm(hidden_size, eps=eps)
        self.hnorm = nn.RMSNorm(hidden_size, eps=eps)
        self.eh_proj = nn.Linear(2 * hidden_size, hidden_size, bias=False)
        self.input_layernorm = nn.RMSNorm(hidden_size, eps=eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(hidden_size, eps=eps)
        self.mlp = MLP(hidden_size, layer.intermediate_size, layer.swiglu_limit_shared)
        self.shared_head = SharedHead(config)

    def __call__(
        self, embeddings: mx.array, hidden: mx.array, mask: Mask, cache: AttentionCache | None
    ) -> mx.array:
        x = self._fuse(embeddings, hidden)
        x = x + self.self_attn(self.input_layernorm(x), mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))

    def absorb(self, embeddings: mx.array, hidden: mx.array, cache: AttentionCache) -> None:
        """Advance the cache over rows whose outputs nobody needs."""
        self.self_attn.absorb(self.input_layernorm(self._fuse(embeddings, hidden)), cache)

    def _fuse(self, embeddings: mx.array, hidden: mx.array) -> mx.array:
        return self.eh_proj(mx.concatenate([self.enorm(embeddings), self.hnorm(hidden)], axis=-1))


class MTP(nn.Module):
    """All prediction layers of a model."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = [MTPLayer(config, layer) for layer in config.mtp_layers]
        self._compiled_steps: tuple[CompiledStep, ...] = ()

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def step(
        self, k: int, embeddings: mx.array, hidden: mx.array, cache: LayerCache | None = None
    ) -> mx.array:
        """Rows of layer k: embeddings (B, L, D) of tokens i+1+k and hidden (B, L, D) of rows i.

        Returns (B, L, D), the input of layer k+1 and of `logits`; advances the layer's cache.
        """
        if self._compiled_steps and cache is not None:
            output = self._compiled_steps[k]((embeddings, hidden), [cache])
            if output is not None:
                return output
        num_tokens = embeddings.shape[1]
        window = self.config.mtp_layers[k].window
        mask = window_mask(num_tokens, 0, window) if cache is None else cache.mask(num_tokens)
        return self.layers[k](embeddings, hidden, mask, cache)

    def absorb(self, k: int, embeddings: mx.array, hidden: mx.array, cache: LayerCache) -> None:
        """Advance layer k's cache over rows, given as to `step`, whose outputs nobody needs."""
        self.layers[k].absorb(embeddings, hidden, cache)

    def logits(self, k: int, hidden: mx.array) -> mx.array:
        """Logits (B, L, vocabulary) for tokens i+2+k, from what `step` returned for rows i."""
        return self.layers[k].shared_head(hidden)

    def make_cache(self, slack: int = DEFAULT_SLACK) -> list[LayerCache]:
        """One empty cache per layer."""
        return [make_layer_cache(layer, slack) for layer in self.config.mtp_layers]

    def compile_steps(self) -> None:
        """Run `step` compiled for few rows from now on; see Model.compile_steps."""
        self._compiled_steps = tuple(
            CompiledStep(_forward(layer), [config.window])
            for layer, config in zip(self.layers, self.config.mtp_layers, strict=True)
        )


def _forward(layer: MTPLayer) -> Callable[..., mx.array]:
    def forward(
        inputs: Sequence[mx.array], masks: Sequence[Mask], caches: Sequence[AttentionCache]
    ) -> mx.array:
        return layer(inputs[0], inputs[1], masks[0], caches[0])

    return forward
