"""Muon: momentum orthogonalised by Newton-Schulz, for the matrices inside layers (Jordan et al., 2024).

Matrices of one shape, experts included, are handled as one batch: at this size the calls cost more than the
arithmetic.
"""

from collections import defaultdict

import torch
from torch import Tensor


def orthogonalize(g: Tensor, steps: int = 5) -> Tensor:
    """The nearest (semi-)orthogonal matrix of each in (N, rows, columns), up to a loose tolerance."""
    a, b, c = 3.4445, -4.7750, 2.0315  # quintic tuned for speed, not for convergence to exactly 1
    x = g / (g.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(steps):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum on orthogonalised updates, scaled to be independent of the shape."""

    def __init__(
        self, params: list[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                by_shape[tuple(p.shape[-2:])].append(p)
            for (rows, columns), params in by_shape.items():
                updates = []
                for p in params:
                    buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    buffer.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(buffer, group["momentum"]).reshape(-1, rows, columns))
                update = orthogonalize(torch.cat(updates)) * max(1, rows / columns) ** 0.5
                for p, u in zip(params, update.split([x.shape[0] for x in updates]), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(u.view_as(p), alpha=group["lr"])
