"""Matrix products: the gradient of the weight is Σ_n δ ⊗ a."""

from __future__ import annotations

from torch import Tensor

from sdi.rules.use import Use, Weight


def linear_rule(use: Use) -> bool:
    """`F.linear(input, weight (R, C), bias (R,))`; false for any other weight or bias."""
    inputs, weight, bias = use.argument(0, "input"), use.weight(1, "weight"), use.weight(2, "bias")
    if use.weight(0, "input") is not None or not use.is_rowwise(inputs):
        return False
    if weight is not None and weight.tensor.ndim != 2:
        return False
    if _broadcasts(use, bias):
        return False
    delta, summed = use.split_delta(), None
    if weight is not None:
        summed = weight.emit_outer(use.sink, use.step, delta, use.split(inputs))
    if bias is not None:
        bias.emit(use.sink, use.step, use.summed_delta(summed))
    return True


def matmul_rule(use: Use) -> bool:
    """`x @ W` with W (R, C): the gradient is Σ_n x ⊗ δ. Anything else is left to others."""
    weight = use.weight(1, "other") or use.weight(1, "mat2")
    if use.weight(0, "input") is not None:
        return False
    return _product(use, use.argument(0, "input"), weight)


def addmm_rule(use: Use) -> bool:
    """`addmm(bias, x, W)` with β = α = 1, as in GPT-2's Conv1D."""
    bias, inputs = use.weight(0, "input"), use.argument(1, "mat1")
    weight = use.weight(2, "mat2")
    if use.kwargs.get("beta", 1) != 1 or use.kwargs.get("alpha", 1) != 1:
        return False
    if use.weight(1, "mat1") is not None or _broadcasts(use, bias):
        return False
    if weight is not None and not _product(use, inputs, weight):
        return False
    if bias is not None:
        bias.emit(use.sink, use.step, use.summed_delta())
    return True


def _broadcasts(use: Use, bias: Weight | None) -> bool:
    """Whether a bias is added in another way than one number to each output."""
    return bias is not None and bias.tensor.shape != use.delta.shape[-1:]


def _product(use: Use, inputs: Tensor, weight: Weight | None) -> bool:
    if weight is None or weight.tensor.ndim != 2 or inputs.ndim < 2:
        return False
    if not use.is_rowwise(inputs):
        return False
    weight.emit_outer(use.sink, use.step, use.split(inputs), use.split_delta())
    return True
