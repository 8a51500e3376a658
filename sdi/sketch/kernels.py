"""The two ends of the dense product on a CPU: its factors in bfloat16, and the shifted adds.

Shifted adds put δᵀa into buckets, one contiguous signed add per column.

Column c of the product, (C, R) with rows contiguous, lands in the M buckets from h_in(c) + offset
on, wrapping once. numba, where it is installed and the data is on the CPU, does just that, and
reads products in bfloat16 as well as in float32; otherwise an `index_add_` over the bucket of every
entry gives the same sums.

Factors are rounded, and one of them transposed, in one pass (`sdi.compiled.factors`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from sdi import team


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
        team.run(add, (0, *sizes, *addresses), team.threads(product.numel()))
        return
    rows = torch.arange(product.shape[2], device=product.device)
    index = ((starts[:, None] + rows) % out.shape[1]).reshape(-1)
    signed = product.float() * column_sign[:, None] * row_sign
    out.index_add_(1, index, signed.reshape(product.shape[0], -1))


def halves(
    left: Tensor, right: Tensor, noise: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The factors of Σ_n left ⊗ right in bfloat16, as a product reads them fastest.

    Args:
        left: (B, n, R).
        right: (B, n, C).
        noise: (B,) float32, to which Σ_n ‖left_n‖²‖right_n‖² is added.

    Returns:
        left; right as (B, C, n); and Σ_n left, (B, R) float32, where that came by the way.
    """
    measured = noise is not None
    narrow, of_left, sums = _factor(left, measured=measured, turned=False)
    turned, of_right, _ = _factor(right, measured=measured, turned=True)
    if noise is not None:
        noise += (of_left * of_right).sum(dim=1)
    return narrow, turned, sums


def _factor(
    factor: Tensor, *, measured: bool, turned: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A factor (B, n, K) in bfloat16, transposed or not; the squared lengths (B, n) where these are
    asked for, else what is no matter; and perhaps the sums (B, K).
    """
    is_half = factor.dtype == torch.bfloat16 and not measured
    wide = factor if is_half else factor.float()
    kernels = team.kernels("factors") if factor.device.type == "cpu" else None
    if kernels is None or (is_half and not turned):
        half = wide.to(torch.bfloat16)
        squares = wide.square().sum(dim=2) if measured else half
        return half.mT if turned else half, squares, None
    wide = team.in_memory(wide)
    wide = wide if wide.stride(2) == 1 else wide.contiguous()
    examples, tokens, columns = wide.shape
    zeros = partial(wide.new_zeros, dtype=torch.float32)
    squares = zeros((examples, tokens))
    sums = None if turned else zeros((examples, -(-tokens // kernels.BLOCK), columns))
    shape = (columns, tokens) if turned else (tokens, columns)
    out = wide.new_empty(examples, *shape, dtype=torch.bfloat16)
    sizes = (examples, tokens, columns, *wide.stride()[:2], int(not is_half))
    addresses = (
        0 if tensor is None else tensor.data_ptr() for tensor in (wide, out, squares, sums)
    )
    kernel = kernels.transpose if turned else kernels.narrow
    team.run(kernel, (0, *sizes, *addresses), team.threads(wide.numel()))
    return out, squares, None if sums is None else team.summed(sums)


def has_numba() -> bool:
    """Whether the contiguous kernel is there."""
    return _compiled_add() is not None


def _compiled_add() -> Any:
    """The kernel, or None without numba."""
    found = team.kernels("adds")
    return found and found.add
