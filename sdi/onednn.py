"""Float32 linear layers of a captured pass by oneDNN, where that is the faster library.

torch has two libraries for matrix products on a CPU and sends float32 to MKL, whatever the
processor. Which is faster is measured (`sdi.sketch.costs`); on the AMD processor that this was
written on, oneDNN takes a seventh less time. A pass without weight gradients is mostly such
products, forward and backward. A call on oneDNN has no derivative in torch, hence the function
here. Results differ by the rounding of float32 sums: 6e-7 of a product, where MKL's is 3e-7.

What is left to torch: small products, where one more Python call costs more than is gained; weights
that require a gradient; operands that are no plain tensors, since oneDNN reads memory as it lies;
autocast, transforms of torch.func, forward-mode and second derivatives. And numbers of tokens with
more than six binary digits between the first one and the last: oneDNN keeps half a megabyte for
each number it has met, whatever its caches are limited to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sdi.sketch.costs import costs

LARGE = 1 << 25
"""Multiply-adds of a product from which the gain exceeds the cost of a call, 0.1 ms."""
FLOAT = (torch.float32,)
DIGITS = 6
"""Binary digits of a number of tokens that count: 32 numbers between two powers of two."""


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any
) -> Tensor | None:
    """As `F.linear`, or None where that does better; input (..., C), weight (R, C), bias (R,)."""
    if options or not _suits(input, weight, bias):
        return None
    found: Tensor = _Linear.apply(input, weight, bias)  # type: ignore[no-untyped-call]
    return found


class _Linear(torch.autograd.Function):
    """The product, and its derivative by the input."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight)
        return _product(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor | None) -> tuple[Tensor | None, None, None]:
        (delta,), (weight,) = deltas, ctx.saved_tensors
        if delta is None or not ctx.needs_input_grad[0]:
            return None, None, None
        if torch.is_grad_enabled() or is_transformed(delta) or not is_plain(delta, FLOAT):
            return delta @ weight, None, None
        return _product(delta, weight.t(), None), None, None


def _product(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(..., R) float32; `.data`, for the call returns a view, which a user must not see."""
    if not weight.t().is_contiguous():  # which is read as it lies: a copy would cost more
        weight = weight.contiguous()
    flat = bias if bias is None else bias.contiguous()  # the call ignores a bias's strides
    found: Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, flat, "none", [], "")
    return found.data


def _suits(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    operands = (input, weight) if bias is None else (input, weight, bias)
    if not all(is_plain(t, FLOAT) for t in operands):
        return False
    return (
        _gains(input, weight)
        and (bias is None or bias.shape == weight.shape[:1])
        and not any(t.requires_grad for t in operands[1:])
        and not torch.is_autocast_enabled("cpu")
        and not is_transformed(input)
        and bool(torch.backends.mkldnn.enabled)
        and costs(input.device).onednn
    )


def _gains(input: Tensor, weight: Tensor) -> bool:
    """Whether it is a product, large enough, and of a number of tokens that may be kept."""
    if weight.ndim != 2 or not input.ndim or input.shape[-1] != weight.shape[1]:
        return False
    tokens = input.shape[:-1].numel()
    if tokens * weight.shape.numel() < LARGE:
        return False
    return tokens // (tokens & -tokens or 1) < 1 << DIGITS


def is_plain(tensor: Tensor, kinds: tuple[torch.dtype, ...]) -> bool:
    """Whether it is no subclass, and its numbers lie in a CPU's memory as one of `kinds`."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_nested:
        return False
    usual = tensor.layout is torch.strided
    return usual and tensor.dtype in kinds and tensor.device.type == "cpu"


def is_transformed(tensor: Tensor) -> bool:
    """Whether torch.func, gradients in batches or forward-mode derivatives are at work."""
    return (
        torch._C._functorch.maybe_current_level() is not None
        or torch._C._functorch.is_legacy_batchedtensor(tensor)
        or torch.autograd.forward_ad._current_level >= 0
    )
