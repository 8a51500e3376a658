"""CountSketch of dense per-example gradients and of embedding rows."""

from __future__ import annotations

from torch import Tensor

from sdi.sketch.plan import MatrixPlan, Plan, StackPlan
from sdi.sketch.tensorsketch import add_dense_columns


def add_dense(plan: Plan, gradient: Tensor, out: Tensor) -> None:
    """Add the sketch of dense gradients into `out`.

    Args:
        plan: hashes of the parameter.
        gradient: (B, *shape) float32, one dense gradient an example.
        out: (B, M) float32, added to in place.
    """
    if isinstance(plan, MatrixPlan):
        add_dense_columns(plan, gradient.transpose(1, 2), out)
    elif isinstance(plan, StackPlan):
        for number, part in enumerate(plan.parts):
            add_dense(part, gradient[:, number], out)
    else:
        out.index_add_(1, plan.bucket, gradient.reshape(gradient.shape[0], -1) * plan.sign)


def add_rows(plan: MatrixPlan, index: Tensor, right: Tensor, out: Tensor) -> None:
    """Add the sketch of Σ_n e_{index[b,n]} ⊗ right[b,n] into `out`: an embedding's gradient.

    Args:
        plan: hashes of the (V, C) matrix.
        index: (B, n) int64 row numbers.
        right: (B, n, C) float32.
        out: (B, M) float32, added to in place.
    """
    bucket = (plan.row_bucket[index][..., None] + plan.column_bucket) % plan.dim
    value = right * plan.row_sign[index][..., None] * plan.column_sign
    batch = right.shape[0]
    out.scatter_add_(1, bucket.reshape(batch, -1), value.reshape(batch, -1))
