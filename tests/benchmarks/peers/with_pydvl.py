"""pyDVL: the per-row gradients that its influence functions are made of."""

from __future__ import annotations

import cases
import torch
from cases import Case, Rows
from judge import Way, drive
from pydvl.influence.torch.functional import create_per_sample_gradient_function
from torch import Tensor


def gradients(case: Case, rows: Rows) -> Tensor:
    """`create_per_sample_gradient_function`: (rows, P)."""
    model = case.make()

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().sum()

    function = create_per_sample_gradient_function(model, loss)
    found = function({n: p.detach() for n, p in model.named_parameters()}, *rows)
    return torch.cat([g.flatten(1) for g in found.values()], dim=1)


def scores(case: Case) -> Tensor:
    """(N, Q)."""
    return cases.gram(gradients(case, case.train), gradients(case, case.query))


if __name__ == "__main__":
    drive(
        [Way("per-sample gradients", scores)],
        [cases.control(), cases.looped(), cases.rescaled()],
        ["pydvl"],
    )
