"""One entry of the zoo: a model, its loop, a batch, each row's own batch, and what is expected."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import sdi
from sdi.capture import Loss

ROWS, LENGTH, WIDTH, VOCABULARY, LOOPS = 3, 5, 16, 11, 3

Make = Callable[[], nn.Module]
RIGHT = "right"


@dataclass(frozen=True)
class Case:
    """What one measurement needs.

    Attributes:
        model: in the mode in which it is attributed.
        batch: all rows, as the user would pass them.
        row: row number → the batch of that row alone, made without the library's row slicing.
        body: as `sdi.Loop` takes it.
        loss: (model, batch) → (B,).
        rows: B.
        tied: as `sdi.Loop` takes it.
        reference: the loss that per-row autograd runs; the same function where `loss` hides its
            forward pass from it (reentrant checkpointing).
        bound: largest error that counts as right.
        expected: "right", or a regular expression of the refusal.
        steps: how many steps there must be; None where that is not in question.
        options: further arguments of `sdi.Loop`.
    """

    model: nn.Module
    batch: Any
    row: Callable[[int], Any]
    body: Any = "body"
    loss: Loss = sdi.causal_lm_loss
    rows: int = ROWS
    tied: bool = True
    reference: Loss | None = None
    bound: float = 1e-4
    expected: str = RIGHT
    steps: int | None = None
    options: dict[str, Any] = field(default_factory=dict)


def tokens(
    rows: int = ROWS, length: int = LENGTH, vocabulary: int = VOCABULARY, seed: int = 1
) -> dict[str, Tensor]:
    """Random tokens and labels (B, T); the first label of every other row is masked."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocabulary, (rows, length), generator=generator)
    labels = ids.clone()
    labels[1::2, 0] = -100
    return {"input_ids": ids, "labels": labels}


def pick(batch: dict[str, Tensor]) -> Callable[[int], dict[str, Tensor]]:
    """Each row alone, of a batch whose every tensor has the row axis first."""
    return lambda i: {key: value[i : i + 1].clone() for key, value in batch.items()}


def names(rows: int) -> list[str]:
    """Ids r0, r1, …"""
    return [f"r{i}" for i in range(rows)]
