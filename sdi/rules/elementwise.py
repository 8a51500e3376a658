"""Sums and products that broadcast a weight over the activations: gains, biases, gates."""

from __future__ import annotations

from torch import Tensor

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
    if not isinstance(other, Tensor) or not _broadcasts_over_rows(weight, use):
        return False
    gradient = use.delta * other if product else use.delta
    gradient = gradient.reshape(use.batch, -1, *gradient.shape[1:])
    weight.emit(use.sink, use.step, _unbroadcast(gradient, tuple(weight.tensor.shape)))
    return True


def _broadcasts_over_rows(weight: Weight, use: Use) -> bool:
    """Whether the weight is the same for every row: it has no axis, or one of size 1, there."""
    if use.delta.ndim == 0 or use.delta.shape[0] % use.batch:
        return False
    return weight.tensor.ndim < use.delta.ndim or weight.tensor.shape[0] == 1


def _unbroadcast(gradient: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(B, n, d1, ..., dk), n rows of the leading axis each, summed to (B, *shape)."""
    full = (1,) * (gradient.ndim - 1 - len(shape)) + shape
    wide = [i + 1 for i, size in enumerate(full) if size == 1 and gradient.shape[i + 1] != 1]
    summed = gradient.sum(dim=wide, keepdim=True) if wide else gradient
    return summed.reshape(gradient.shape[0], *shape)
