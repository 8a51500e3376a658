"""The shifted add, compiled by numba. Imported where numba is installed, by `sdi.sketch.kernels`.

Functions of a module, since numba keeps no closure in its cache.
"""

from __future__ import annotations

from typing import Any

import numba
from llvmlite import ir
from numba.extending import intrinsic


def _widen(_context: Any, value: Any) -> Any:
    """A float32 as it is, or of a uint16 the float32 whose upper half it is (bfloat16)."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        if value == numba.float32:
            return arguments[0]
        word = ir.IntType(32)
        shifted = builder.shl(builder.zext(arguments[0], word), ir.Constant(word, 16))
        return builder.bitcast(shifted, ir.FloatType())

    return numba.float32(value), generate


_widened: Any = intrinsic(_widen)  # numba fills in the context


# Slices, and a loop from 0: an index that might be negative keeps a loop from becoming vectors.
@numba.njit(cache=True, nogil=True, fastmath=True)
def _add_run(target: Any, source: Any, row_sign: Any, sign: Any) -> None:
    for i in range(source.shape[0]):
        target[i] += _widened(source[i]) * (row_sign[i] * sign)


@numba.njit(cache=True, nogil=True, fastmath=True)
def add(product: Any, starts: Any, row_sign: Any, column_sign: Any, out: Any) -> None:
    """See `sdi.sketch.kernels.shifted_add`; bfloat16 comes as uint16."""
    dim, rows = out.shape[1], product.shape[2]
    for b in range(product.shape[0]):
        for c in range(product.shape[1]):
            start, sign = starts[c], column_sign[c]
            head = min(rows, dim - start)
            _add_run(out[b, start : start + head], product[b, c, :head], row_sign[:head], sign)
            if head < rows:
                _add_run(out[b, : rows - head], product[b, c, head:], row_sign[head:], sign)
