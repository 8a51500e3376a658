"""captum: TracInCP, with its per-row loop and with its batched per-row gradients.

`TracInCPFast` and `TracInCPFastRandProj` attribute a last linear layer only, and the Arnoldi
influence function multiplies by an inverse Hessian: neither computes what is asked here.
"""

from __future__ import annotations

from collections.abc import Callable

import cases
from captum.influence import TracInCP
from cases import Case
from judge import Way, drive
from torch import Tensor, nn
from torch.utils.data import TensorDataset


def scores(batched: bool) -> Callable[[Case], Tensor]:
    """`TracInCP.influence` over one checkpoint with learning rate 1: (N, Q)."""

    def run(case: Case) -> Tensor:
        loss: Callable[..., Tensor] = nn.MSELoss(reduction="sum") if batched else cases.row_losses
        tracer = TracInCP(
            case.make(),
            TensorDataset(*case.train),
            ["the weights that the model has"],
            checkpoints_load_func=lambda _model, _path: 1.0,
            loss_fn=loss,
            batch_size=len(case.train[0]),
            sample_wise_grads_per_batch=batched,
        )
        return tracer.influence(case.query).T

    return run


if __name__ == "__main__":
    drive(
        [
            Way("TracInCP, a row at a time", scores(False)),
            Way("TracInCP(sample_wise_grads_per_batch=True)", scores(True)),
        ],
        [cases.control(), cases.looped(), cases.rescaled()],
        ["captum"],
    )
