"""Float32 linear layers of a captured pass by oneDNN, where that is the faster library.

torch has two libraries for matrix products on a CPU and sends float32 to MKL, whatever the
processor; on AMD's, oneDNN takes a seventh less time. A pass without weight gradients is mostly
such products, forward and backward. A call on oneDNN has no derivative in torch, hence the function
here; its result differs by the rounding of float32 sums, as between two releases of one library.

What it gives up. Small products, where one more Python call costs more than is gained, weights that
require a gradient, autocast, transforms of torch.func and forward-mode derivatives: all are left to
torch, and so are second derivatives of what was computed here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sdi.sketch.costs import costs

LARGE = 1 << 25
"""Multiply-adds of a product from which the gain is over the cost of a call, 0.1 ms."""


def quicker(func: Any) -> Any:
    """What to run in place of a torch call: `linear` for `F.linear`, else the call itself."""
    return linear if func is F.linear else func


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `F.linear`, whose names the arguments have; input (..., C), weight (R, C), bias (R,)."""
    if _suits(input, weight, bias):
        found: Tensor = _Linear.apply(input, weight, bias)  # type: ignore[no-untyped-call]
        return found
    return F.linear(input, weight, bias)


class _Linear(torch.autograd.Function):
    """The product, and its derivative by the input."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _product(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor) -> tuple[Tensor | None, None, None]:
        (delta,), (weight,) = deltas, ctx.saved_tensors
        if not ctx.needs_input_grad[0]:
            return None, None, None
        if torch.is_grad_enabled() or _transformed(delta):
            return delta @ weight, None, None
        return _product(delta, weight.t().contiguous(), None), None, None


def _product(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(..., R) float32; `.data`, for the call returns a view, which a user must not see."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
    return found.data


def _suits(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    operands = (input, weight) if bias is None else (input, weight, bias)
    large = weight.ndim == 2 and input.numel() * weight.shape[0] >= LARGE
    return (
        large
        and all(t.dtype == torch.float32 and t.device.type == "cpu" for t in operands)
        and not any(t.requires_grad for t in operands[1:])
        and not torch.is_autocast_enabled("cpu")
        and not _transformed(input)
        and bool(torch.backends.mkldnn.enabled)
        and costs(input.device).onednn
    )


def _transformed(tensor: Tensor) -> bool:
    """Whether torch.func, gradients in batches or forward-mode derivatives are at work."""
    return (
        torch._C._functorch.maybe_current_level() is not None
        or torch._C._functorch.is_legacy_batchedtensor(tensor)
        or torch.autograd.forward_ad._current_level >= 0
    )
