"""Feed-forward parts: the dense MLP, the router, the routed experts, and the mixture with its shared expert.

The router's logits are float32 whatever the rest runs in: nearly tied experts would otherwise flip.
"""

from functools import partial

import mlx.core as mx
import mlx.nn as nn

from mlx_step35.config import LayerConfig, ModelConfig
from mlx_step35.quantization import Quantization

# From this many (token, expert) pairs on, sorting by expert pays for itself: each expert's rows become one
# product.
SORT_THRESHOLD = 64


class MLP(nn.Module):
    """SwiGLU, clamped where the layer says so."""

    def __init__(self, hidden_size: int, intermediate_size: int, limit: float | None) -> None:
        super().__init__()
        self.limit = limit
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x), self.limit))


class Router(nn.Module):
    """Chooses `top_k` experts per token and their weights."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.scaling_factor = config.router_scaling_factor
        self.norm_topk_weights = config.norm_topk_weights
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.router_bias = mx.zeros((config.num_experts,))

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Expert indices and float32 routing weights, both (B, L, top_k)."""
        # A float32 input makes the product float32, also with an 8-bit matrix.
        scores, ranking = _scores(self.gate(x.astype(mx.float32)), self.router_bias)
        experts = mx.argpartition(ranking, kth=self.top_k - 1, axis=-1)[..., : self.top_k]
        # The bias only selects: the weights are the scores without it.
        weights = mx.take_along_axis(scores, experts, axis=-1)
        if self.norm_topk_weights:
            return experts, _normalized(weights, weights.sum(axis=-1, keepdims=True), self.scaling_factor)
        return experts, weights * self.scaling_factor


class SwitchLinear(nn.Module):
    """One matrix per expert, stacked: (experts, out, in)."""

    def __init__(self, num_experts: int, input_dims: int, output_dims: int) -> None:
        super().__init__()
        self.weight = mx.zeros((num_experts, output_dims, input_dims))

    def __call__(self, x: mx.array, experts: mx.array, is_sorted: bool) -> mx.array:
        weight = self.weight.swapaxes(-1, -2)
        return mx.gather_mm(x, weight, rhs_indices=experts, sorted_indices=is_sorted)


class QuantizedSwitchLinear(nn.Module):
    """One packed matrix per expert, stacked; its arrays come from the checkpoint."""

    def __init__(self, packing: Quantization) -> None:
        super().__init__()
        self.group_size = packing.group_size
        self.bits = packing.bits
        self.mode = packing.mode
        self.weight = mx.zeros((0,), dtype=mx.uint32)
        self.scales = mx.zeros((0,))
        if packing.mode == "affine":
            self.biases = mx.zeros((0,))

    def __call__(self, x: mx.array, experts: mx.array, is_sorted: bool) -> mx.array:
        return mx.gather_qmm(
            x,
            self.weight,
            self.scales,
            self.get("biases"),
            rhs_indices=experts,
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
            sorted_indices=is_sorted,
        )


class SwitchGLU(nn.Module):
    """The routed experts: SwiGLU of every chosen expert for every token."""

    def __init__(self, config: ModelConfig, limit: float | None) -> None:
        super().__init__()
        hidden_size, width = config.hidden_size, config.moe_intermediate_size
        self.limit = limit
        self.gate_proj = SwitchLinear(config.num_experts, hidden_size, width)
        self.up_proj = SwitchLinear(config.num_experts, hidden_size, width)
        self.down_proj = SwitchLinear(config.num_experts, width, hidden_size)

    def __call__(self, x: mx.array, experts: mx.array) -> mx.array:
        """x (B, L, D) and experts (B, L, K) to one output per chosen expert, (B, L, K, D)."""
        is_sorted = experts.size >= SORT_THRESHOLD
        if not is_sorted:
            return self._run(x[..., None, None, :], experts, is_sorted).squeeze(-2)
        flat = experts.flatten()
        order = mx.argsort(flat)
        rows = x.flatten(0, -2)[order // experts.shape[-1]]
        outputs = self._run(rows[:, None], flat[order], is_sorted).squeeze(-2)
        return outputs[mx.argsort(order)].reshape(*experts.shape, -1)

    def _run(self, x: mx.array, experts: mx.array, is_sorted: bool) -> mx.array:
        gate = self.gate_proj(x, experts, is_sorted)
        up = self.up_proj(x, experts, is_sorted)
        return self.down_proj(swiglu(gate, up, self.limit), experts, is_sorted)


class SparseMoE(nn.Module):
    """Routed experts, weighted, plus the shared expert, which is neither weighted nor gated."""

    def __init__(self, config: ModelConfig, layer: LayerConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.switch_mlp = SwitchGLU(config, layer.swiglu_limit)
        self.share_expert = MLP(config.hidden_size, config.share_expert_dim, layer.swiglu_limit_shared)

    def __call__(self, x: mx.array) -> mx.array:
        experts, weights = self.gate(x)
        outputs = self.switch_mlp(x, experts)
        # The float32 weights make this sum float32.
        routed = (outputs * weights[..., None]).sum(axis=-2).astype(x.dtype)
        return routed + self.share_expert(x)


def swiglu(gate: mx.array, up: mx.array, limit: float | None) -> mx.array:
    """silu(gate) * up; with a limit the gate is clamped after silu and above only, up on both sides."""
    return _swiglu(gate, up) if limit is None else _clamped_swiglu(gate, up, limit)


@partial(mx.compile, shapeless=True)
def _swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return nn.silu(gate) * up


@partial(mx.compile, shapeless=True)
def _clamped_swiglu(gate: mx.array, up: mx.array, limit: float) -> mx.array:
    return mx.minimum(nn.silu(gate), limit) * mx.clip(up, -limit, limit)


@partial(mx.compile, shapeless=True)
def _scores(logits: mx.array, bias: mx.array) -> tuple[mx.array, mx.array]:
    """Scores, and what is smallest for the best expert."""
    scores = mx.sigmoid(logits)
    return scores, -(scores + bias)


@partial(mx.compile, shapeless=True)
def _normalized(weights: mx.array, total: mx.array, factor: float) -> mx.array:
    return weights / (total + 1e-20) * factor
