"""A compiled kernel on torch's own threads.

On Linux torch's parallel loops run on the threads of an OpenMP runtime that torch brings along.
These spin for some milliseconds after each loop, so that a second pool of threads beside them would
wait for cores. So a kernel is handed to that runtime itself, by the entry that compilers call
(GOMP_parallel; LLVM's runtime has it as well), and runs on the threads that torch's loops run on.
Where torch has another runtime the calling thread does all of the work.
"""

from __future__ import annotations

import ctypes
import importlib
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch

_called: Any = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def run(kernel: Any, job: Sequence[int], *, alone: bool = False) -> None:
    """Run a kernel of `sdi.compiled` on a job, whose turns its threads share.

    Args:
        kernel: what `sdi.compiled.turns.kernel` made.
        job: int64; what its addresses lead to must live until the end.
        alone: whether there is so little to do that the calling thread is to do it.
    """
    numbers = np.array(job, dtype=np.int64)
    threads, parallel = torch.get_num_threads(), _parallel()
    if alone or parallel is None or threads == 1:
        _called(kernel.address)(numbers.ctypes.data)
    else:
        parallel(kernel.address, numbers.ctypes.data, threads, 0)


def has_team() -> bool:
    """Whether kernels run on as many threads as torch's own loops."""
    return torch.get_num_threads() == 1 or _parallel() is not None


@cache
def kernels(name: str) -> ModuleType | None:
    """A file of `sdi.compiled`, or None where numba is not installed.

    Where it is, and cannot compile here, a warning says so: torch serves, only slower.
    """
    try:
        import numba  # noqa: F401
    except ImportError:
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
def _parallel() -> Callable[[int, int, int, int], None] | None:
    """GOMP_parallel(function, data, threads, flags) of the runtime that torch is linked with."""
    try:
        found: Any = ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (AttributeError, OSError):
        return None
    found.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    found.restype = None
    return found  # type: ignore[no-any-return]
