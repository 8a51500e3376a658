"""Shifted adds: putting δᵀa into buckets, one contiguous signed add per column.

Column c of the product, (C, R) with rows contiguous, lands in the M buckets from h_in(c) + offset
on, wrapping once. numba, where it is installed and the data is on the CPU, does just that, and
reads products in bfloat16 as well as in float32; otherwise an `index_add_` over the bucket of every
entry gives the same sums.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import cast

import torch
from torch import Tensor


def shifted_add(
    product: Tensor, starts: Tensor, row_sign: Tensor, column_sign: Tensor, out: Tensor
) -> None:
    """Add `product`, each entry times the signs of its row and column, into `out`, in place.

    Args:
        product: (B, C, R) float32 or bfloat16, contiguous, R ≤ M.
        starts: (C,) int64, the bucket of row 0 of each column.
        row_sign: (R,) float32, contiguous.
        column_sign: (C,) float32, contiguous.
        out: (B, M) float32, contiguous.
    """
    kernel = _numba_kernel() if product.device.type == "cpu" else None
    if kernel is not None:
        half = product.dtype == torch.bfloat16
        values = product.view(torch.uint16) if half else product
        kernel(values.numpy(), starts.numpy(), row_sign.numpy(), column_sign.numpy(), out.numpy())
        return
    rows = torch.arange(product.shape[2], device=product.device)
    index = ((starts[:, None] + rows) % out.shape[1]).reshape(-1)
    signed = product.float() * column_sign[:, None] * row_sign
    out.index_add_(1, index, signed.reshape(product.shape[0], -1))


def has_numba() -> bool:
    """Whether the contiguous kernel is there."""
    return _numba_kernel() is not None


@cache
def _numba_kernel() -> Callable[..., None] | None:
    try:
        from sdi.sketch.compiled import add
    except ImportError:
        return None
    return cast(Callable[..., None], add)
