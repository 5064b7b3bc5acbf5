"""Sampling parameters and stop strings, which every endpoint takes under the same names."""

from mlx_step35.api.fields import Fields
from mlx_step35.api.types import Sampling
from mlx_step35.errors import quoted

MAX_STOP = 4
MAX_SEED = 2**63


def read_sampling(fields: Fields) -> Sampling:
    """Sampling parameters; absent ones stay None."""
    return Sampling(
        temperature=fields.number("temperature", 0, 2),
        top_p=fields.number("top_p", 0, 1),
        top_k=fields.integer("top_k", 0),
        min_p=fields.number("min_p", 0, 1),
        repetition_penalty=fields.number("repetition_penalty", 0.01, 10),
        presence_penalty=fields.number("presence_penalty", -2, 2),
        frequency_penalty=fields.number("frequency_penalty", -2, 2),
        logit_bias=_logit_bias(fields),
        seed=fields.integer("seed", -MAX_SEED, MAX_SEED - 1),
    )


def read_stop(fields: Fields) -> tuple[str, ...]:
    """Strings that end the answer: one, or a list."""
    value = fields.raw("stop")
    if isinstance(value, str):
        fields = Fields({"stop": [value]}, fields.path)
    return fields.texts("stop", MAX_STOP)


def _logit_bias(fields: Fields) -> dict[int, float]:
    bias = fields.optional_object("logit_bias")
    if bias is None:
        return {}
    result = {}
    for key in bias.values:
        if not key.isascii() or not key.isdecimal() or len(key) > 9:
            raise fields.refuse("logit_bias", f"keys must be token ids, not {quoted(key)}")
        value = bias.number(key, -100, 100)
        if value is None:
            raise bias.refuse(key, "must be a number", "invalid_type")
        result[int(key)] = value
    return result
