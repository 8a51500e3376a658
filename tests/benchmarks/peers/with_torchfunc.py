"""torch itself: `vmap(grad(...))`, the reference that every library could use."""

from __future__ import annotations

import cases
import torch
from cases import Case, Rows
from judge import Way, drive
from torch import Tensor
from torch.func import functional_call, grad, vmap


def gradients(case: Case, rows: Rows) -> Tensor:
    """Per-row gradients side by side: (rows, P)."""
    model = case.make()

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return cases.row_losses(functional_call(model, params, (x[None],)), y[None]).sum()

    found = vmap(grad(loss), in_dims=(None, 0, 0))(dict(model.named_parameters()), *rows)
    return torch.cat([g.flatten(1) for g in found.values()], dim=1)


def scores(case: Case) -> Tensor:
    """(N, Q)."""
    return cases.gram(gradients(case, case.train), gradients(case, case.query))


if __name__ == "__main__":
    drive([Way("vmap(grad)", scores)], [cases.control(), cases.looped(), cases.rescaled()], [])
