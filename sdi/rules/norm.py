"""LayerNorm and RMSNorm: gain and bias after a normalisation without parameters."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from sdi.rules.use import Use, Weight


def layer_norm_rule(use: Use) -> bool:
    """`F.layer_norm(input, shape, weight, bias, eps)`."""
    shape, eps = use.argument(1, "normalized_shape"), use.argument(4, "eps", 1e-5)
    inputs = use.argument(0, "input")
    return _norm(use, inputs, shape, F.layer_norm, {"eps": eps}, use.weight(3, "bias"))


def rms_norm_rule(use: Use) -> bool:
    """`F.rms_norm(input, shape, weight, eps)`."""
    shape, eps = use.argument(1, "normalized_shape"), use.argument(3, "eps")
    return _norm(use, use.argument(0, "input"), shape, F.rms_norm, {"eps": eps}, None)


def _norm(
    use: Use, inputs: Any, shape: Any, normalise: Any, options: dict[str, Any], bias: Weight | None
) -> bool:
    weight = use.weight(2, "weight")
    if not use.is_rowwise(inputs) or use.weight(0, "input") is not None:
        return False
    delta = use.wide_delta
    if weight is not None:
        hat = normalise(inputs.detach().to(delta.dtype), shape, **options)
        weight.emit(use.sink, use.step, use.split_delta(delta * hat, len(shape)).sum(dim=1))
    if bias is not None:
        bias.emit(use.sink, use.step, use.split_delta(delta, len(shape)).sum(dim=1))
    return True
