"""TensorSketch of a sum of outer products, two ways to the same numbers.

The gradient of a matrix use is G_b = Σ_n left[b,n] ⊗ right[b,n], (R, C) per example. Its sketch is

    outer     G_b itself for a bounded chunk of examples, then one shifted add per column;
    fourier   Σ_n FFT(CS(left)) · FFT(CS(right)), transformed back once per step.

Both are linear in G, so uses, parameters and steps add up before anything is transformed back.
`outer` costs 2nRC + RC operations an example, `fourier` n(2.5·M log₂M·2 + C + R): wide layers on
short rows go to `fourier`, narrow ones on long rows to `outer`. Sources: Pagh, "Compressed matrix
multiplication" (2013), eq. 4; SDI, arXiv 2602.10097, section 4.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from sdi.sketch.fused import fused
from sdi.sketch.kernels import has_numba, shifted_add
from sdi.sketch.plan import MatrixPlan

Method = Literal["auto", "outer", "fourier"]

# Nanoseconds an operation on one core (AVX-512, 2.6 GHz); only their ratios matter.
_PRODUCT, _ADD, _SCATTER, _FFT = 0.010, 1.0, 3.5, 0.3


def choose(tokens: int, rows: int, columns: int, dim: int, device: str = "cpu") -> Method:
    """The cheaper evaluation for one use with `tokens` tokens an example."""
    add = _ADD if has_numba() and device == "cpu" else _SCATTER
    outer = rows * columns * (2 * tokens * _PRODUCT + add)
    fourier = tokens * dim * (2 * math.log2(dim) * _FFT + 4 * _FFT)
    return "outer" if outer <= fourier else "fourier"


def add_outer(plan: MatrixPlan, left: Tensor, right: Tensor, out: Tensor, limit: int) -> None:
    """Add the sketch of Σ_n left ⊗ right into `out` by way of the dense product.

    Args:
        plan: hashes of the (R, C) matrix.
        left: (B, n, R) float32.
        right: (B, n, C) float32.
        out: (B, M) float32, added to in place.
        limit: most bytes that the dense product of a chunk of examples may take.
    """
    if (kernels := fused(left.device)) is not None:
        kernels.outer(plan, left, right, out, limit=limit)
        return
    rows, columns = left.shape[2], right.shape[2]
    signed_left, signed_right = left * plan.row_sign, right * plan.column_sign
    chunk = max(1, limit // (4 * rows * columns))
    for begin in range(0, left.shape[0], chunk):
        part = slice(begin, begin + chunk)
        product = signed_right[part].transpose(1, 2) @ signed_left[part]
        add_dense_columns(plan, product, out[part])


def add_dense_columns(plan: MatrixPlan, product: Tensor, out: Tensor) -> None:
    """Add a signed dense gradient, (B, C, R) with rows contiguous, into `out` (B, M)."""
    for begin in range(0, product.shape[2], plan.dim):
        block = product[:, :, begin : begin + plan.dim].contiguous()
        starts = (plan.column_bucket + plan.row_bucket[begin]) % plan.dim
        shifted_add(block, starts, out)


def add_fourier(plan: MatrixPlan, left: Tensor, right: Tensor, out: Tensor, limit: int) -> None:
    """Add the spectrum of the sketch of Σ_n left ⊗ right into `out`.

    Args:
        plan, left, right: as for `add_outer`.
        out: (B, M // 2 + 1) complex64, added to in place.
        limit: most bytes that the spectra of a chunk of tokens may take.
    """
    if (kernels := fused(left.device)) is not None:
        kernels.fourier(plan, left, right, out, limit=limit)
        return
    batch, tokens, _ = left.shape
    chunk = max(1, limit // (16 * (plan.dim + 2) * tokens))
    for begin in range(0, batch, chunk):
        part = slice(begin, begin + chunk)
        spectrum = torch.fft.rfft(_fold_rows(plan, left[part]), n=plan.dim)
        spectrum *= torch.fft.rfft(_place_columns(plan, right[part]), n=plan.dim)
        out[part] += spectrum.sum(dim=1)


def _fold_rows(plan: MatrixPlan, left: Tensor) -> Tensor:
    """CountSketch of the left factor, (B, n, M): contiguous blocks, signed and rolled."""
    signed = left * plan.row_sign
    out = left.new_zeros(*left.shape[:2], plan.dim)
    for begin in range(0, left.shape[2], plan.dim):
        block = signed[..., begin : begin + plan.dim]
        start, size = int(plan.row_bucket[begin]), block.shape[2]
        head = min(size, plan.dim - start)
        out[..., start : start + head] += block[..., :head]
        out[..., : size - head] += block[..., head:]
    return out


def _place_columns(plan: MatrixPlan, right: Tensor) -> Tensor:
    """CountSketch of the right factor, (B, n, M): no two columns of a block share a bucket."""
    signed = right * plan.column_sign
    out = right.new_zeros(*right.shape[:2], plan.dim)
    for begin in range(0, right.shape[2], plan.dim):
        bucket = plan.column_bucket[begin : begin + plan.dim]
        out.index_add_(2, bucket, signed[..., begin : begin + plan.dim])
    return out
