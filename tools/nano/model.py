"""step35-nano in PyTorch: the reference architecture at a size two CPU cores can train.

Independent of the package on purpose: golden vectors made from it prove the MLX implementation. Parameter
names are those of the original release, so that exporting is a plain save.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class NanoConfig:
    vocab_size: int = 2048
    hidden_size: int = 128
    num_layers: int = 9
    num_mtp_layers: int = 3
    head_dim: int = 64
    num_kv_heads: int = 2
    full_heads: int = 4
    sliding_heads: int = 6
    window: int = 64
    intermediate_size: int = 384
    num_experts: int = 12
    top_k: int = 4
    moe_intermediate_size: int = 64
    share_expert_dim: int = 64
    router_scaling_factor: float = 3.0
    eps: float = 1e-5
    full_theta: float = 5e6
    sliding_theta: float = 1e4
    full_rotary: float = 0.5
    scaling: dict = field(
        default_factory=lambda: {
            "rope_type": "llama3",
            "factor": 2.0,
            "original_max_position_embeddings": 512,
            "low_freq_factor": 1.0,
            "high_freq_factor": 32.0,
        }
    )
    swiglu_limits: tuple[float, ...] = (0,) * 7 + (7.0, 7.0) + (0,) * 3
    swiglu_limits_shared: tuple[float, ...] = (0,) * 8 + (16.0,) + (0,) * 3

    def is_sliding(self, index: int) -> bool:
        return index >= self.num_layers or index % 4 != 0

    def is_moe(self, index: int) -> bool:
        return 1 <= index < self.num_layers


class ZeroCentredRMSNorm(nn.Module):
    """y = x * rsqrt(mean(x^2) + eps) * (1 + w)."""

    def __init__(self, dims: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dims))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, 1.0 + self.weight, self.eps)


def rope_tables(config: NanoConfig, sliding: bool, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin of shape (length, rotary_dims / 2); full layers carry llama3 scaling."""
    theta = config.sliding_theta if sliding else config.full_theta
    dims = int(config.head_dim * (1.0 if sliding else config.full_rotary))
    inv_freq = 1.0 / theta ** (torch.arange(0, dims, 2, dtype=torch.float64) / dims)
    if not sliding:
        s = config.scaling
        original, low, high = (
            s["original_max_position_embeddings"],
            s["low_freq_factor"],
            s["high_freq_factor"],
        )
        wavelength = 2 * math.pi / inv_freq
        smooth = ((original / wavelength - low) / (high - low)).clamp(0.0, 1.0)
        inv_freq = (1 - smooth) * inv_freq / s["factor"] + smooth * inv_freq
    angles = torch.arange(length, dtype=torch.float64)[:, None] * inv_freq[None]
    return angles.cos().float(), angles.sin().float()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split rotation of the first 2 * cos.shape[-1] dims of (B, H, L, head_dim)."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def windowed_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Causal attention over the last `window` tokens, in blocks of `window` that look at the block before.

    Equal to masking the whole square, which takes half of the training time at length 512.
    """
    batch, heads, length, dim = q.shape
    blocks = -(-length // window)
    q, k, v = (F.pad(t, (0, 0, 0, blocks * window - length)) for t in (q, k, v))

    def with_previous(t: Tensor) -> Tensor:
        t = t.view(batch, heads, blocks, window, dim)
        return torch.cat([F.pad(t[:, :, :-1], (0, 0, 0, 0, 1, 0)), t], dim=3)

    row, column = torch.arange(window)[:, None], torch.arange(2 * window)[None]
    visible = ((column > row) & (column <= row + window)).repeat(blocks, 1, 1)
    visible[0, :, :window] = False  # nothing stands before the first block
    scores = (q.view(batch, heads, blocks, window, dim) * dim**-0.5) @ with_previous(k).mT
    weights = scores.float().masked_fill(~visible, -torch.inf).softmax(-1).to(v.dtype)
    return (weights @ with_previous(v)).reshape(batch, heads, blocks * window, dim)[:, :, :length]


class Attention(nn.Module):
    def __init__(self, config: NanoConfig, index: int) -> None:
        super().__init__()
        self.window = config.window if config.is_sliding(index) else None
        self.heads = config.sliding_heads if self.window else config.full_heads
        self.kv_heads, self.head_dim = config.num_kv_heads, config.head_dim
        dim = config.hidden_size
        self.q_proj = nn.Linear(dim, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(dim, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(dim, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, dim, bias=False)
        self.g_proj = nn.Linear(dim, self.heads, bias=False)
        self.q_norm = ZeroCentredRMSNorm(self.head_dim, config.eps)
        self.k_norm = ZeroCentredRMSNorm(self.head_dim, config.eps)
        self.watched_rows = 0
        self.scores: Tensor | None = None  # of head 0 in the last rows of a batch, for the guide loss

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        batch, length, _ = x.shape
        shape = (batch, length, -1, self.head_dim)
        q = apply_rope(self.q_norm(self.q_proj(x).view(shape)).transpose(1, 2), *rope)
        k = apply_rope(self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2), *rope)
        v = self.v_proj(x).view(shape).transpose(1, 2)
        groups = self.heads // self.kv_heads
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        if self.watched_rows:
            last = slice(-self.watched_rows, None)
            self.scores = (q[last, 0] * self.head_dim**-0.5) @ k[last, 0].mT
        if self.window:
            if torch.is_autocast_enabled("cpu"):  # rotation left q and k in float32
                q, k = q.to(v.dtype), k.to(v.dtype)
            out = windowed_attention(q, k, v, self.window)
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out = out.transpose(1, 2) * torch.sigmoid(self.g_proj(x))[..., None]
        return self.o_proj(out.reshape(batch, length, -1))


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """The clamp comes after silu, upper side only; 0 means none."""
    gate = F.silu(gate)
    if limit:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * up


class MLP(nn.Module):
    def __init__(self, dim: int, hidden: int, limit: float) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)
        self.limit = limit

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x), self.limit))


class StackedWeight(nn.Module):
    """One matrix per expert, stored as the release does: (experts, out, in)."""

    def __init__(self, experts: int, out_dim: int, in_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, out_dim, in_dim) * in_dim**-0.5)


class MoE(nn.Module):
    def __init__(self, config: NanoConfig, limit: float) -> None:
        super().__init__()
        self.config, self.limit = config, limit
        dim, hidden, experts = config.hidden_size, config.moe_intermediate_size, config.num_experts
        self.gate = nn.Linear(dim, experts, bias=False)
        self.router_bias = nn.Parameter(torch.zeros(experts), requires_grad=False)
        self.gate_proj = StackedWeight(experts, hidden, dim)
        self.up_proj = StackedWeight(experts, hidden, dim)
        self.down_proj = StackedWeight(experts, dim, hidden)
        self.counts: Tensor | None = None  # tokens per expert of the last call, for the balance update

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        scores = torch.sigmoid(self.gate(flat).float())
        chosen = (scores.detach() + self.router_bias).topk(self.config.top_k, dim=-1).indices
        weights = scores.gather(1, chosen)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.config.router_scaling_factor
        order = chosen.flatten().argsort(stable=True)
        tokens = order // self.config.top_k
        counts = torch.bincount(chosen.flatten(), minlength=self.config.num_experts)
        self.counts = counts
        outputs = []
        for expert, rows in enumerate(flat[tokens].split(counts.tolist())):
            gate = rows @ self.gate_proj.weight[expert].T
            up = rows @ self.up_proj.weight[expert].T
            outputs.append(swiglu(gate, up, self.limit) @ self.down_proj.weight[expert].T)
        routed = torch.cat(outputs) * weights.flatten()[order, None]
        return torch.zeros_like(flat).index_add_(0, tokens, routed).view_as(x)


class Layer(nn.Module):
    def __init__(self, config: NanoConfig, index: int) -> None:
        super().__init__()
        dim = config.hidden_size
        self.input_layernorm = ZeroCentredRMSNorm(dim, config.eps)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = ZeroCentredRMSNorm(dim, config.eps)
        shared_limit = config.swiglu_limits_shared[index]
        if config.is_moe(index):
            self.moe = MoE(config, config.swiglu_limits[index])
            self.share_expert = MLP(dim, config.share_expert_dim, shared_limit)
        else:
            self.mlp = MLP(dim, config.intermediate_size, shared_limit)
        self.is_moe = config.is_moe(index)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope)
        u = self.post_attention_layernorm(x)
        return x + (self.moe(u) + self.share_expert(u) if self.is_moe else self.mlp(u))


class SharedHead(nn.Module):
    def __init__(self, config: NanoConfig) -> None:
        super().__init__()
        self.norm = ZeroCentredRMSNorm(config.hidden_size, config.eps)
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)


class MTPLayer(Layer):
    def __init__(self, config: NanoConfig, index: int) -> None:
        super().__init__(config, index)
        dim = config.hidden_size
        self.enorm = ZeroCentredRMSNorm(dim, config.eps)
        self.hnorm = ZeroCentredRMSNorm(dim, config.eps)
        self.eh_proj = nn.Linear(2 * dim, dim, bias=False)
        self.transformer = nn.ModuleDict({"shared_head": SharedHead(config)})

    def draft(self, embedding: Tensor, hidden: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Hidden of this depth, before shared_head.norm: what the next depth takes."""
        joined = torch.cat([self.enorm(embedding), self.hnorm(hidden)], dim=-1)
        return self(self.eh_proj(joined), rope)

    def logits(self, hidden: Tensor) -> Tensor:
        head = self.transformer["shared_head"]
        return head.output(head.norm(hidden))


