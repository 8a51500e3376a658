"""The fused kernel of `outer` on a GPU: δᵀa into buckets, never written to memory.

How. A program multiplies a tile of one example's δᵀa on the tensor cores, float32 sums in
registers, then signs it. Row r of a column goes to bucket h_in(column) + h_out(0) + r, so a column
is a run of consecutive buckets. The columns are put in the order of h_in beforehand (a copy of the
right factor, hardly larger than itself): the runs of `group` neighbouring columns then start close
together and overlap. Each run is turned within the tile by its distance from the first of its group
(`tl.gather`, in shared memory), the group is added up in registers, and one run of at most twice
the tile's rows goes out by coalesced atomic adds: `group` columns cost about as many atomics as one
or two. Where the next column starts too far off, its group is filled up with columns of sign 0.

Why. At 128 tokens an example the product is so cheap that one atomic an entry would cost more than
the product does. The grid is over examples and tiles, so one launch serves a whole batch.

What it gives up. Atomic adds come in no fixed order: two runs may differ by the rounding of
float32 sums (about 1e-7 of the sum of magnitudes, far below the promised 1e-5). A variant with a
buffer for each program and an ordered sum would be exact in order, at the price of those buffers.
Uses of several steps are not joined in one launch: their factors would have to be kept until then.
"""

from __future__ import annotations

from bisect import bisect_right
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from sdi.sketch.plan import MatrixPlan

_FAR = tl.constexpr(2**30)  # above any bucket: the first of a group is its least


@dataclass(frozen=True)
class Tile:
    """How a launch is cut.

    Attributes:
        rows, columns: of δᵀa that one program makes, powers of two of at least 16.
        tokens: multiplied at a time, a power of two of at least 16.
        warps, stages: of a program.
        group: most columns that are added up before they go out, a power of two; 1 is none.
    """

    rows: int = 128
    columns: int = 64
    tokens: int = 32
    warps: int = 4
    stages: int = 3
    group: int = 64


HALF = Tile()
SINGLE = Tile(rows=64, columns=64, tokens=16)
HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class _Columns:
    """The columns as a launch takes them, C' ≥ C of them.

    Attributes:
        group: how many neighbours are added up.
        order: (C',) int64, which column stands there; None is their own order.
        bucket, sign: (C',) int32 and float32; sign 0 where a group is filled up.
    """

    group: int
    order: Tensor | None
    bucket: Tensor
    sign: Tensor


_packed: WeakIdKeyDictionary = WeakIdKeyDictionary()  # plan → {tile: _Columns}, while it lives


