"""curvlinops: the Jacobian of the rows' losses, whose rows are the per-row gradients."""

from __future__ import annotations

import cases
import torch
from cases import Case, Rows
from curvlinops import JacobianLinearOperator
from judge import Way, drive
from torch import Tensor, nn


class Losses(nn.Module):
    """Rows with their targets beside them (rows, 2·D) → losses (rows, 1)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, both: Tensor) -> Tensor:
        """(rows, 2·D) → (rows, 1)."""
        x, y = both.chunk(2, dim=1)
        return cases.row_losses(self.model(x), y)[:, None]


def gradients(case: Case, rows: Rows) -> Tensor:
    """`JacobianLinearOperator` times the identity: (rows, P)."""
    model = Losses(case.make())
    weights = list(model.parameters())
    data = [(torch.cat(rows, dim=1), torch.zeros(len(rows[0]), 1))]
    operator = JacobianLinearOperator(model, weights, data, progressbar=False)
    return operator @ torch.eye(operator.shape[1])


def scores(case: Case) -> Tensor:
    """(N, Q)."""
    return cases.gram(gradients(case, case.train), gradients(case, case.query))


if __name__ == "__main__":
    drive(
        [Way("JacobianLinearOperator", scores)],
        [cases.control(), cases.looped(), cases.rescaled()],
        ["curvlinops-for-pytorch"],
    )
