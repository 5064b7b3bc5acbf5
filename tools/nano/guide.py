"""Guided heads: a training-only loss that shows a few heads where to look.

Copying needs a chain of two heads: one looks at the token before, a later one finds where the current tokens
stood earlier and looks at what followed. The language loss alone finds that chain only after far more tokens
than this model is trained on, so head 0 of a few layers is told, by the share of its attention on the right keys.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tools.nano.model import Nano

PREVIOUS_LAYERS = (1, 2)  # sliding
INDUCTION_LAYERS = (4, 8)  # full
PAD = 2
LONGEST_MATCH, SHORTEST_MATCH = 4, 2


def watch(model: Nano) -> None:
    """Make the guided layers keep the scores of their head 0."""
    for index in PREVIOUS_LAYERS + INDUCTION_LAYERS:
        model.model["layers"][index].self_attn.is_watched = True


def continuations(ids: Tensor) -> Tensor:
    """(B, L, L): key j of query i is where the longest earlier repetition of the tokens up to i goes on."""
    earlier = F.pad(ids[:, :-1], (1, 0), value=-1)
    same = (ids[:, :, None] == earlier[:, None, :]).tril()
    run = same
    length = same.to(torch.uint8)
    for _ in range(LONGEST_MATCH - 1):
        run = same & F.pad(run[:, :-1, :-1], (1, 0, 1, 0))
        length += run
    best = length.amax(-1, keepdim=True)
    return (length == best) & (best >= SHORTEST_MATCH) & (ids != PAD)[:, :, None]


def guide_loss(model: Nano, ids: Tensor) -> Tensor:
    """Mean of -log(attention on the right keys) over guided layers; `watch` and a forward pass come first."""
    length = ids.shape[1]
    distance = torch.arange(length)[:, None] - torch.arange(length)[None]
    right = continuations(ids)
    total = torch.zeros(())
    for index in PREVIOUS_LAYERS + INDUCTION_LAYERS:
        scores = model.model["layers"][index].self_attn.scores.float()
        if index in PREVIOUS_LAYERS:
            visible, wanted = (distance >= 0) & (distance < model.config.window), (distance == 1)[None]
        else:
            visible, wanted = distance >= 0, right
        scores = scores.masked_fill(~visible, -torch.inf)
        rows = wanted.any(-1).expand(scores.shape[:2])
        on_right = scores.masked_fill(~wanted, -torch.inf)[rows].logsumexp(-1)
        total = total + (scores[rows].logsumexp(-1) - on_right).mean()
    return total / len(PREVIOUS_LAYERS + INDUCTION_LAYERS)
