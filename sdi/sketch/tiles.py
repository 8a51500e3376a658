"""Whether and how a CPU makes a sketch of δᵀa in its tile registers (`sdi.compiled.tiles`)."""

from __future__ import annotations

import threading
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sdi import team
from sdi.sketch.plan import MatrixPlan

STRETCH = 256
"""Tokens that are packed and summed at once; float32 sums over more would lose digits."""
BLOCK = 1 << 19
"""Bytes of packed rows at once, for a core's own cache."""
_KINDS = (torch.float32, torch.bfloat16)


@cache
def compiled() -> ModuleType | None:
    """The kernel, where the processor has tiles of bfloat16 and the system lets us use them."""
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    has_tiles = known.get("amx_tile") and known.get("amx_bf16")
    if not has_tiles or not getattr(torch.cpu, "_init_amx", bool)():
        return None
    return team.kernels("tiles")


def fits(plan: MatrixPlan, left: Tensor, right: Tensor) -> bool:
    """Whether the kernel knows such factors, (B, n, R) and (B, n, C)."""
    if left.device.type != "cpu" or left.dtype not in _KINDS or right.dtype not in _KINDS:
        return False
    sides = left.shape[2], right.shape[2]
    return min(left.shape) > 0 and not any(side % 16 for side in sides) and sides[0] <= plan.dim


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
    threads = team.threads(batch * rows * columns)
    ranges = min(_ranges(batch, threads), _up(columns, kernels.SPAN) // kernels.SPAN)
    stretch = min(STRETCH, _up(tokens, kernels.SPAN))
    block = _up(min(rows, BLOCK // (2 * stretch)), kernels.SPAN)
    assert out.is_contiguous() and out.dtype == torch.float32, (out.stride(), out.dtype)
    assert out.shape == (batch, plan.dim) and right.shape[:2] == (batch, tokens), right.shape
    parts = out if ranges == 1 else out.new_zeros(batch, ranges, plan.dim)
    noises = None if noise is None else noise.new_zeros(batch, ranges)
    summed = left.dtype == torch.float32
    sums = out.new_zeros(batch, ranges, -(-tokens // stretch), rows if summed else 0)
    places, size = _places(
        (2 * stretch + 4) * columns, (2 * stretch + 4) * block, 64 * stretch, 4 * stretch,
        8 * kernels.SPAN**2, 128 * columns, 4 * block,
    )  # fmt: skip
    rooms = _room(threads * size)
    job = (
        0, 0, batch, ranges, tokens, rows, columns, plan.dim, stretch, block,
        *_factor(left), *_factor(right),
        plan.starts[0].data_ptr(), plan.row_sign.data_ptr(), plan.column_sign.data_ptr(),
        parts.data_ptr(), 0 if noises is None else noises.data_ptr(), sums.data_ptr(),
        _configuration().ctypes.data, rooms.data_ptr(), size, *places,
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


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _factor(tensor: Tensor) -> tuple[int, ...]:
    whole = int(tensor.dtype == torch.float32)
    return (tensor.data_ptr(), *tensor.stride()[:2], whole)


def _places(*sizes: int) -> tuple[list[int], int]:
    """Where in a room what follows the first begins, and the bytes of all."""
    ends = np.cumsum([_up(size, 64) for size in sizes]).tolist()
    return ends[:-1], ends[-1]


_kept = threading.local()


def _room(size: int) -> Tensor:
    """Bytes, the same ones for each call of a thread: caches hold them."""
    known = getattr(_kept, "room", None)
    if known is None or len(known) < size:
        known = _kept.room = torch.empty(size, dtype=torch.uint8)
    return known


@cache
def _configuration() -> npt.NDArray[np.uint8]:
    """Eight tiles of 16 rows of 64 bytes, as the processor is told."""
    told = np.zeros(64, dtype=np.uint8)
    told[0] = 1
    told[16:32:2], told[48:56] = 64, 16
    return told
