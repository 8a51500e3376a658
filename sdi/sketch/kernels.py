"""Shifted adds: putting δᵀa into buckets, one contiguous add per column.

Column c of the signed product, (C, R) with rows contiguous, lands in the M buckets from
h_in(c) + offset on, wrapping once. numba, where it is installed and the data is on the CPU, does
just that; otherwise an `index_add_` over the bucket of every entry gives the same sums.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor


def shifted_add(product: Tensor, starts: Tensor, out: Tensor) -> None:
    """Add `product` into `out`, in place.

    Args:
        product: (B, C, R) float32, contiguous, R ≤ M.
        starts: (C,) int64, the bucket of row 0 of each column.
        out: (B, M) float32, contiguous.
    """
    kernel = _numba_kernel() if product.device.type == "cpu" else None
    if kernel is not None:
        kernel(product.numpy(), starts.numpy(), out.numpy())
        return
    rows = torch.arange(product.shape[2], device=product.device)
    index = ((starts[:, None] + rows) % out.shape[1]).reshape(-1)
    out.index_add_(1, index, product.reshape(product.shape[0], -1))


def has_numba() -> bool:
    """Whether the contiguous kernel is there."""
    return _numba_kernel() is not None


@cache
def _numba_kernel() -> Callable[[Any, Any, Any], None] | None:
    try:
        import numba
    except ImportError:
        return None

    @numba.njit(cache=True, nogil=True, fastmath=True)
    def add(product: Any, starts: Any, out: Any) -> None:
        dim, rows = out.shape[1], product.shape[2]
        for b in range(product.shape[0]):
            target = out[b]
            for c in range(product.shape[1]):
                source, start = product[b, c], starts[c]
                head = min(rows, dim - start)
                for i in range(head):
                    target[start + i] += source[i]
                for i in range(head, rows):
                    target[i - head] += source[i]

    return add
