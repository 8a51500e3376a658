"""`fourier` on a GPU: placing into buckets, and the product of spectra summed over tokens.

How. Each bucket of a placed factor reads the one entry of each block of M that lands in it (hashes
are drawn without replacement), so placing writes every bucket once, needs no atomics and no zeroed
buffer, and never asks the GPU where a block starts. Both factors are transformed by cuFFT; one
kernel multiplies the spectra and sums over tokens in registers, instead of writing the product and
reading it again. The placed factors and their spectra do go through memory: 16·M bytes a token,
which is why wide layers on short rows alone come here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from sdi.sketch.plan import MatrixPlan
from sdi.sketch.triton_outer import on_device

# tokens and buckets or frequencies at a time, and tokens of one program
PLACED = {"TOKENS": 8, "BUCKETS": 128}
MULTIPLIED = {"TOKENS": 8, "FREQUENCIES": 128, "SPLIT": 128}


@dataclass(frozen=True)
class _Sources:
    """For each factor, (blocks, M) int32: the entry of a block that lands in a bucket, or −1."""

    rows: Tensor
    columns: Tensor


_found: WeakIdKeyDictionary = WeakIdKeyDictionary()  # plan → _Sources, while the plan lives


@triton.jit(do_not_specialize=["tokens"])  # type: ignore[untyped-decorator]
def _place(
    values: tl.tensor,
    source: tl.tensor,
    sign: tl.tensor,
    out: tl.tensor,
    tokens: tl.tensor,
    dim: tl.tensor,
    blocks: tl.tensor,
    values_token: tl.tensor,
    TOKENS: tl.constexpr,
    BUCKETS: tl.constexpr,
) -> None:
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
    k = tl.program_id(1) * BUCKETS + tl.arange(0, BUCKETS)
    total = tl.zeros((TOKENS, BUCKETS), tl.float32)
    for block in range(0, blocks):
        entry = tl.load(source + block * dim + k, k < dim, -1)
        signs = tl.load(sign + entry, entry >= 0, 0.0)[None, :]
        there = (token < tokens) & (entry >= 0)[None, :]
        value = tl.load(values + token * values_token + entry[None, :], there, 0.0)
        total += value.to(tl.float32) * signs
    target = out + token * dim + k[None, :]
    tl.store(target, total, (token < tokens) & (k < dim)[None, :])


@triton.jit(do_not_specialize=["tokens", "size"])  # type: ignore[untyped-decorator]
def _multiply(
    left: tl.tensor,
    right: tl.tensor,
    out: tl.tensor,
    tokens: tl.tensor,
    size: tl.tensor,
    out_example: tl.tensor,
    SPLIT: tl.constexpr,
    TOKENS: tl.constexpr,
    FREQUENCIES: tl.constexpr,
) -> None:
    example = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * FREQUENCIES + tl.arange(0, FREQUENCIES)
    first = tl.program_id(2) * SPLIT
    real = tl.zeros((TOKENS, FREQUENCIES), tl.float32)
    imaginary = tl.zeros((TOKENS, FREQUENCIES), tl.float32)
    for begin in range(first, tl.minimum(first + SPLIT, tokens), TOKENS):
        token = (begin + tl.arange(0, TOKENS))[:, None]
        there = (token < tokens) & (f < size)[None, :]
        at = ((example * tokens + token) * size + f[None, :]) * 2
        a, b = tl.load(left + at, there, 0.0), tl.load(left + at + 1, there, 0.0)
        c, d = tl.load(right + at, there, 0.0), tl.load(right + at + 1, there, 0.0)
        real += a * c - b * d
        imaginary += a * d + b * c
    target = out + (example * out_example + f) * 2
    tl.atomic_add(target, tl.sum(real, axis=0), f < size, sem="relaxed")
    tl.atomic_add(target + 1, tl.sum(imaginary, axis=0), f < size, sem="relaxed")


def fused_fourier(
    plan: MatrixPlan,
    left: Tensor,
    right: Tensor,
    out: Tensor,
    *,
    limit: int = 64 << 20,
) -> None:
    """Add the spectrum of the sketch of Σ_n left ⊗ right into `out`.

    Args:
        plan: hashes of the (R, C) matrix, on the device of the factors.
        left: (B, n, R) float32, bf16 or half.
        right: (B, n, C), likewise; the two types may differ.
        out: (B, M // 2 + 1) complex64, added to in place; any stride between rows, none within.
        limit: most bytes that the placed factors and their spectra may take.
    """
    assert out.dtype == torch.complex64 and out.stride(1) == 1, (out.dtype, out.stride())
    batch, tokens = left.shape[:2]
    most = max(1, limit // (16 * (plan.dim + 2)))
    length = min(tokens, most)
    rows = max(1, most // max(1, length))
    sources = _sources(plan)
    with on_device(left):
        for first in range(0, batch, rows):
            for begin in range(0, tokens, length):
                part = slice(first, first + rows), slice(begin, begin + length)
                spectra = (
                    _spectrum(left[part], sources.rows, plan.row_sign),
                    _spectrum(right[part], sources.columns, plan.column_sign),
                )
                _add_product(*spectra, out[part[0]])


def _spectrum(values: Tensor, source: Tensor, sign: Tensor) -> Tensor:
    """(B, n, M // 2 + 1) complex64: the transform of the CountSketch of (B, n, D)."""
    blocks, dim = source.shape
    flat = values.reshape(-1, values.shape[2])
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    placed = torch.empty(flat.shape[0], dim, device=values.device)
    grid = (triton.cdiv(len(flat), PLACED["TOKENS"]), triton.cdiv(dim, PLACED["BUCKETS"]))
    _place[grid](
        *(flat, source, sign, placed, len(flat), dim, blocks, flat.stride(0)),
        **PLACED,
        enable_fp_fusion=True,
    )
    spectrum: Tensor = torch.fft.rfft(placed)
    return spectrum.view(*values.shape[:2], -1)


def _add_product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Add Σ_n left · right, (B, n, F) each, into `out` (B, F)."""
    batch, tokens, size = left.shape
    parts = triton.cdiv(size, MULTIPLIED["FREQUENCIES"]), triton.cdiv(tokens, MULTIPLIED["SPLIT"])
    _multiply[(batch, *parts)](
        *(torch.view_as_real(x) for x in (left, right, out)),
        *(tokens, size, out.stride(0)),
        **MULTIPLIED,
        enable_fp_fusion=True,
    )


def _sources(plan: MatrixPlan) -> _Sources:
    """Which entries land in which bucket, found once a plan."""
    if plan not in _found:
        both = (_inverse(bucket, plan.dim) for bucket in (plan.row_bucket, plan.column_bucket))
        _found[plan] = _Sources(*both)
    found: _Sources = _found[plan]
    return found


def _inverse(bucket: Tensor, dim: int) -> Tensor:
    """(blocks, M) int32 of (D,) buckets that are distinct within each block of M."""
    entry = torch.arange(len(bucket), device=bucket.device)
    blocks = -(-len(bucket) // dim)
    source = torch.full((blocks * dim,), -1, dtype=torch.int32, device=bucket.device)
    source[entry // dim * dim + bucket] = entry.int()
    return source.view(blocks, dim)
