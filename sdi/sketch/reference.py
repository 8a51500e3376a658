"""The slow definition: a sketch, entry by entry, in float64. Tests hold everything against it."""

from __future__ import annotations

import torch
from torch import Tensor

from sdi.sketch.plan import Hashing, MatrixPlan, Plan, StackPlan


def sketch_of_gradient(hashing: Hashing, name: str, gradient: Tensor) -> Tensor:
    """(M,) float64: the sketch of one dense gradient of the parameter `name`.

    E⟨sketch(u), sketch(v)⟩ = ⟨u, v⟩ over seeds, with variance at most (‖u‖²‖v‖² + ⟨u, v⟩²)/M.
    """
    return _sketch(hashing.plan(name, tuple(gradient.shape)), gradient)


def _sketch(plan: Plan, gradient: Tensor) -> Tensor:
    if isinstance(plan, StackPlan):
        parts = [_sketch(part, one) for part, one in zip(plan.parts, gradient, strict=True)]
        return torch.stack(parts).sum(dim=0)
    if isinstance(plan, MatrixPlan):
        bucket = plan.buckets().reshape(-1)
        sign = (plan.row_sign[:, None] * plan.column_sign[None, :]).reshape(-1)
    else:
        bucket, sign = plan.bucket, plan.sign
    out = torch.zeros(plan.dim, dtype=torch.float64)
    flat = gradient.detach().to("cpu", torch.float64).reshape(-1)
    return out.index_add_(0, bucket, flat * sign.to(torch.float64))
