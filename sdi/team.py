"""A compiled kernel on torch's own threads.

On Linux torch's parallel loops run on the threads of an OpenMP runtime that torch brings along.
These spin for some milliseconds after each loop, so that a second pool of threads beside them would
wait for cores. So a kernel is handed to that runtime itself, by the entry that compilers call
(GOMP_parallel; LLVM's runtime has it as well), and runs on the threads that torch's loops run on.
Where torch has another runtime the calling thread does all of the work.
"""

from __future__ import annotations

import ctypes
import importlib.util
import struct
import threading
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

FEW = 1 << 16
"""Numbers that one thread takes sooner than others are called."""

_called: Any = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def run(kernel: Any, job: Sequence[int], threads: int) -> None:
    """Run a kernel of `sdi.compiled` on a job, whose turns its threads share.

    Args:
        kernel: what `sdi.compiled.turns.kernel` made.
        job: int64; what its addresses lead to must live until the end.
        threads: how many at most; no more than `size` says.
    """
    numbers = np.array(job, dtype=np.int64)
    parallel = _parallel()
    if threads == 1 or parallel is None:
        _called(kernel.address)(numbers.ctypes.data)
    else:
        parallel(kernel.address, numbers.ctypes.data, threads, 0)


def size() -> int:
    """How many threads a kernel may run on: as many as torch's own loops, or one."""
    return torch.get_num_threads() if _parallel() is not None else 1


def threads(numbers: int) -> int:
    """How many threads for a kernel that reads so many numbers once."""
    return 1 if numbers < FEW else size()


def bits(number: float) -> int:
    """The float64 as a number of a job."""
    found: int = struct.unpack("q", struct.pack("d", number))[0]
    return found


_kept = threading.local()


def room(place: str, dtype: torch.dtype, count: int) -> Tensor:
    """So many numbers, not filled: always the same memory of the thread for a place and type.

    Memory that malloc finds anew each time costs a product a quarter more: no cache holds it.
    """
    rooms: dict[tuple[str, torch.dtype], Tensor] = _kept.__dict__.setdefault("rooms", {})
    known = rooms.get((place, dtype))
    if known is None or len(known) < count:
        with torch.inference_mode(False):  # it is used again, perhaps outside
            known = rooms[place, dtype] = torch.empty(count, dtype=dtype, device="cpu")
    return known[:count]


def in_memory(tensor: Tensor) -> Tensor:
    """With the numbers that it stands for where its address says; torch negates some when read."""
    return tensor.clone() if tensor.is_neg() or tensor._is_zerotensor() else tensor


def summed(blocks: Tensor) -> Tensor:
    """Σ over axis 1, what each block of tokens came to; most rows are one block."""
    return blocks[:, 0] if blocks.shape[1] == 1 else blocks.sum(dim=1)


@cache
def kernels(name: str) -> ModuleType | None:
    """A file of `sdi.compiled`, or None where numba is not installed.

    Where it is, and cannot compile here, a warning says so: torch serves, only slower.
    """
    if importlib.util.find_spec("numba") is None:
        return None
    try:
        return importlib.import_module(f"sdi.compiled.{name}")
    except Exception as error:  # whatever keeps a compiler from working
        warnings.warn(
            f"numba does not compile sdi.compiled.{name} ({type(error).__name__}: {error}); the "
            f"slower torch path is used",
            stacklevel=2,
        )
        return None


@cache
def features() -> frozenset[str]:
    """What numba compiles for, by LLVM's names: this processor, unless a user told it otherwise."""
    try:
        from numba.core import codegen, config

        told: Any = getattr(config, "CPU_FEATURES", None)
        if told is None:
            told = codegen.get_host_cpu_features()  # type: ignore[no-untyped-call]
    except Exception:  # not installed, or broken: `kernels` says so where it is asked
        return frozenset()
    return frozenset(each[1:] for each in told.split(",") if each.startswith("+"))


@cache
def _parallel() -> Callable[[int, int, int, int], None] | None:
    """GOMP_parallel(function, data, threads, flags) of the runtime that torch is linked with."""
    try:
        found: Any = ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (AttributeError, OSError):
        return None
    found.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    found.restype = None
    return found  # type: ignore[no-any-return]