class Nano(nn.Module):
    def __init__(self, config: NanoConfig) -> None:
        super().__init__()
        self.config = config
        total = config.num_layers + config.num_mtp_layers
        layers = [Layer(config, i) if i < config.num_layers else MTPLayer(config, i) for i in range(total)]
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
                "layers": nn.ModuleList(layers),
                "norm": ZeroCentredRMSNorm(config.hidden_size, config.eps),
            }
        )
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._tables: dict[tuple[bool, int], tuple[Tensor, Tensor]] = {}
        depth_scale = (2 * total) ** -0.5
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                continue
            std = 1.0 if "embed_tokens" in name else parameter.shape[-1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std *= depth_scale
            nn.init.normal_(parameter, std=0.5 * std if "embed" in name else std)

    def rope(self, length: int, sliding: bool) -> tuple[Tensor, Tensor]:
        key = (sliding, length)
        if key not in self._tables:
            self._tables[key] = rope_tables(self.config, sliding, length)
        return self._tables[key]

    def backbone(self, ids: Tensor) -> Tensor:
        """The residual stream after the last backbone layer, before the final norm."""
        x = self.model["embed_tokens"](ids)
        for index, layer in enumerate(self.model["layers"][: self.config.num_layers]):
            x = layer(x, self.rope(ids.shape[1], self.config.is_sliding(index)))
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(self.model["norm"](hidden))

    def chain(self, ids: Tensor, hidden: Tensor) -> list[Tensor]:
        """Hidden of each depth k over rows i with a known token i+1+k: predicts token i+2+k."""
        hiddens, h = [], hidden
        for k in range(self.config.num_mtp_layers):
            rows = ids.shape[1] - 1 - k
            layer = self.model["layers"][self.config.num_layers + k]
            embedding = self.model["embed_tokens"](ids[:, 1 + k :])
            h = layer.draft(embedding, h[:, :rows], self.rope(rows, True))
            hiddens.append(h)
        return hiddens

    def mtp_logits(self, k: int, hidden: Tensor) -> Tensor:
        return self.model["layers"][self.config.num_layers + k].logits(hidden)


def losses(model: Nano, ids: Tensor, weights: Tensor) -> list[Tensor]:
    """Mean next-token loss of the backbone and of each MTP depth; `weights` (B, L) is 0 on padding."""

    def loss(logits: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
        nats = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        return (nats * weight.flatten()).sum() / weight.sum().clamp(min=1)

    hidden = model.backbone(ids)
    result = [loss(model.logits(hidden[:, :-1]), ids[:, 1:], weights[:, 1:])]
    for k, h in enumerate(model.chain(ids, hidden)):
        result.append(loss(model.mtp_logits(k, h[:, :-1]), ids[:, 2 + k :], weights[:, 2 + k :]))
    return result
