"""How a CPU makes a sketch of δᵀa in its tile registers (`sdi.compiled.tiles`)."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from sdi import amx, team
from sdi.amx import up
from sdi.sketch.plan import MatrixPlan

STRETCH = 256
"""Tokens that are packed and summed at once; float32 sums over more would lose digits."""
BLOCK = 1 << 19
"""Bytes of packed rows at once, for a core's own cache."""
_KINDS = (torch.float32, torch.bfloat16)


def kernels_for(plan: MatrixPlan, left: Tensor, right: Tensor) -> ModuleType | None:
    """The kernel, where there is one that knows such factors, (B, n, R) and (B, n, C)."""
    if left.device.type != "cpu" or left.dtype not in _KINDS or right.dtype not in _KINDS:
        return None
    rows, columns = left.shape[2], right.shape[2]
    if min(*left.shape, *right.shape) == 0 or rows % 16 or columns % 16 or rows > plan.dim:
        return None
    return amx.kernels("tiles")


def add(
    kernels: ModuleType,
    plan: MatrixPlan,
    left: Tensor,
    right: Tensor,
    out: Tensor,
    noise: Tensor | None,
) -> Tensor | None:
    """See `sdi.sketch.tensorsketch.add_outer`; factors are rounded to bfloat16, not products."""
    if noise is not None:
        left, right = left.float(), right.float()
    left, right = (team.in_memory(each) for each in (left, right))
    left, right = (each if each.stride(2) == 1 else each.contiguous() for each in (left, right))
    (batch, tokens, rows), columns = left.shape, right.shape[2]
    assert out.is_contiguous() and out.dtype == torch.float32, (out.stride(), out.dtype)
    assert out.shape == (batch, plan.dim) and right.shape[:2] == (batch, tokens), right.shape
    threads = team.threads(batch * rows * columns)
    spans = up(columns, kernels.SPAN) // kernels.SPAN
    ranges = min(_ranges(batch, threads), spans)
    threads, widest = min(threads, batch * ranges), -(-spans // ranges) * kernels.SPAN
    stretch = min(STRETCH, up(tokens, kernels.SPAN))
    block = up(min(rows, BLOCK // (2 * stretch)), kernels.SPAN)
    parts = out if ranges == 1 else out.new_zeros(batch, ranges, plan.dim)
    noises = None if noise is None else noise.new_zeros(batch, ranges)
    summed = left.dtype == torch.float32
    sums = out.new_zeros(batch, ranges, -(-tokens // stretch), rows if summed else 0)
    places, size = _places(
        (2 * stretch + 4) * widest, (2 * stretch + 4) * block, 64 * stretch, 4 * stretch,
        8 * kernels.SPAN**2, 128 * widest, 4 * block,
    )  # fmt: skip
    job = (
        0, 0, batch, ranges, tokens, rows, columns, plan.dim, stretch, block,
        *_factor(left), *_factor(right),
        plan.starts[0].data_ptr(), plan.row_sign.data_ptr(), plan.column_sign.data_ptr(),
        parts.data_ptr(), 0 if noises is None else noises.data_ptr(), sums.data_ptr(),
        amx.configuration().ctypes.data, amx.rooms(threads * size), size, *places,
    )  # fmt: skip
    team.run(kernels.sketched, job, threads)
    if ranges > 1:
        out += parts.sum(dim=1)
    if noise is not None and noises is not None:
        noise += noises.sum(dim=1)
    return team.summed(sums[:, 0]) if summed else None


def _ranges(batch: int, threads: int) -> int:
    """Of how many an example's columns are, for threads to have as much to do as each other."""
    ranges = 1
    while batch * ranges % threads and batch * ranges < 4 * threads:
        ranges += 1
    return ranges


def _factor(tensor: Tensor) -> tuple[int, ...]:
    whole = int(tensor.dtype == torch.float32)
    return (tensor.data_ptr(), *tensor.stride()[:2], whole)


def _places(*sizes: int) -> tuple[list[int], int]:
    """Where in a room what follows the first begins, and the bytes of all."""
    ends = np.cumsum([up(size, 64) for size in sizes]).tolist()
    return ends[:-1], ends[-1]
