"""The backbone's forward pass, top to bottom.

Parameter paths are those of mlx-lm's converted checkpoints; norm weights in memory are 1 + w, so that they
are plain RMS norms. The MTP layers hang on `Model.mtp` when the checkpoint has them.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_step35.attention import Attention
from mlx_step35.cache import (
    DEFAULT_SLACK,
    AttentionCache,
    CompiledStep,
    Mask,
    ModelCache,
    window_mask,
)
from mlx_step35.config import LayerConfig, ModelConfig
from mlx_step35.moe import MLP, SparseMoE


class DecoderLayer(nn.Module):
    """Attention and feed-forward part, each behind its own norm and a residual connection."""

    def __init__(self, config: ModelConfig, layer: LayerConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp: MLP | SparseMoE
        if layer.is_moe:
            self.mlp = SparseMoE(config, layer)
        else:
            self.mlp = MLP(config.hidden_size, layer.intermediate_size, layer.swiglu_limit_shared)

    def __call__(self, x: mx.array, mask: Mask, cache: AttentionCache | None) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Step35Model(nn.Module):
    """Embedding, decoder layers and final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(config, layer) for layer in config.layers]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class Model(nn.Module):
    """The language model; called as mlx-lm's are: `model(ids, cache=model.make_cache())`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model_type = "step3p5"
        self.model = Step35Model(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # The loader sets one of them: the MTP layers, or why there are none.
        self.mtp: Any = None
        self.mtp_reason: str | None = "the model was built without a checkpoint"
        self._compiled_step: CompiledStep | None = None

    def __call__(self, ids: mx.array, cache: ModelCache | None = None) -> mx.array:
        """Token ids (B, L) to logits (B, L, vocabulary); advances the cache."""
        return self.logits(self.hidden(ids, cache))

    @property
    def layers(self) -> list[DecoderLayer]:
        """The backbone's decoder layers."""
        layers: list[DecoderLayer] = self.model.layers
        return layers

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype of activations."""
        return self.model.norm.weight.dtype

    def embed(self, ids: mx.array) -> mx.array:
        """Token embeddings (B, L, D), unscaled."""
        # A packed table gives the dtype of its scales.
        return self.model.embed_tokens(ids).astype(self.dtype)

    def hidden(self, ids: mx.array, cache: ModelCache | None = None) -> mx.array:
        """The residual stream (B, L, D) after the last layer, before the final norm; advances the cache."""
        if self._compiled_step is not None and cache is not None:
            output = self._compiled_step((ids,), cache)
            if output is not None:
                return output
        caches: Sequence[AttentionCache | None] = [None] * len(self.layers) if cache is None else cache
        return self._forward((ids,), self._masks(ids.shape[1], cache), caches)

    def logits(self, hidden: mx.array) -> mx.array:
        """Logits of what `hidden` returned, or of any of its rows."""
        x = self.model.norm(hidden)
        if self.config.tie_word_embeddings:
            return self.model.embed_tokens.as_linear(x)
        return self.lm_head(x)

    def make_cache(self, slack: int = DEFAULT_SLACK) -> ModelCache:
        """An empty cache for one sequence (or one batch); `slack` tokens can be rolled back at any time."""
        return ModelCache(self.config.layers, slack)

    def compile_steps(self) -> None:
        """Run calls of few tokens compiled from now on, those of the MTP layers too; a gain on the CPU.

        For weights that have been evaluated; lazy ones would be read from disk in every call.
        """
        self._compiled_step = CompiledStep(self._forward, [layer.window for layer in self.config.layers])
        if self.mtp is not None:
            self.mtp.compile_steps()

    def _forward(
        self,
        inputs: Sequence[mx.array],
        masks: Sequence[Mask],
        caches: Sequence[AttentionCache | None],
    ) -> mx.array:
        x = self.embed(inputs[0])
        for layer, mask, cache in zip(self.layers, masks, caches, strict=True):
            x = layer(x, mask, cache)
        return x

    def _masks(self, num_tokens: int, cache: ModelCache | None) -> list[Mask]:
        """One mask per layer; all layers of a kind share theirs, made by the first of them."""
        by_window: dict[int | None, Mask] = {}
        for index, layer in enumerate(self.config.layers):
            if layer.window not in by_window:
                by_window[layer.window] = (
                    window_mask(num_tokens, 0, layer.window)
                    if cache is None
                    else cache[index].mask(num_tokens)
                )
        return [by_window[layer.window] for layer in self.config.layers]