@triton.jit  # type: ignore[untyped-decorator]
def _product(
    left: tl.tensor,
    right: tl.tensor,
    r: tl.tensor,
    c: tl.tensor,
    tokens: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    left_token: tl.tensor,
    left_row: tl.tensor,
    right_token: tl.tensor,
    right_column: tl.tensor,
    TOKENS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
) -> tl.tensor:
    """Rows r and columns c of one example's δᵀa, (COLUMNS, ROWS) float32."""
    total = tl.zeros((c.shape[0], r.shape[0]), tl.float32)
    # Places in 64 bits: a batch of long examples has more entries than 32 count.
    row, column = r.to(tl.int64)[None, :], c.to(tl.int64)[None, :]
    for begin in range(0, tokens, TOKENS):
        n = (begin + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
        there = n < tokens
        delta = tl.load(left + n * left_token + row * left_row, there & (row < rows), 0.0)
        a = tl.load(
            right + n * right_token + column * right_column, there & (column < columns), 0.0
        )
        if WIDEN:  # the interpreter multiplies the bits of bf16 as integers
            delta, a = delta.to(tl.float32), a.to(tl.float32)
        total = tl.dot(tl.trans(a), delta, total, input_precision=PRECISION)
    return total


@triton.jit  # type: ignore[untyped-decorator]
def _add_groups(
    out: tl.tensor,
    total: tl.tensor,
    bucket: tl.tensor,
    first: tl.tensor,
    height: tl.tensor,
    dim: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    """Add a tile's columns up by groups, then to `out`; `height` of its rows count."""
    k = tl.arange(0, ROWS)[None, :]
    grouped = tl.reshape(bucket, (COLUMNS // GROUP, GROUP))
    base = tl.min(grouped, axis=1)
    away = tl.where(grouped == _FAR, 0, grouped - base[:, None])
    span = tl.max(away, axis=1)[:, None]  # at most ROWS, see `_pack`
    shift = tl.reshape(away, (COLUMNS,))[:, None]
    # Gathered along one long axis: along the tile's own, triton 3.9 shuffles between lanes,
    # six times an entry.
    source = tl.arange(0, COLUMNS)[:, None] * ROWS + ((k - shift) & (ROWS - 1))
    size: tl.constexpr = COLUMNS * ROWS
    turned = tl.gather(tl.reshape(total, (size,)), tl.reshape(source, (size,)), axis=0)
    turned = tl.reshape(turned, (COLUMNS, ROWS))
    low = tl.where(k >= shift, turned, 0.0)
    high = tl.where(k < shift, turned, 0.0)
    low = tl.sum(tl.reshape(low, (COLUMNS // GROUP, GROUP, ROWS)), axis=1)
    high = tl.sum(tl.reshape(high, (COLUMNS // GROUP, GROUP, ROWS)), axis=1)
    there = (base != _FAR)[:, None]
    place = tl.where(there, base[:, None], 0) + first + k
    tl.atomic_add(out + place % dim, low, there & (k < span + height), sem="relaxed")
    tl.atomic_add(out + (place + ROWS) % dim, high, there & (k < span), sem="relaxed")


# Lengths vary from batch to batch: they must not make a program each.
@triton.jit(do_not_specialize=["tokens", "dim"])  # type: ignore[untyped-decorator]
def _outer(
    left: tl.tensor,
    right: tl.tensor,
    row_bucket: tl.tensor,
    row_sign: tl.tensor,
    column_bucket: tl.tensor,
    column_sign: tl.tensor,
    out: tl.tensor,
    tokens: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    dim: tl.tensor,
    left_example: tl.tensor,
    left_token: tl.tensor,
    left_row: tl.tensor,
    right_example: tl.tensor,
    right_token: tl.tensor,
    right_column: tl.tensor,
    out_example: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    column_tiles = tl.cdiv(columns, COLUMNS)
    tiles = tl.cdiv(rows, ROWS) * column_tiles
    example = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    before = (tile // column_tiles) * ROWS
    r = before + tl.arange(0, ROWS)
    c = (tile % column_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    left += example * left_example
    right += example * right_example
    out += example * out_example
    total = _product(
        *(left, right, r, c, tokens, rows, columns),
        *(left_token, left_row, right_token, right_column),
        *(TOKENS, PRECISION, WIDEN),
    )
    total *= tl.load(row_sign + r, r < rows, 0.0)[None, :]
    total *= tl.load(column_sign + c, c < columns, 0.0)[:, None]
    first = tl.load(row_bucket).to(tl.int32) + before
    bucket = tl.load(column_bucket + c, c < columns, _FAR)
    if GROUP == 1:
        there = (c < columns)[:, None] & (r < rows)[None, :]
        place = (bucket[:, None] + (first + tl.arange(0, ROWS))[None, :]) % dim
        tl.atomic_add(out + place, total, there, sem="relaxed")
    else:
        _add_groups(out, total, bucket, first, rows - before, dim, ROWS, COLUMNS, GROUP)


def fused_outer(
    plan: MatrixPlan,
    left: Tensor,
    right: Tensor,
    out: Tensor,
    *,
    limit: int = 64 << 20,
    tile: Tile | None = None,
) -> None:
    """Add the sketch of Σ_n left ⊗ right into `out`.

    Args:
        plan: hashes of the (R, C) matrix, on the device of the factors.
        left: (B, n, R) float32, bf16 or half; any strides.
        right: (B, n, C), likewise; where the two types differ, both become float32.
        out: (B, M) float32, added to in place; any stride between rows, none within.
        limit: most bytes that the reordered copy of a chunk of `right` may take.
        tile: how to cut; by the type of the factors when None.

    float32 factors are multiplied as `torch.get_float32_matmul_precision` says ("highest", the
    default, is true float32); products of halves are exact in float32. Sums are float32.
    """
    assert out.dtype == torch.float32 and out.stride(1) == 1, (out.dtype, out.stride())
    if left.dtype != right.dtype or left.dtype not in (*HALVES, torch.float32):
        left, right = left.float(), right.float()
    if 0 in left.shape or right.shape[2] == 0:
        return
    tile = tile or (SINGLE if left.dtype == torch.float32 else HALF)
    columns = _columns(plan, tile)
    chunk = max(1, limit // (right.element_size() * right.shape[1] * right.shape[2]))
    with on_device(left):
        for begin in range(0, left.shape[0], chunk):
            part = slice(begin, begin + chunk)
            ordered = right[part]
            if columns.order is not None:
                ordered = ordered.index_select(2, columns.order)
            _launch(plan, columns, left[part], ordered, out[part], tile)


def _launch(
    plan: MatrixPlan,
    columns: _Columns,
    left: Tensor,
    right: Tensor,
    out: Tensor,
    tile: Tile,
) -> None:
    """One launch for each block of M rows: within one, rows have consecutive buckets."""
    exact = torch.get_float32_matmul_precision() == "highest"
    for begin in range(0, left.shape[2], plan.dim):
        block = left[..., begin : begin + plan.dim]
        tiles = triton.cdiv(block.shape[2], tile.rows) * triton.cdiv(right.shape[2], tile.columns)
        _outer[(block.shape[0] * tiles,)](
            block,
            right,
            plan.row_bucket[begin:],
            plan.row_sign[begin:],
            columns.bucket,
            columns.sign,
            out,
            *(block.shape[1], block.shape[2], right.shape[2], plan.dim),
            *(*block.stride(), *right.stride(), out.stride(0)),
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            TOKENS=tile.tokens,
            GROUP=columns.group,
            PRECISION="ieee" if exact else "tf32",
            WIDEN=bool(triton.knobs.runtime.interpret),
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=True,  # unset, triton 3.9 warns of a changing default
        )


def _columns(plan: MatrixPlan, tile: Tile) -> _Columns:
    """The plan's columns for a tile, found once: the largest groups that add a tenth at most."""
    if plan not in _packed:
        _packed[plan] = {}
    known: dict[Tile, _Columns] = _packed[plan]
    if tile not in known:
        known[tile] = _found(plan, tile)
    return known[tile]


def _found(plan: MatrixPlan, tile: Tile) -> _Columns:
    bucket, order = plan.column_bucket.sort(stable=True)
    ascending, group = bucket.tolist(), min(tile.group, tile.columns)
    while group > 1:
        places, signs = _pack(ascending, group, tile.rows)
        if len(places) <= 1.1 * len(ascending):
            at = torch.tensor(places, device=order.device)
            sign = plan.column_sign[order[at]] * torch.tensor(signs, device=order.device)
            return _Columns(group, order[at], bucket[at].int(), sign)
        group //= 2
    return _Columns(1, None, plan.column_bucket.int(), plan.column_sign)


def _pack(bucket: list[int], group: int, reach: int) -> tuple[list[int], list[float]]:
    """Ascending buckets in groups whose last is within `reach` of its first.

    Returns the place of each in `bucket`, and 1.0, or 0.0 where a group is filled up with its first
    (the last group is not).
    """
    places: list[int] = []
    signs: list[float] = []
    begin = 0
    while begin < len(bucket):
        end = min(begin + group, bisect_right(bucket, bucket[begin] + reach, begin))
        fill = 0 if end == len(bucket) else group - (end - begin)
        places += [*range(begin, end), *[begin] * fill]
        signs += [1.0] * (end - begin) + [0.0] * fill
        begin = end
    return places, signs


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
