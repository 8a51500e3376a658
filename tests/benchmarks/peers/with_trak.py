"""TRAK: the features of `TRAKer.featurize`, for a model output that is the loss, not projected."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable

import cases
import torch
from cases import Case, Rows
from judge import Way, drive
from torch import Tensor, nn
from trak import TRAKer
from trak.modelout_functions import AbstractModelOutput
from trak.projectors import NoOpProjector


class Loss(AbstractModelOutput):
    """The row's loss as the model output f, so that TRAK's gradients are the loss's."""

    def __init__(self) -> None:
        super().__init__()

    @staticmethod
    def get_output(
        model: nn.Module,
        weights: dict[str, Tensor],
        buffers: dict[str, Tensor],
        x: Tensor,
        y: Tensor,
    ) -> Tensor:
        """The loss of one row: a scalar."""
        output = torch.func.functional_call(model, (weights, buffers), (x[None],))
        return cases.row_losses(output, y[None]).sum()

    def get_out_to_loss_grad(
        self, model: nn.Module, weights: object, buffers: object, batch: Iterable[Tensor]
    ) -> Tensor:
        """∂loss/∂f = 1: (rows, 1)."""
        return torch.ones(len(next(iter(batch))), 1)


def gradients(case: Case, rows: Rows) -> Tensor:
    """The stored features: (rows, P)."""
    model, size = case.make(), len(rows[0])
    width = sum(p.numel() for p in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        traker = TRAKer(
            model, Loss(), train_set_size=size, save_dir=folder, device="cpu", proj_dim=width,
            projector=NoOpProjector(device="cpu"), use_half_precision=False,
            logging_level=logging.ERROR,
        )  # fmt: skip
        traker.load_checkpoint(model.state_dict(), model_id=0)
        traker.featurize(batch=rows, num_samples=size)
        found = torch.tensor(traker.saver.current_store["grads"][:size])
        return found * float(traker.normalize_factor)  # it divides by it


def scores(case: Case) -> Tensor:
    """(N, Q)."""
    return cases.gram(gradients(case, case.train), gradients(case, case.query))


if __name__ == "__main__":
    drive(
        [Way("TRAKer.featurize", scores)],
        [cases.control(), cases.looped(), cases.rescaled()],
        ["traker"],
    )
