"""How often drafts are accepted under each rule, from the logits of the model and of its MTP layers.

At every position of a text that the model sampled, both distributions are computed with the text itself as
the drafts so far; the probability of acceptance then follows without drawing anything. So the second figure
of a rule is that of a second draft given that the first one was the text's token, and so on.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_step35.decoding import DecodeOptions, decode
from mlx_step35.model import Model
from mlx_step35.sampling import SamplingParams, log_softmax

NUM_DRAFTS = 3
# Tokens that decide about shared noise; it needs every pair of them.
MOST_LIKELY = 64


@dataclass(frozen=True, slots=True)
class Recorded:
    """Logits at n positions of a text: the model's for the tokens there and the next three, (n, 4, V), and
    the MTP layers' for the same but the last, (n, 3, V); `first` is the first position."""

    tokens: list[int]
    first: int
    target: mx.array
    draft: mx.array


def record(model: Model, prompt: Sequence[int], num_tokens: int, seed: int = 0) -> Recorded:
    """Sample a text at temperature 1 and take both distributions at every position of it."""
    sampling, options = SamplingParams(1.0, seed=seed), DecodeOptions(num_tokens, "off", lookup=False)
    decoded = decode(model, prompt, model.make_cache(), sampling, options)
    tokens = [*prompt, *(item.token for item in decoded)]
    hidden = model.hidden(mx.array([tokens]))
    rows = [model.logits(hidden)[0]]
    for k in range(NUM_DRAFTS):
        known = tokens[k + 1 :]
        hidden = model.mtp.step(k, model.embed(mx.array([known])), hidden[:, : len(known)])
        rows.append(model.mtp.logits(k, hidden)[0])
    # Row i of the model is for the token at i + 1, row i of layer k for the token at i + 2 + k.
    positions = np.arange(len(prompt) + 1, len(tokens) - NUM_DRAFTS)
    target = mx.stack([rows[0][mx.array(positions - 1 + k)] for k in range(NUM_DRAFTS + 1)], axis=1)
    draft = mx.stack([rows[k + 1][mx.array(positions - 2)] for k in range(NUM_DRAFTS)], axis=1)
    mx.eval(target, draft)
    return Recorded(tokens, int(positions[0]), target, draft)


def acceptance(recordings: Sequence[Recorded]) -> dict[str, list[float]]:
    """Mean probability of acceptance of the first, second and third draft, by rule."""
    logits = [
        (row[:NUM_DRAFTS], draft)
        for recorded in recordings
        for row, draft in zip(recorded.target, recorded.draft, strict=True)
    ]
    p = np.exp(np.array(log_softmax(mx.stack([target for target, _ in logits])), dtype=np.float64))
    q = np.exp(np.array(log_softmax(mx.stack([draft for _, draft in logits])), dtype=np.float64))
    rules = {
        "rejection": np.minimum(p, q).sum(axis=-1),
        "shared noise": shared_noise(p, q),
        "independent samples": (p * q).sum(axis=-1),
    }
    return {name: [round(float(value), 3) for value in rule.mean(axis=0)] for name, rule in rules.items()}


def shared_noise(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Probability that log p and log q have the same argmax with the same Gumbel noise added to both.

    Token i wins in both with probability 1 / sum over j of max(p_j / p_i, q_j / q_i).
    """
    order = np.argsort(-np.maximum(p, q), axis=-1)[..., :MOST_LIKELY]
    p, q = (np.take_along_axis(values, order, axis=-1) + 1e-300 for values in (p, q))
    ratios = np.maximum(p[..., None, :] / p[..., None], q[..., None, :] / q[..., None])
    return np.asarray((1 / ratios.sum(axis=-1)).sum(axis=-1))
