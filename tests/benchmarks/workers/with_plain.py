"""What a pass is held against: a training step, its floor, and exact gradients. Plain torch."""

from __future__ import annotations

from typing import Any

import torch
from answer import Deed, serve, timed
from models import build, digest, embeddings, exact_scores, row_losses, tokens


def make(case: dict[str, Any], kind: str) -> dict[str, Deed]:
    """`kind`: "training step" (forward, backward, SGD) or "floor" (no weight gradients)."""
    model, drawn = build(case), digest(build(case))
    rows = tokens(case, case["most_rows"])
    optimizer = torch.optim.SGD(model.parameters(), 1e-6)

    def train(count: int) -> None:
        optimizer.zero_grad()
        row_losses(model, rows[:count]).mean().backward()
        optimizer.step()

    def floor(count: int) -> None:
        ids = rows[:count]
        state = embeddings(model, ids).requires_grad_()
        torch.autograd.grad(row_losses(model, ids, state).sum(), state)

    def scores(count: int) -> dict[str, Any]:
        return {"scores": exact_scores(case, rows[:count]), "digest": drawn}

    if kind == "floor":
        model.requires_grad_(False)
    return {"round": timed(floor if kind == "floor" else train), "scores": scores}


if __name__ == "__main__":
    serve(make)
