"""Prefill, plain and speculative decoding: token ids in, token ids out, never text.

A plain step is launched before the token of the step before it is read, so the device does not wait for the
host. A speculative round drafts, verifies all drafts in one forward pass, and reads the outcome: one blocking
sync. Which of the two comes next, `depth` decides.

At every yield the cache's `tokens` and its one `pending` token are exactly what was given so far; whatever
the layers hold beyond that is rolled back when the iterator is closed, so a later call continues from there.
"""

from collections.abc import Generator, Sequence

from mlx_step35.cache import ModelCache
from mlx_step35.decoding.decoder import Decoder
from mlx_step35.decoding.records import Decoded as Decoded
from mlx_step35.decoding.records import DecodeOptions as DecodeOptions
from mlx_step35.decoding.records import DecodeStats as DecodeStats
from mlx_step35.decoding.records import Drafter as Drafter
from mlx_step35.decoding.records import MTPChoice as MTPChoice
from mlx_step35.decoding.records import PrefillCallback as PrefillCallback
from mlx_step35.decoding.setup import make_controller as make_controller
from mlx_step35.decoding.setup import prepare as prepare
from mlx_step35.depth import DepthController
from mlx_step35.model import Model
from mlx_step35.sampling import Constraint, CustomSampling, SamplingParams


def decode(
    model: Model,
    prompt: Sequence[int],
    cache: ModelCache,
    sampling: SamplingParams | CustomSampling,
    options: DecodeOptions,
    *,
    on_prefill: PrefillCallback | None = None,
    constraint: Constraint | None = None,
    stats: DecodeStats | None = None,
    drafter: Drafter | None = None,
    controller: DepthController | None = None,
) -> Generator[Decoded, None, None]:
    """Continue the cache's tokens with `prompt` and then with what the model says.

    Modifies the cache; closing the iterator leaves it covering all tokens given out but the newest, which
    stays pending. A constraint is advanced here, over exactly the tokens given out. Raises RequestError
    before anything is modified, PromptTooLongError if the context cannot hold one more token.
    """
    decoder = Decoder(model, cache, sampling, options, constraint, stats or DecodeStats())
    decoder.use_drafts(drafter, controller)
    try:
        yield from decoder.run(prompt, on_prefill or (lambda done, total: None))
    finally:
        decoder.finish()
