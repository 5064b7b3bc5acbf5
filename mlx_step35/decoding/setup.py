"""What a decode needs before it starts: the drafter, the depth controller, a seed for its noise."""

import atexit
import logging
from typing import cast

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_step35 import guard
from mlx_step35.cache import ModelCache
from mlx_step35.decoding.records import DecodeOptions, DecodeStats, Drafter
from mlx_step35.depth import DepthController, RoundBytes
from mlx_step35.errors import RequestError
from mlx_step35.memory import Planner
from mlx_step35.model import Model
from mlx_step35.mtp_state import DraftState
from mlx_step35.sampling import CustomSampling, SamplingParams

logger = logging.getLogger(__name__)


def prepare(model: Model) -> None:
    """Read all weights into memory and make the model ready to decode, once per process and model.

    On Metal the memory that MLX may wire is raised to what the system recommends until the process exits;
    without that weights are paged out between steps.
    """
    mx.eval(model.parameters())
    if mx.default_device().type == mx.DeviceType.cpu:
        # Rotations and norms are a dozen operations each there, which fuse; a GPU has kernels for them, and
        # a plain call does not attend over unfilled rows.
        model.compile_steps()
    if mx.metal.is_available():
        limit = int(mx.device_info()["max_recommended_working_set_size"])
        atexit.register(mx.set_wired_limit, mx.set_wired_limit(limit))
        if mx.get_active_memory() > 0.9 * limit:
            logger.warning(
                "the weights take %.0f of the %.0f GB that the system recommends; see iogpu.wired_limit_mb",
                mx.get_active_memory() / 1e9,
                limit / 1e9,
            )


def fit(model: Model, now: int, then: int, num_wanted: int, step_size: int) -> tuple[int, int]:
    """How a cache can grow from `now` to `then` tokens and by an answer within this machine's memory.

    Returns prompt tokens per pass, at most `step_size`, and how many of the wanted tokens can follow. Raises
    RequestError for a context that can never fit, CapacityError for one that cannot now.
    """
    planner, room = _planner(model), guard.headroom()
    chunk = guard.prefill_chunk(planner, now, then, step_size, room)
    num_tokens = guard.answer_length(planner, now, then, num_wanted, room)
    if num_tokens < num_wanted:
        logger.warning("memory ends this answer after %d of at most %d tokens", num_tokens, num_wanted)
    return chunk, num_tokens


def missing_bytes(model: Model, now: int, then: int, num_wanted: int, freeable: int) -> int:
    """Bytes to free, of `freeable`, for a prompt up to `then` tokens and as much of its answer as can be."""
    return guard.shortage(_planner(model), now, then, num_wanted, freeable)


def _planner(model: Model) -> Planner:
    arrays = cast(list[tuple[str, mx.array]], tree_flatten(model.parameters()))
    return guard.planner_of(model.config, arrays)


def make_drafter(
    model: Model, cache: ModelCache, options: DecodeOptions, stats: DecodeStats
) -> Drafter | None:
    """The cache's draft state, a new one if it does not fit its tokens; without any, `stats` gets the reason.

    Raises RequestError when a depth was asked for and the model has no MTP layers.
    """
    if options.mtp == "off":
        stats.reason_off = "it was turned off"
        return None
    if model.mtp is None:
        if options.mtp != "auto":
            raise RequestError(f"mtp={options.mtp} needs MTP layers: {model.mtp_reason}", field="mtp")
        stats.reason_off = model.mtp_reason
        return None
    if cache.mtp is None or cache.mtp.end != len(cache.tokens):
        cache.mtp = DraftState(model.mtp, model.embed, len(cache.tokens))
    return cast(Drafter, cache.mtp)


def make_controller(model: Model) -> DepthController:
    """A controller without experience; one that is kept for all decodes of a model keeps learning."""
    return DepthController(_round_bytes(model))


def _round_bytes(model: Model) -> RoundBytes:
    """Bytes that rounds read, from the arrays a model really has."""
    backbone = experts = 0
    heads = [0] * len(model.config.mtp_layers)
    for name, array in cast(list[tuple[str, mx.array]], tree_flatten(model.parameters())):
        if name.startswith("mtp.layers."):
            heads[int(name.split(".")[2])] += array.nbytes
        elif ".switch_mlp." in name:
            experts += array.nbytes
        elif "embed_tokens" not in name or model.config.tie_word_embeddings:
            backbone += array.nbytes
    return RoundBytes(model.config, backbone, experts, tuple(heads), model.dtype.size)


def noise_seed(sampling: SamplingParams | CustomSampling) -> int:
    """Follows mx.random.seed, as mlx-lm scripts expect; greedy and seeded decoding do not draw from it."""
    params = sampling.params if isinstance(sampling, CustomSampling) else sampling
    if params.is_greedy or params.seed is not None:
        return 0
    return cast(int, mx.random.randint(0, 2**31 - 1).item())
