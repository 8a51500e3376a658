"""Jobs of kernels: numbers that say where the operands are, and turns that threads share.

A job is int64 in memory. Its first number counts turns: a thread takes the next one until there is
none left, so that whoever is quicker does more. What the other numbers mean is up to the kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

carray: Any = numba.carray  # type: ignore[attr-defined]
_SIGNATURE = types.void(types.CPointer(types.int64))  # type: ignore[no-untyped-call]


def kernel(function: Callable[[Any], None]) -> Any:
    """Compile a function of the address of a job; `.address` is where the machine finds it."""
    return numba.cfunc(_SIGNATURE, cache=True, error_model="numpy")(function)


def _turn(_context: Any, address: Any) -> Any:
    """The next turn of a job, from 0 on; no other thread is given it."""

    def generate(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        return builder.atomic_rmw("add", values[0], ir.IntType(64)(1), "monotonic")

    return types.int64(address), generate


turn: Any = intrinsic(_turn)  # numba fills in the context


def pointer(kind: types.Type) -> Any:
    """A function of compiled code: a number of a job as an address of numbers of a kind."""

    def to(_context: Any, number: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            wanted = context.get_value_type(signature.return_type)
            return builder.inttoptr(values[0], wanted)

        return types.CPointer(kind)(number), generate  # type: ignore[no-untyped-call]

    return intrinsic(to)
