"""step-decomposed-influence: both of its estimators, as its README's quickstart uses them.

The imported `sdi` is the published package: this runs where ours is not installed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import torch
from cases import Case
from judge import Way, drive
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sdi import CheckpointSpec, FullGradientTracInSDI, ProjectedTracInSDI

DIMS = (1024, 16384)
REFUSALS = ("only supports", "No Opacus grad sampler", "does not match expected_steps")
Estimator = Callable[..., Any]


def scores(estimator: Estimator, **options: Any) -> Callable[[Case], Tensor]:
    """Influence (N, Q, S); (N, Q) where nothing loops."""

    def run(case: Case) -> Tensor:
        model = case.make()
        body = getattr(model, "body", model)
        chosen = {"loss_reduction": "mean" if case.lengths else "sum", **options}
        if len(case.weights) > 1:
            chosen.pop("expected_steps", None)  # of the loops alone
        estimate = estimator(model=model, target_modules=body, **chosen)
        with tempfile.TemporaryDirectory() as folder:
            found = estimate.influence_across_checkpoints(
                checkpoints=checkpoints(case, model, Path(folder)),
                train_loader=loader(case, 0),
                query_loader=loader(case, 1),
                loss_fn=token_mean if case.lengths else per_row,
                mode="sdi",
            )
        return found.sdi if len(case.weights) == 1 else found.tracin

    return run


def checkpoints(case: Case, model: nn.Module, folder: Path) -> list[CheckpointSpec]:
    """The model's weights, and those of later checkpoints, as files of weight 1."""
    states = [model.state_dict()]
    states += [dict.fromkeys(states[0], weight) for weight in case.later]
    listed = []
    for number, state in enumerate(states):
        path = folder / f"{number}.pt"
        torch.save({"model_state_dict": state}, path)
        listed.append(CheckpointSpec(path, 1.0))
    return listed


def loader(case: Case, side: int) -> DataLoader[tuple[Tensor, ...]]:
    """Training rows (side 0) or queries in one batch, shuffled where the case says so."""
    rows: tuple[Tensor, ...] = (case.train, case.query)[side]
    if case.lengths:
        rows = (*rows, cases.mask(case.lengths[side]))
    return DataLoader(
        TensorDataset(*rows), batch_size=len(rows[0]), shuffle=bool(case.later) and side == 0
    )


def per_row(model: nn.Module, batch: Any) -> Tensor:
    """Losses (rows,)."""
    return cases.row_losses(model(batch[0]), batch[1])


def token_mean(model: nn.Module, batch: Any) -> Tensor:
    """One number: the mean over the batch's tokens that are no padding, as trainers take it."""
    losses = (model(batch[0]) - batch[1]).square().sum(2)
    return (losses * batch[2]).sum() / batch[2].sum()


if __name__ == "__main__":
    every = [
        cases.control(), cases.looped(), cases.rescaled(), cases.twice(), cases.truncated(),
        cases.functional(), cases.padded(), cases.shuffled(),
    ]  # fmt: skip
    drive(
        [
            Way("FullGradientTracInSDI", scores(FullGradientTracInSDI), refusals=REFUSALS),
            Way(
                f"FullGradientTracInSDI(expected_steps={cases.LOOPS})",
                scores(FullGradientTracInSDI, expected_steps=cases.LOOPS),
                refusals=REFUSALS,
                only=("control", "looped", "called twice a step", "first step under no_grad"),
            ),
            *(
                Way(
                    f"ProjectedTracInSDI(projection_size={dim})",
                    scores(ProjectedTracInSDI, projection_size=dim, seed=0),
                    again=tuple(
                        scores(ProjectedTracInSDI, projection_size=dim, seed=seed)
                        for seed in range(1, 8)
                    ),
                    dim=dim,
                    refusals=REFUSALS,
                    only=("control", "looped") if dim == DIMS[0] else (),
                )
                for dim in DIMS
            ),
        ],
        every,
        ["step-decomposed-influence", "opacus"],
    )
