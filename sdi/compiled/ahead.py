"""Asking for memory that is wanted soon.

A processor reads ahead by itself, but within a page, and no more than some rows of a matrix at a
time. What it is asked for it reads while it works, the next page's address included.
"""

from __future__ import annotations

from typing import Any

import numba
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

PAGE, LINE = 4096, 64
"""Bytes of a page, and of what is read at once."""
_byte, _word = ir.IntType(8), ir.IntType(32)


def prefetch(builder: Any, place: Any) -> None:
    """Ask for the line at an address, which need not be anyone's."""
    name, at = "llvm.prefetch.p0i8", builder.inttoptr(place, _byte.as_pointer())
    kind = ir.FunctionType(ir.VoidType(), [at.type, _word, _word, _word])
    known = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    builder.call(known, [at, *(ir.Constant(_word, each) for each in (0, 3, 1))])


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
