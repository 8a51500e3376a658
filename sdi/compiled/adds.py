"""The shifted add: each column of δᵀa signed and added into the buckets, one run after another."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from sdi.compiled.turns import TURNS, carray, kernel, pointer, turn

EXAMPLES, COLUMNS, ROWS, DIM, HALF, PRODUCT, STARTS, ROW_SIGN, COLUMN_SIGN, OUT = range(1, 11)
"""Places in a job: B, C, R, M, whether products are bfloat16, and addresses of the operands."""
_LENGTH = OUT + 1

_floats, _halves, _places = map(pointer, (types.float32, types.uint16, types.int64))


def _widen(_context: Any, value: Any) -> Any:
    """A float32 as it is, or of a uint16 the float32 whose upper half it is (bfloat16)."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        if value == numba.float32:
            return arguments[0]
        word = ir.IntType(32)
        shifted = builder.shl(builder.zext(arguments[0], word), ir.Constant(word, 16))
        return builder.bitcast(shifted, ir.FloatType())

    return numba.float32(value), generate


widened: Any = intrinsic(_widen)  # numba fills in the context


# Slices, and a loop from 0: an index that might be negative keeps a loop from becoming vectors.
@numba.njit(fastmath=True)
def _add_run(target: Any, source: Any, row_sign: Any, sign: Any) -> None:
    for i in range(source.shape[0]):
        target[i] += widened(source[i]) * (row_sign[i] * sign)


@numba.njit
def _add_columns(out: Any, product: Any, starts: Any, row_sign: Any, column_sign: Any) -> None:
    """Of one example: product (C, R) into out (M,)."""
    dim, rows = len(out), product.shape[1]
    for c in range(product.shape[0]):
        start, sign = starts[c], column_sign[c]
        head = min(rows, dim - start)
        _add_run(out[start : start + head], product[c, :head], row_sign[:head], sign)
        if head < rows:
            _add_run(out[: rows - head], product[c, head:], row_sign[head:], sign)


@kernel
def add(address: Any) -> None:
    """See `sdi.sketch.kernels.shifted_add`; a turn is an example."""
    job = carray(address, (_LENGTH,), np.int64)
    columns, rows, dim = job[COLUMNS], job[ROWS], job[DIM]
    starts = carray(_places(job[STARTS]), (columns,))
    row_sign = carray(_floats(job[ROW_SIGN]), (rows,))
    column_sign = carray(_floats(job[COLUMN_SIGN]), (columns,))
    signs = (starts, row_sign, column_sign)
    example = turn(address, TURNS)
    while example < job[EXAMPLES]:
        out = carray(_floats(job[OUT] + 4 * dim * example), (dim,))
        if job[HALF]:
            half = _halves(job[PRODUCT] + 2 * rows * columns * example)
            _add_columns(out, carray(half, (columns, rows)), *signs)
        else:
            whole = _floats(job[PRODUCT] + 4 * rows * columns * example)
            _add_columns(out, carray(whole, (columns, rows)), *signs)
        example = turn(address, TURNS)
