"""Grouped matrix products: tokens sorted by expert, a matrix of the stack for each group."""

from __future__ import annotations

import torch

from sdi.rowtags import Rows, layout, split, tag_of
from sdi.rules.use import Use


def grouped_rule(use: Use) -> bool:
    """`grouped_mm(x (n, R), weight (E, R, C), offs=(E,))`: expert e has rows offs[e-1] to offs[e].

    The gradient of its matrix is Σ x ⊗ δ over these.
    """
    inputs, weight = use.argument(0, "mat_a"), use.weight(1, "mat_b")
    ends = use.argument(2, "offs")
    if weight is None or weight.name is None or weight.part is not None or len(use.weights) > 1:
        return False
    if weight.tensor.ndim != 3 or inputs.ndim != 2 or ends is None:
        return False
    known = layout(tag_of(inputs) or use.rows, inputs.shape, use.batch)
    owners = known.places(inputs.shape) if known is not None else None
    if owners is None:
        return False
    first = 0
    for number, last in enumerate(ends.tolist()):
        if last > first:
            _expert(use, number, slice(first, last), owners.to(inputs.device))
        first = last
    return True


def _expert(use: Use, number: int, tokens: slice, owners: torch.Tensor) -> None:
    weight = use.weight(1, "mat_b")
    assert weight is not None
    left, right = use.argument(0, "mat_a")[tokens], use.delta[tokens]
    parts = [
        split(t, Rows(len(t), t.shape[1], owners[tokens]), use.batch, use.label)
        for t in (left, right)
    ]
    weight.matrix(number, weight.tensor[number]).emit_outer(use.sink, use.step, *parts)
