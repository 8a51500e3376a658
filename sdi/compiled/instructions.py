"""What every file needs that writes instructions: one of LLVM's or the processor's functions, one
number in each lane of a vector, memory that is wanted soon.

A processor reads ahead by itself, but within a page, and no more than some rows of a matrix at a
time. What it is asked for it reads while it works, the next page's address included.
"""

from __future__ import annotations

from typing import Any

import numba
from llvmlite import ir
from numba.core import cgutils as typed_cgutils
from numba.core import types
from numba.extending import intrinsic

cgutils: Any = typed_cgutils  # which says nothing of its functions' types
PAGE, LINE = 4096, 64
"""Bytes of a page, and of what is read at once."""
_byte, _word = ir.IntType(8), ir.IntType(32)


def called(builder: Any, name: str, made: Any, *given: Any) -> Any:
    """What a function makes of values, by its name."""
    kind = ir.FunctionType(made, [value.type for value in given])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), given)


def spread(builder: Any, number: Any, count: int) -> Any:
    """A vector with the number in every lane."""
    nothing = ir.Constant(ir.VectorType(number.type, count), ir.Undefined)
    one = builder.insert_element(nothing, number, ir.Constant(_word, 0))
    first = ir.Constant(ir.VectorType(_word, count), [0] * count)
    return builder.shuffle_vector(one, nothing, first)


def prefetch(builder: Any, place: Any) -> None:
    """Ask for the line at an address, which need not be anyone's."""
    at = builder.inttoptr(place, _byte.as_pointer())
    how = (ir.Constant(_word, each) for each in (0, 3, 1))  # to read, into all caches, numbers
    called(builder, "llvm.prefetch.p0i8", ir.VoidType(), at, *how)


def _ask(_context: Any, place: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, given: Any) -> None:
        prefetch(builder, given[0])

    return types.void(place), generate


ask: Any = intrinsic(_ask)  # numba fills in the context


@numba.njit
def ask_row(place: Any, width: Any) -> None:
    """Ask for so many bytes; of none at address 0."""
    for line in range(0, width if place else 0, LINE):
        ask(place + line)
