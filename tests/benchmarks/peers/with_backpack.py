"""BackPACK: the `BatchGrad` extension."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import cases
import torch
from backpack import backpack, extend
from backpack.extensions import BatchGrad
from cases import Case, Rows
from judge import Way, drive
from torch import Tensor, nn

NOTE = "the first backward call deletes what the hooks keep of a module"


def gradients(case: Case, rows: Rows, converter: bool) -> Tensor:
    """`grad_batch` of every parameter after one backward pass: (rows, P)."""
    warnings.filterwarnings(
        "error", message=r"Extension saving to .*Rescaled"
    )  # it skips what it warns of
    model = extend(case.make(), use_converter=converter)
    loss = extend(nn.MSELoss(reduction="sum"))
    with backpack(BatchGrad()):
        loss(model(rows[0]), rows[1]).backward()
    return torch.cat([p.grad_batch.flatten(1) for p in model.parameters()], dim=1)


def scores(converter: bool) -> Callable[[Case], Tensor]:
    """(N, Q)."""

    def run(case: Case) -> Tensor:
        return cases.gram(*(gradients(case, r, converter) for r in (case.train, case.query)))

    return run


if __name__ == "__main__":
    drive(
        [
            Way("BatchGrad", scores(False), refusals=("does not have an extension",), note=NOTE),
            Way("BatchGrad, extend(use_converter=True)", scores(True), refusals=("Cycle with",)),
        ],
        [cases.control(), cases.looped(), cases.rescaled()],
        ["backpack-for-pytorch"],
    )
