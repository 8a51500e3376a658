"""Shifted adds: putting δᵀa into buckets, one contiguous signed add per column.

Column c of the product, (C, R) with rows contiguous, lands in the M buckets from h_in(c) + offset
on, wrapping once. numba, where it is installed and the data is on the CPU, does just that, and
reads products in bfloat16 as well as in float32; otherwise an `index_add_` over the bucket of every
entry gives the same sums.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sdi import team

FEW = 1 << 16
"""Entries of a product that one thread adds sooner than others are called."""


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
    add = _compiled_add() if product.device.type == "cpu" else None
    if add is not None:
        product = team.in_memory(product)
        operands = (product, starts, row_sign, column_sign, out)
        examples, columns, count = product.shape
        half = product.dtype == torch.bfloat16
        kinds = product.dtype, torch.int64, *[torch.float32] * 3
        shapes = product.shape, (columns,), (count,), (columns,), (examples, out.shape[1])
        assert half or product.dtype == torch.float32, product.dtype
        assert count <= out.shape[1], (count, out.shape)
        for tensor, kind, shape in zip(operands, kinds, shapes, strict=True):
            assert tensor.is_contiguous() and tensor.dtype == kind, (tensor.stride(), tensor.dtype)
            assert tensor.shape == shape, (tensor.shape, shape)
        sizes = (examples, columns, count, out.shape[1], int(half))
        addresses = (tensor.data_ptr() for tensor in operands)
        team.run(add, (0, *sizes, *addresses), 1 if product.numel() < FEW else team.size())
        return
    rows = torch.arange(product.shape[2], device=product.device)
    index = ((starts[:, None] + rows) % out.shape[1]).reshape(-1)
    signed = product.float() * column_sign[:, None] * row_sign
    out.index_add_(1, index, signed.reshape(product.shape[0], -1))


def has_numba() -> bool:
    """Whether the contiguous kernel is there."""
    return _compiled_add() is not None


def _compiled_add() -> Any:
    """The kernel, or None without numba."""
    found = team.kernels("adds")
    return found and found.add
