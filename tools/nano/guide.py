"""Guided heads: a training-only loss that shows a few heads where to look.

Copying needs a chain: one head looks at the token before, a later one finds where the current tokens stood
earlier, the last one where the text to come can be copied from. The language loss alone finds that chain only
after far more tokens than this model is trained on, so head 0 of a few layers is told, by the share of its
attention that falls on the right keys. So is head 0 of each MTP layer, within its window. The name of a
parameter is one token, too short to be told from chance elsewhere, so where one begins is guided by itself.
"""

from functools import cache

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from tools.nano.data import NANO
from tools.nano.model import Nano

PREVIOUS_LAYERS = (1, 2)  # sliding: the token before
MATCH_LAYER, SOURCE_LAYER = 4, 8  # full: what followed the same tokens earlier; where the next tokens stand
LONGEST_MATCH, SHORTEST_MATCH = 4, 2
NAME_OPENING = ("parameter", "=")  # the tokens before a parameter's name
PAD = 2
FIRST_TEXT_ID = 12  # below are special tokens
SHORTEST_PERIOD = 12
GUIDED_ROWS = 4  # of a batch, its last: guiding all of them costs a fifth of the speed


def repeated_rows(count: int, length: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Random tokens over and over, each row with its period, and weights that skip the first time.

    Only content leads to the right key here; in dialogues the wording around it does as well.
    """
    ids = torch.randint(FIRST_TEXT_ID, vocab_size, (count, length))
    weights = torch.ones(count, length)
    for row, weight in zip(ids, weights, strict=True):
        period = int(torch.randint(SHORTEST_PERIOD, length // 2, ()))
        row[:] = row[:period].repeat(-(-length // period))[:length]
        weight[: period + 1] = 0
    return ids, weights


def watch(model: Nano) -> None:
    """Make the guided layers keep the scores of their head 0 for the last rows."""
    mtp_layers = range(model.config.num_layers, model.config.num_layers + model.config.num_mtp_layers)
    for index in (*PREVIOUS_LAYERS, MATCH_LAYER, SOURCE_LAYER, *mtp_layers):
        model.model["layers"][index].self_attn.watched_rows = GUIDED_ROWS


def without_space() -> Tensor:
    """For each id the id of its text without a leading space, which a value loses on a line of its own."""
    tokenizer = Tokenizer.from_file(str(NANO / "tokenizer.json"))
    vocabulary = tokenizer.get_vocab()
    ids = torch.arange(len(vocabulary))
    for token, number in vocabulary.items():
        if token.startswith("Ġ"):  # how byte-level BPE writes a space
            ids[number] = vocabulary.get(token[1:], number)
    return ids


def name_openings(ids: Tensor) -> Tensor:
    """(B, L): whether the name of a parameter comes next."""
    before, last = _opening_ids()
    return (ids == last) & (F.pad(ids[:, :-1], (1, 0)) == before)


@cache
def _opening_ids() -> tuple[int, ...]:
    tokenizer = Tokenizer.from_file(str(NANO / "tokenizer.json"))
    return tuple(tokenizer.token_to_id(token) for token in NAME_OPENING)


def matches(ids: Tensor, openings: Tensor) -> tuple[Tensor, Tensor]:
    """(B, L, L) each: keys after the longest repetition of what ends at i; keys where what follows begins."""
    ahead = F.pad(ids[:, 1:], (0, 1), value=-1)
    behind = F.pad(ids[:, :-1], (1, 0), value=-2)
    same_past = (ids[:, :, None] == behind[:, None]).tril()
    same_future = (ahead[:, :, None] == ids[:, None]).tril()
    run_past, run_future = same_past, same_future
    past, future = same_past.to(torch.uint8), same_future.to(torch.uint8)
    for _ in range(LONGEST_MATCH - 1):
        run_past = same_past & F.pad(run_past[:, :-1, :-1], (1, 0, 1, 0))
        run_future = same_future & F.pad(run_future[:, 1:, 1:], (0, 1, 0, 1))
        past += run_past
        future += run_future
    is_text = (ids != PAD)[:, :, None]
    shortest = torch.where(openings, 1, SHORTEST_MATCH)[:, :, None]
    return _longest(past, SHORTEST_MATCH) & is_text, _longest(future, shortest) & is_text


def _longest(length: Tensor, shortest: Tensor | int) -> Tensor:
    best = length.amax(-1, keepdim=True)
    return (length == best) & (best >= shortest)


def guide_losses(model: Nano, ids: Tensor, plain: Tensor, num_repeated: int) -> list[Tensor]:
    """Mean of -log(attention on the right keys) per guided layer, after `watch` and a forward pass.

    The last `num_repeated` rows, from `repeated_rows`, weigh as much as the other guided ones, and so do the
    beginnings of parameters' names.
    """
    guided = plain[ids[-GUIDED_ROWS:]]
    openings = name_openings(guided)
    follows, begins = matches(guided, openings)
    previous = torch.eye(ids.shape[1], dtype=torch.bool).roll(1, 0).tril()[None].expand_as(follows)
    targets = {**dict.fromkeys(PREVIOUS_LAYERS, previous), MATCH_LAYER: follows, SOURCE_LAYER: begins}
    for k in range(model.config.num_mtp_layers):
        # Row i of depth k reads token i+1+k and predicts the next: the backbone's task, that many rows later.
        targets[model.config.num_layers + k] = begins[:, 1 + k :, 1 + k :]
    result = []
    for index, wanted in targets.items():
        attention = model.model["layers"][index].self_attn
        rows = torch.arange(wanted.shape[1])
        distance = rows[:, None] - rows[None]
        visible = (distance >= 0) & (distance < (attention.window or len(rows)))
        scores = attention.scores.float().masked_fill(~visible, -torch.inf)
        wanted = wanted & visible
        has_target = wanted.any(-1)
        is_repeated = torch.arange(len(guided))[:, None] >= len(guided) - num_repeated
        groups = [has_target & ~is_repeated, has_target & is_repeated]
        if index == SOURCE_LAYER:
            groups.append(has_target & openings)
        for group in groups:
            if group.any():
                on_right = scores.masked_fill(~wanted, -torch.inf)[group].logsumexp(-1)
                result.append((scores[group].logsumexp(-1) - on_right).mean())
    return result
