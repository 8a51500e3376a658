"""TensorSketch of a sum of outer products, two ways to the same numbers.

The gradient of a matrix use is G_b = Σ_n left[b,n] ⊗ right[b,n], (R, C) per example. Its sketch is

    outer     G_b itself for a bounded chunk of examples, then one shifted add per column;
    fourier   Σ_n FFT(CS(left)) · FFT(CS(right)), transformed back once per step.

Both are linear in G, so uses, parameters and steps add up before anything is transformed back.
Which is cheaper is a matter of the machine (`sdi.sketch.costs`): wide layers on short rows go to
`fourier`, most others to `outer`. Sources: Pagh, "Compressed matrix multiplication" (2013), eq. 4;
SDI, arXiv 2602.10097, section 4.

The product of `outer` may round its factors to bfloat16 (and itself, with float32 sums, where it is
not made in tile registers, `sdi.sketch.tiles`). That moves a sketch by about
`ROUNDING`·√(Σ_n ‖left_n‖²‖right_n‖²): 0.2 to 0.3 % of the gradient's norm, where the sketch's own
error is 1/√M of it, 1.6 % at M = 4096. Where tokens cancel it is more; so that sum is kept, and
rows in which it is too much are sketched again without rounding (`Sketcher`). The sum takes the
errors of tokens as independent: where the very same few tokens are repeated hundreds of times and
cancel, it is too small.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from sdi import team
from sdi.sketch import tiles
from sdi.sketch.costs import costs, multiplies_bfloat16
from sdi.sketch.fused import fused
from sdi.sketch.kernels import halves, shifted_add
from sdi.sketch.plan import MatrixPlan

Method = Literal["auto", "outer", "fourier"]
Products = Literal["auto", "bfloat16", "float32"]

ROUNDED_FROM = 1 << 14
"""Entries of a matrix from which "auto" rounds: below, the product is not what costs."""
ROUNDED_UP_TO = 1 << 13
"""M up to which "auto" rounds: beyond, it would be over a quarter of the sketch's own error."""
PRODUCT = 1 << 24
"""Bytes of δᵀa at a time on a CPU, as far as every thread has an example's. From 32 MiB on, malloc
takes memory anew from the system, and a product twice as long for its pages to be cleared."""
ROUNDING = 2.3e-3
"""Relative error of a product of two rounded factors, root mean square: √2 times that of one."""


def choose(plan: MatrixPlan, left: Tensor, right: Tensor, *, half: bool = False) -> Method:
    """The cheaper evaluation of one use, whose factors are as for `add_outer`."""
    known, (_, tokens, rows), dim = costs(left.device), left.shape, plan.dim
    tiled = half and tiles.kernels_for(plan, left, right) is not None
    outer = known.outer(tokens, rows, right.shape[2], half=half, tiled=tiled)
    return "outer" if outer <= known.fourier(tokens, dim) else "fourier"


def rounds(products: Products, plan: MatrixPlan, left: Tensor, right: Tensor) -> bool:
    """Whether the factors of a product are to be rounded to bfloat16."""
    if products != "auto":
        return products == "bfloat16"
    if torch.float64 in (left.dtype, right.dtype):
        return False
    large = left.shape[-1] * right.shape[-1] >= ROUNDED_FROM
    return large and plan.dim <= ROUNDED_UP_TO and multiplies_bfloat16(left.device)


def add_outer(
    plan: MatrixPlan,
    left: Tensor,
    right: Tensor,
    out: Tensor,
    limit: int,
    *,
    half: bool = False,
    noise: Tensor | None = None,
) -> Tensor | None:
    """Add the sketch of Σ_n left ⊗ right into `out` by way of the dense product.

    Args:
        plan: hashes of the (R, C) matrix.
        left: (B, n, R).
        right: (B, n, C).
        out: (B, M) float32, added to in place.
        limit: most bytes that the dense product of a chunk of examples may take.
        half: whether to multiply in bfloat16, else in float32.
        noise: (B,) float32, to which Σ_n ‖left_n‖²‖right_n‖² is added where factors are rounded.

    Returns:
        Σ_n left, (B, R) float32, where that came by the way.
    """
    dtype = torch.bfloat16 if half else torch.float32
    exact = not half or left.dtype == right.dtype == dtype
    noise = None if exact else noise
    if (kernels := fused(left.device)) is not None:
        if noise is not None:
            size = torch.linalg.vector_norm(_lengths(left) * _lengths(right), dim=1)
            noise.addcmul_(size, size)
        kernels.outer(plan, left.to(dtype), right.to(dtype), out, limit=limit)
        return None
    in_tiles = tiles.kernels_for(plan, left, right) if half else None
    if in_tiles is None:
        each = dtype.itemsize * left.shape[2] * right.shape[2]
        cached = max(PRODUCT, each * team.size()) if left.device.type == "cpu" else limit
    else:  # nothing but the half factor that is widened beside one of float32
        mixed = noise is not None and left.dtype != right.dtype
        each = 4 * left.shape[1] * (left.shape[2] + right.shape[2]) if mixed else 1
        cached = limit
    most = max(1, min(limit, cached) // each)
    count = max(1, math.ceil(len(left) / most))
    parts = [tensor.tensor_split(count) for tensor in (left, right, out)]
    noises = [None] * count if noise is None else noise.tensor_split(count)
    add = partial(_add_product, half=half) if in_tiles is None else partial(tiles.add, in_tiles)
    summed = [add(plan, *part) for part in zip(*parts, noises, strict=True)]
    known = [sums for sums in summed if sums is not None]
    if len(known) < count:
        return None
    return known[0] if count == 1 else torch.cat(known)


def _add_product(
    plan: MatrixPlan,
    left: Tensor,
    right: Tensor,
    out: Tensor,
    noise: Tensor | None,
    *,
    half: bool,
) -> Tensor | None:
    """`add_outer` of a chunk of examples: first the product, then its adds."""
    if half:
        narrow, turned, sums = halves(left, right, noise)
    else:
        narrow, turned, sums = left.float(), right.float().mT, None
    add_dense_columns(plan, turned @ narrow, out)
    return sums


def _lengths(factor: Tensor) -> Tensor:
    """(B, n) float32: ‖factor_n‖. In its own type, which is quicker, but where that overflows."""
    wide = torch.float32 if factor.dtype == torch.float16 else None
    length: Tensor = torch.linalg.vector_norm(factor, dim=2, dtype=wide)
    return length.float()


def add_dense_columns(plan: MatrixPlan, product: Tensor, out: Tensor) -> None:
    """Add a dense gradient, (B, C, R) with rows contiguous, into `out` (B, M)."""
    for number, starts in enumerate(plan.starts):
        part = slice(number * plan.dim, (number + 1) * plan.dim)
        block = product[:, :, part].contiguous()
        shifted_add(block, starts, plan.row_sign[part], plan.column_sign, out)


def add_fourier(plan: MatrixPlan, left: Tensor, right: Tensor, out: Tensor, limit: int) -> None:
    """Add the spectrum of the sketch of Σ_n left ⊗ right into `out`.

    Args:
        plan, left, right: as for `add_outer`, float32.
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
