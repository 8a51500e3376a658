"""Sums and products that broadcast a weight over the activations: gains, biases, gates."""

from __future__ import annotations

import torch
from torch import Tensor

from sdi.rowtags import layout
from sdi.rules.use import Use, Weight


def multiply_rule(use: Use) -> bool:
    """`w * x`: the gradient of w is δ·x, summed over what w was broadcast along."""
    return _elementwise(use, product=True)


def add_rule(use: Use) -> bool:
    """`w + x`: the gradient of w is δ, summed over what w was broadcast along."""
    return not use.kwargs.keys() & {"alpha", "out"} and _elementwise(use, product=False)


def _elementwise(use: Use, product: bool) -> bool:
    if use.kwargs or len(use.args) != 2 or len(use.weights) != 1:
        return False
    at, weight = next(iter(use.weights.items()))
    other = use.args[1] if at == ("args", 0) else use.args[0]
    place = _row_axis(use, weight)
    if not isinstance(other, Tensor) or place is None:
        return False
    gradient = _row_first(use, use.wide_delta * other if product else use.wide_delta, *place)
    weight.emit(use.sink, use.step, _unbroadcast(gradient, weight.tensor.shape, place[0]))
    return True


def _row_axis(use: Use, weight: Weight) -> tuple[int, int] | None:
    """(axis of δ that holds the rows, elements of it a row has), where the weight is the same for
    every row: it has no such axis, or one of size 1. None where another rule must serve.
    """
    known = layout(use.rows, use.delta.shape, use.batch)
    at = known.axis(use.delta.shape) if known is not None and use.delta.ndim else None
    if at is None:
        return None
    own = at[0] - (use.delta.ndim - weight.tensor.ndim)
    return at if own < 0 or weight.tensor.shape[own] == 1 else None


def _row_first(use: Use, gradient: Tensor, axis: int, inner: int) -> Tensor:
    """(..., outer·count·inner, ...) to (B, n, ...), the axis of the rows taken out."""
    known = layout(use.rows, gradient.shape, use.batch)
    assert known is not None
    shape = (*gradient.shape[:axis], -1, known.count, inner, *gradient.shape[axis + 1 :])
    parted = gradient.reshape(shape).movedim(axis + 1, 0)
    parted = parted.movedim((axis + 1, axis + 2), (1, 2)).flatten(1, 2)
    return known.gathered(parted, use.batch)


def _unbroadcast(gradient: Tensor, shape: torch.Size, axis: int) -> Tensor:
    """(B, n, *δ's other axes) summed to (B, *shape), shape having size 1 at δ's `axis`, or none."""
    ndim = gradient.ndim - 1
    full = (1,) * (ndim - len(shape)) + tuple(shape)
    others = full[:axis] + full[axis + 1 :]
    wide = [i + 2 for i, size in enumerate(others) if size == 1 and gradient.shape[i + 2] != 1]
    return gradient.sum(dim=[1, *wide]).reshape(gradient.shape[0], *shape)
