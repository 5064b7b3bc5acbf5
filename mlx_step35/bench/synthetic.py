"""One full-size layer of each kind with random packed weights: cost at real shapes on a machine of any size.

Layers are built and measured one at a time, so the widest (2.6 GB at 4 bits) is what has to fit. The whole
model's time is the sum over its layers of what one of their kind took: an extrapolation, and labelled so.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from mlx_step35.bench.timing import StepTime, time_step
from mlx_step35.cache import LayerCache, make_layer_cache
from mlx_step35.checkpoint import pack_module
from mlx_step35.config import LayerConfig, ModelConfig
from mlx_step35.layout import Weight, backbone_weights, mtp_weights, stored_tensors
from mlx_step35.model import Model
from mlx_step35.mtp import MTP
from mlx_step35.quantization import Quantization
from mlx_step35.speed import ACCEPTANCE

WIDTHS = (1, 2, 3, 4)
REPEATS = 3

# A CPU takes about a second a token and layer: one counted run per width, and chunks as short as a verify.
STEP_BUDGET_S = 2.0
CHUNK = 512
CPU_CHUNK = 16
# Chunks that take longer than this are announced.
LONG_S = 20.0


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """Seconds of one part of the model: a step per width, and a prefill chunk."""

    name: str
    count: int
    steps: dict[int, StepTime]
    prefill_s: float


@dataclass(frozen=True, slots=True)
class Synthetic:
    """What the parts took, at one context length."""

    context: int
    chunk: int
    parts: tuple[LayerTimes, ...]
    heads: int

    def step_s(self, width: int) -> float:
        """Seconds of a backbone pass over that many tokens."""
        return sum(part.count * part.steps[width].total_s for part in self.parts if part.name != "mtp")

    def tokens_per_s(self, depth: int) -> float:
        """Decode speed with that many drafts, accepted as reported for Step-3.7."""
        mtp_s = next((part.steps[1].total_s for part in self.parts if part.name == "mtp"), 0.0)
        return (1 + sum(ACCEPTANCE[:depth])) / (self.step_s(depth + 1) + depth * mtp_s)

    @property
    def prefill_tokens_per_s(self) -> float:
        return self.chunk / sum(part.count * part.prefill_s for part in self.parts if part.name != "mtp")

    def as_json(self) -> dict[str, Any]:
        return {
            "is_extrapolated": True,
            "context": self.context,
            "prefill_chunk": self.chunk,
            "parts": [
                {
                    "name": part.name,
                    "count": part.count,
                    "step_ms": {str(w): round(step.total_s * 1e3, 3) for w, step in part.steps.items()},
                    "host_ms": {str(w): round(step.host_s * 1e3, 3) for w, step in part.steps.items()},
                    "prefill_ms": round(part.prefill_s * 1e3, 3),
                }
                for part in self.parts
            ],
            "decode_tokens_per_s": [round(self.tokens_per_s(depth), 4) for depth in range(self.heads + 1)],
            "prefill_tokens_per_s": round(self.prefill_tokens_per_s, 3),
        }

    def __str__(self) -> str:
        lines = [
            f"full-size layers with random weights, context {self.context:,}; milliseconds",
            "",
            f"  {'part':<16}{'count':>6}" + "".join(f"{f'{w} tok':>10}" for w in WIDTHS) + f"{'chunk':>12}",
        ]
        for part in self.parts:
            cells = "".join(f"{part.steps[width].total_s * 1e3:>10.2f}" for width in WIDTHS)
            lines.append(f"  {part.name:<16}{part.count:>6}{cells}{part.prefill_s * 1e3:>12.1f}")
        speeds = ", ".join(
            f"{'plain' if depth == 0 else f'mtp {depth}'} {self.tokens_per_s(depth):.3g}"
            for depth in range(self.heads + 1)
        )
        lines += [
            "",
            f"EXTRAPOLATED to the whole model, not measured: decode tokens/s {speeds}; "
            f"prefill {self.prefill_tokens_per_s:.3g} tokens/s in chunks of {self.chunk}",
        ]
        return "\n".join(lines)


def measure(
    config: ModelConfig,
    choice: Quantization,
    context: int,
    chunk: int | None = None,
    on_progress: Callable[[str], None] = lambda what: None,
) -> Synthetic:
    """Build and time every kind of layer, the head, and the first MTP layer with its head.

    Without a chunk, one that this device runs in seconds.
    """
    chunk = chunk or (CPU_CHUNK if _is_cpu() else CHUNK)
    kinds: dict[tuple[str, bool], list[LayerConfig]] = {}
    for layer in config.layers:
        kinds.setdefault((layer.kind, layer.is_moe), []).append(layer)
    num_parts = len(kinds) + 1 + bool(config.mtp_layers)
    parts: list[LayerTimes] = []

    def announce(name: str) -> None:
        mx.clear_cache()
        on_progress(f"part {len(parts) + 1} of {num_parts}: {name}")

    for (kind, is_moe), layers in kinds.items():
        name = f"{kind} {'moe' if is_moe else 'dense'}"
        announce(name)
        parts.append(_layer_times(name, layers, config, choice, context, chunk, on_progress))
    announce("head")
    parts.append(_head_times(config, choice))
    if config.mtp_layers:
        announce("mtp")
        parts.append(_mtp_times(config, choice, context))
    return Synthetic(context, chunk, tuple(parts), len(config.mtp_layers))


def random_model(config: ModelConfig, choice: Quantization, paths: Sequence[str] = ("",)) -> Model:
    """A model of that config with random packed weights; only paths with these beginnings are filled."""
    model = Model(config)
    if config.mtp_layers:
        model.mtp = MTP(config)
    dtype = mx.float32 if mx.default_device().type == mx.DeviceType.cpu else mx.bfloat16
    for weight in backbone_weights(config) + mtp_weights(config):
        wanted = weight.path.startswith(tuple(paths))
        packing = choice if weight.is_quantizable and weight.kind not in ("router", "embedding") else None
        if wanted and packing is not None:
            pack_module(model, weight.path, packing)
        arrays = _random(weight, packing, dtype) if wanted else []
        model.load_weights(arrays, strict=False)
    return model


def _random(weight: Weight, packing: Quantization | None, dtype: mx.Dtype) -> list[tuple[str, mx.array]]:
    if packing is None:
        values = mx.ones(weight.shape) if weight.kind == "norm" else 0.02 * mx.random.normal(weight.shape)
        kept = mx.float32 if weight.kind in ("router", "bias") else dtype
        return [(weight.name, values.astype(kept))]
    arrays = []
    for tensor in stored_tensors(weight, packing, "BF16"):
        if tensor.dtype == "U32":
            # One expert's bits serve all; each still has memory of its own.
            bits = mx.random.randint(0, 2**31 - 1, tensor.shape[-2:]).astype(mx.uint32)
            array = mx.contiguous(mx.broadcast_to(bits, tensor.shape))
        elif tensor.dtype == "U8":
            array = mx.full(tensor.shape, 120, dtype=mx.uint8)
        else:
            # Scales and biases that centre the packed integers on zero.
            scale = 0.02 / 2**packing.bits
            value = scale if tensor.name.endswith("scales") else -scale * 2 ** (packing.bits - 1)
            array = mx.full(tensor.shape, value, dtype=dtype)
        arrays.append((tensor.name, array))
    return arrays


def _layer_times(
    name: str,
    layers: Sequence[LayerConfig],
    config: ModelConfig,
    choice: Quantization,
    context: int,
    chunk: int,
    on_progress: Callable[[str], None],
) -> LayerTimes:
    layer = layers[0]
    one = replace(config, layers=(replace(layer, index=0),), mtp_layers=())
    model = random_model(one, choice, ["model.layers."])
    block: Any = model.layers[0]
    mx.eval(block.parameters())
    cache = _filled(layer, context, model.dtype)

    def build(width: int) -> Callable[[], list[mx.array]]:
        x = mx.random.normal((1, width, config.hidden_size)).astype(model.dtype)
        mx.eval(x)

        def run() -> list[mx.array]:
            if cache.offset > context:
                cache.rollback(cache.offset - context)
            return [block(x, cache.mask(width), cache), *cache.state]

        return run

    steps = _step_times(build)
    if cache.offset > context:
        cache.rollback(cache.offset - context)
    x = mx.random.normal((1, chunk, config.hidden_size)).astype(model.dtype)
    mx.eval(x)
    # A GPU has other kernels for many tokens, to be warmed up; on the CPU time grows with every token.
    expected_s = steps[max(WIDTHS)].total_s / max(WIDTHS) * chunk
    if _is_cpu() and expected_s > LONG_S:
        on_progress(f"  a chunk of {chunk} tokens, about {expected_s:.0f} s")
    # A chunk cannot be rolled back, so the context grows by it.
    prefill = time_step(lambda: [block(x, cache.mask(chunk), cache), *cache.state], 1, is_warm=_is_cpu())
    return LayerTimes(name, len(layers), steps, prefill.total_s)


def _step_times(build: Callable[[int], Callable[[], list[mx.array]]]) -> dict[int, StepTime]:
    return {width: time_step(build(width), REPEATS, budget_s=STEP_BUDGET_S) for width in WIDTHS}


def _head_times(config: ModelConfig, choice: Quantization) -> LayerTimes:
    """Embedding of a token, final norm and head; a prefill chunk needs the head for one row."""
    model = random_model(replace(config, layers=(), mtp_layers=()), choice, ["model.norm", "lm_head"])
    mx.eval(model.parameters()["lm_head"], model.parameters()["model"]["norm"])

    def build(width: int) -> Callable[[], list[mx.array]]:
        x = mx.random.normal((1, width, config.hidden_size)).astype(model.dtype)
        mx.eval(x)
        return lambda: [model.logits(x)]

    steps = _step_times(build)
    return LayerTimes("head", 1, steps, steps[1].total_s)


def _mtp_times(config: ModelConfig, choice: Quantization, context: int) -> LayerTimes:
    one = replace(config, layers=(), mtp_layers=config.mtp_layers[:1])
    model = random_model(one, choice, ["mtp."])
    mx.eval(model.mtp.parameters())
    cache = _filled(one.mtp_layers[0], context, mx.float32 if _is_cpu() else mx.bfloat16)

    def build(width: int) -> Callable[[], list[mx.array]]:
        x = mx.random.normal((1, width, config.hidden_size)).astype(cache.state[0].dtype)
        mx.eval(x)

        def run() -> list[mx.array]:
            if cache.offset > context:
                cache.rollback(cache.offset - context)
            hidden = model.mtp.step(0, x, x, cache)
            return [model.mtp.logits(0, hidden[:, -1:]), *cache.state]

        return run

    return LayerTimes("mtp", 1, _step_times(build), 0.0)


def _filled(layer: LayerConfig, context: int, dtype: mx.Dtype) -> LayerCache:
    """A cache that has seen `context` random tokens."""
    cache = make_layer_cache(layer)
    shape = (1, layer.num_kv_heads, context, layer.head_dim)
    if context:
        cache.update(mx.random.normal(shape).astype(dtype), mx.random.normal(shape).astype(dtype))
    mx.eval(cache.state)
    return cache


def _is_cpu() -> bool:
    return bool(mx.default_device().type == mx.DeviceType.cpu)
