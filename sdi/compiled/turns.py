"""Jobs of kernels: numbers that say where the operands are, and turns that threads share.

A job is int64 in memory. Its first number counts turns: a thread takes the next one until there is
none left, so that whoever is quicker does more. What the other numbers mean is up to the kernel.
Kernels take no memory of their own: where there is none, compiled code could not tell its caller.

numba keeps what it compiled in a file, and looks only at the kernel's own source to tell whether it
is still true. Kernels are built from several files, so their names in the cache have a digest of
all of these.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

TURNS = 0
"""The place of the turns in a job."""

LOOSE = {"reassoc", "contract", "nsz"}
"""What a compiler may do to sums, so that they become vectors; numbers that are none stay none."""

carray: Any = numba.carray  # type: ignore[attr-defined]
_SIGNATURE = types.void(types.CPointer(types.int64))  # type: ignore[no-untyped-call]


_SOURCES = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
_DIGEST = hashlib.sha256(_SOURCES).hexdigest()[:12]


def kernel(function: Callable[[Any], None]) -> Any:
    """Compile a function of the address of a job; `.address` is where the machine finds it."""
    function.__qualname__ += _DIGEST
    try:
        return numba.cfunc(_SIGNATURE, cache=True, error_model="numpy")(function)
    except Exception:  # no folder to keep it in, or what is kept cannot be read: compiled anew
        return numba.cfunc(_SIGNATURE, error_model="numpy")(function)


def _turn(_context: Any, address: Any, place: Any) -> Any:
    """The next turn that is counted at a place of a job, from 0 on; no other thread is given it."""

    def generate(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        count = builder.gep(values[0], [values[1]])
        return builder.atomic_rmw("add", count, ir.IntType(64)(1), "monotonic")

    return types.int64(address, place), generate


turn: Any = intrinsic(_turn)  # numba fills in the context


def pointer(kind: types.Type) -> Any:
    """A function of compiled code: a number of a job as an address of numbers of a kind."""

    def to(_context: Any, number: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            wanted = context.get_value_type(signature.return_type)
            return builder.inttoptr(values[0], wanted)

        return types.CPointer(kind)(number), generate  # type: ignore[no-untyped-call]

    return intrinsic(to)
