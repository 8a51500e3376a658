"""opacus: `grad_sample` of its `GradSampleModule`, by hooks and by expanded weights."""

from __future__ import annotations

from collections.abc import Callable

import cases
import torch
from cases import Case, Rows
from judge import Way, drive
from opacus.grad_sample.utils import wrap_model
from torch import Tensor


def scores(mode: str) -> Callable[[Case], Tensor]:
    """Inner products of `grad_sample` after one backward pass a batch: (N, Q)."""

    def gradients(case: Case, rows: Rows) -> Tensor:
        model = wrap_model(
            case.make(), grad_sample_mode=mode, batch_first=True, loss_reduction="sum"
        )
        cases.row_losses(model(rows[0]), rows[1]).sum().backward()
        return torch.cat([p.grad_sample.flatten(1) for p in model.parameters()], dim=1)

    return lambda case: cases.gram(gradients(case, case.train), gradients(case, case.query))


if __name__ == "__main__":
    drive(
        [
            Way("GradSampleModule, hooks", scores("hooks")),
            Way("GradSampleModule, functorch", scores("functorch")),
            Way("GradSampleModuleExpandedWeights", scores("ew")),
        ],
        [cases.control(), cases.looped(), cases.rescaled()],
        ["opacus"],
    )
