"""LayerNorm and RMSNorm: gain and bias after a normalisation without parameters."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sdi import team
from sdi.rules.use import Use, Weight


def layer_norm_rule(use: Use) -> bool:
    """`F.layer_norm(input, shape, weight, bias, eps)`."""
    shape, eps = use.argument(1, "normalized_shape"), use.argument(4, "eps", 1e-5)
    inputs = use.argument(0, "input")
    return _norm(use, inputs, shape, F.layer_norm, eps, use.weight(3, "bias"))


def rms_norm_rule(use: Use) -> bool:
    """`F.rms_norm(input, shape, weight, eps)`."""
    shape, eps = use.argument(1, "normalized_shape"), use.argument(3, "eps")
    return _norm(use, use.argument(0, "input"), shape, F.rms_norm, eps, None)


def _norm(
    use: Use, inputs: Any, shape: Any, normalise: Any, eps: float | None, bias: Weight | None
) -> bool:
    weight = use.weight(2, "weight")
    if not use.is_rowwise(inputs) or use.weight(0, "input") is not None:
        return False
    found = _compiled(use, inputs, shape, eps, centred=normalise is F.layer_norm)
    delta = use.wide_delta if found is None else use.delta
    if weight is not None:
        gain = _gain(use, delta, inputs, shape, eps, normalise) if found is None else found[0]
        weight.emit(use.sink, use.step, gain)
    if bias is not None:
        bias.emit(use.sink, use.step, _summed(use, delta, shape) if found is None else found[1])
    return True


def _gain(
    use: Use, delta: Tensor, inputs: Tensor, shape: Any, eps: float | None, normalise: Any
) -> Tensor:
    """(B, *shape) by torch."""
    hat = normalise(inputs.detach().to(delta.dtype), shape, eps=eps)
    return _summed(use, delta * hat, shape)


def _summed(use: Use, each: Tensor, shape: Any) -> Tensor:
    """(B, *shape) of what every token has."""
    return use.split_delta(each, len(shape)).sum(dim=1)


def _compiled(
    use: Use, inputs: Tensor, shape: Any, eps: float | None, *, centred: bool
) -> tuple[Tensor, Tensor] | None:
    """Both gradients, (B, C) float32, by a compiled kernel; None where that cannot be had.

    It reads δ and the inputs once, where torch writes as many float32 numbers three times.
    """
    alike = use.delta.dtype == inputs.dtype and use.delta.dtype in (torch.float32, torch.bfloat16)
    if eps is None or len(shape) > 1 or not alike or use.delta.device.type != "cpu":
        return None
    kernels = team.kernels("norms")
    if kernels is None:
        return None
    laid = use.split_delta(), use.split_delta(inputs.detach())
    delta, inputs = (team.in_memory(tensor.contiguous()) for tensor in laid)
    assert delta.shape == inputs.shape, (delta.shape, inputs.shape)
    batch, tokens, width = delta.shape
    blocks = -(-tokens // kernels.BLOCK)
    gain, bias = delta.new_zeros(2, batch, blocks, width, dtype=torch.float32)
    sizes = (*delta.shape, int(delta.dtype == torch.bfloat16), int(centred), team.bits(eps))
    addresses = (tensor.data_ptr() for tensor in (delta, inputs, gain, bias))
    team.run(kernels.normed, (0, *sizes, *addresses), team.threads(delta.numel()))
    return team.summed(gain), team.summed(bias)
