"""dattri: TracIn by `torch.func`, and the hooks behind LoGra and FactGraSS, not projected."""

from __future__ import annotations

from types import SimpleNamespace

import cases
import torch
from cases import Case, Rows
from dattri.algorithm.block_projected_if import BlockProjectedIFAttributor
from dattri.algorithm.tracin import TracInAttributor
from dattri.task import AttributionTask
from judge import Way, drive
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

IDENTITY = {"device": "cpu", "proj_dim": -1, "proj_max_batch_size": 64, "proj_type": "identity"}

NOTE = "each call overwrites the input that the hooks keep, the first backward call deletes it"


def loaders(case: Case) -> list[DataLoader[tuple[Tensor, ...]]]:
    """Training rows and queries, one batch each."""
    return [DataLoader(TensorDataset(*r), batch_size=len(r[0])) for r in (case.train, case.query)]


def tracin(case: Case) -> Tensor:
    """`TracInAttributor.attribute` with one checkpoint of weight 1, not projected: (N, Q)."""
    model = case.make()

    def loss(params: dict[str, Tensor], row: tuple[Tensor, Tensor]) -> Tensor:
        output = torch.func.functional_call(model, params, (row[0].unsqueeze(0),))
        return cases.row_losses(output, row[1].unsqueeze(0)).sum()

    task = AttributionTask(loss, model, model.state_dict())
    attributor = TracInAttributor(
        task, torch.ones(1), normalized_grad=False, projector_kwargs={"proj_type": "identity"}
    )
    return attributor.attribute(*loaders(case))


class WithLoss(nn.Module):
    """Inputs and targets by name → an object with the `loss`, as Hugging Face models return it.

    For queries LoGra takes `loss` from there; without it, it takes the cross-entropy of the output,
    whatever loss the task names. It multiplies by the size of the batch: the loss is a mean.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, y: Tensor) -> SimpleNamespace:
        """(rows, D) twice → loss."""
        return SimpleNamespace(loss=cases.row_losses(self.model(x), y).mean())


def hooks(case: Case) -> Tensor:
    """`BlockProjectedIFAttributor.attribute`, Hessian "Identity", not projected: (N, Q)."""
    model = WithLoss(case.make())

    def loss(used: nn.Module, batch: dict[str, Tensor], _device: str) -> Tensor:
        return used(**batch).loss

    def loader(rows: Rows) -> DataLoader[dict[str, Tensor]]:
        named = [{"x": x, "y": y} for x, y in zip(*rows, strict=True)]
        return DataLoader(named, batch_size=len(named))  # type: ignore[arg-type]

    task = AttributionTask(loss, model, model.state_dict())
    attributor = BlockProjectedIFAttributor(
        task, hessian="Identity", sparsifier_kwargs=IDENTITY, projector_kwargs=IDENTITY,
        offload="cpu",
    )  # fmt: skip
    train = loader(case.train)
    attributor.cache(train)
    return attributor.attribute(train, loader(case.query))


if __name__ == "__main__":
    drive(
        [
            Way("TracInAttributor", tracin),
            Way("BlockProjectedIFAttributor (LoGra)", hooks, note=NOTE),
        ],
        [cases.control(), cases.looped(), cases.rescaled()],
        ["dattri"],
    )
