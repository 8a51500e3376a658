"""Kernels for processors whose registers hold tiles of matrices (AMX), and what these are given."""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sdi import team

_TILES = ("amx_tile", "amx_bf16", "amx_int8")


def abilities() -> dict[str, Any]:
    """What torch says of the processor; nothing where torch is too old to say."""
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return found


@cache
def kernels(name: str) -> ModuleType | None:
    """A file of `sdi.compiled` that needs tiles, where the processor has them, the system lets us
    use them and numba compiles for them: LLVM ends the process where it does not know them.
    """
    known = abilities()
    compiled_for = {each.replace("_", "-") for each in _TILES} <= team.features()
    if not all(known.get(each) for each in _TILES) or not compiled_for:
        return None
    return team.kernels(name) if getattr(torch.cpu, "_init_amx", bool)() else None


@cache
def configuration() -> npt.NDArray[np.uint8]:
    """Eight tiles of 16 rows of 64 bytes, as the processor is told."""
    told = np.zeros(64, dtype=np.uint8)
    told[0] = 1
    told[16:32:2], told[48:56] = 64, 16
    return told


def rooms(size: int) -> int:
    """The address of so many bytes, the same ones for each call of a thread."""
    return team.room("tiles", torch.uint8, size).data_ptr()


def up(number: int, multiple: int) -> int:
    """The next multiple."""
    return -(-number // multiple) * multiple
