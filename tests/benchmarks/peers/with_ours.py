"""Ours: exact step gradients, and sketches of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cases
import torch
from cases import Case, Rows
from judge import Way, drive
from torch import Tensor, nn

import sdi

DIMS = (1024, 16384)
REFUSALS = ("SpecError", "CaptureError", "LossError", "LoopError")
Estimator = Callable[[sdi.Loop, Callable[[nn.Module, Any], Tensor], str], Any]


def scores(estimator: Estimator) -> Callable[[Case], Tensor]:
    """Influence (N, Q, S); (N, Q) where nothing loops."""

    def run(case: Case) -> Tensor:
        model, tied = case.make(), len(case.weights) == 1
        body = model.body if tied else [model.first, model.second]
        loop = sdi.Loop(model, body, tied=tied)
        loss = token_mean if case.lengths else per_row
        train, query = [], []
        for number in range(1 + len(case.later)):
            if number:
                model.load_state_dict(dict.fromkeys(model.state_dict(), case.later[number - 1]))
            estimate = estimator(loop, loss, f"step-{number}")
            order = torch.randperm(len(case.train[0])) if case.later else None
            train.append(part(estimate, case, 0, order))
            query.append(part(estimate, case, 1, None))
        found = sdi.influence(train, query, tied=tied)
        return found if tied else found.sum(2)

    return run


def part(estimate: Any, case: Case, side: int, order: Tensor | None) -> Any:
    """One pass over training rows (side 0) or queries, with their ids."""
    rows: Rows | tuple[Tensor, ...] = (case.train, case.query)[side]
    if case.lengths:
        rows = (*rows, cases.mask(case.lengths[side]))
    chosen = torch.arange(len(rows[0])) if order is None else order
    return estimate(tuple(t[chosen] for t in rows), [f"row-{i}" for i in chosen.tolist()])


def per_row(model: nn.Module, batch: Any) -> Tensor:
    """Losses (rows,)."""
    return cases.row_losses(model(batch[0]), batch[1])


def token_mean(model: nn.Module, batch: Any) -> Tensor:
    """One number: the mean over all tokens of the batch that are no padding."""
    losses = (model(batch[0]) - batch[1]).square().sum(2)
    return (losses * batch[2]).sum() / batch[2].sum()


def exact(loop: sdi.Loop, loss: Callable[[nn.Module, Any], Tensor], _checkpoint: str) -> Any:
    """`ExactGradients`."""
    return sdi.ExactGradients(loop, loss)


def sketched(dim: int, seed: int) -> Estimator:
    """`Sketcher` of one dimension and seed."""

    def make(loop: sdi.Loop, loss: Callable[[nn.Module, Any], Tensor], checkpoint: str) -> Any:
        return sdi.Sketcher(loop, dim, seed, checkpoint=checkpoint, loss=loss)

    return make


if __name__ == "__main__":
    every = [
        cases.control(), cases.looped(), cases.rescaled(), cases.twice(), cases.truncated(),
        cases.functional(), cases.padded(), cases.shuffled(),
    ]  # fmt: skip
    drive(
        [
            Way("ExactGradients", scores(exact), refusals=REFUSALS),
            *(
                Way(
                    f"Sketcher(dim={dim})",
                    scores(sketched(dim, 0)),
                    again=tuple(scores(sketched(dim, seed)) for seed in range(1, 8)),
                    dim=dim,
                    refusals=REFUSALS,
                    only=("control", "looped") if dim == DIMS[0] else (),
                )
                for dim in DIMS
            ),
        ],
        every,
        [],
    )
