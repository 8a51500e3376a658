"""Vectors of float32 and square tiles of them, for kernels that are compiled by numba.

Why not plain loops. A compiler turns a loop into vector instructions, but keeps no block of sums
in registers across a loop of products, which is where a matrix product has its speed from. So a
*tile* here is `LANES` vectors of `LANES` numbers that stay in registers, and the functions below
are the few that products, softmax and their gradients need. They are written with llvmlite, which
numba compiles with, and are called like any function from code that numba compiles.

What it gives up: nothing here checks a bound. Matrices are float32, with contiguous rows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, models, register_model

from sdi import team
from sdi.compiled.instructions import called, cgutils, spread

LANES = 16 if "avx512f" in team.features() else 8
"""Numbers of a vector, and vectors of a tile; a tile takes half of the registers."""

_word, _long, _number = ir.IntType(32), ir.IntType(64), ir.FloatType()
_vector, _words = ir.VectorType(_number, LANES), ir.VectorType(_word, LANES)
_tile = ir.ArrayType(_vector, LANES)
_NOTHING, _ZERO = ir.Constant(_vector, ir.Undefined), ir.Constant(_vector, None)


class _VectorType(types.Type):
    def __init__(self) -> None:
        super().__init__(name=f"Vector{LANES}")


class _TileType(types.Type):
    def __init__(self) -> None:
        super().__init__(name=f"Tile{LANES}")


@register_model(_VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _vector)  # type: ignore[no-untyped-call]


@register_model(_TileType)
class _TileModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _tile)  # type: ignore[no-untyped-call]


_V, _T, _I, _F = _VectorType(), _TileType(), types.int64, types.float32
_M = "matrix"
_Emit = Callable[..., Any]


def _defined(result: Any, *expected: Any) -> Callable[[_Emit], Any]:
    """Make an intrinsic of a function that writes its code.

    The function is given the builder and the value of each argument; of a matrix, a function of
    (row, column, type) that writes the address of an element.
    """

    def decorate(emit: _Emit) -> Any:
        def typed(_context: Any, *given: Any) -> Any:
            kinds = [g if e is _M else e for e, g in zip(expected, given, strict=True)]

            def generate(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
                seen = [
                    _addresses(context, builder, kind, value) if wanted is _M else value
                    for wanted, kind, value in zip(expected, kinds, values, strict=True)
                ]
                found = emit(builder, *seen)
                return context.get_dummy_value() if result is types.void else found

            return result(*kinds), generate

        functools.update_wrapper(typed, emit)  # numba asks for the number of arguments
        return intrinsic(typed)

    return decorate


def _addresses(context: Any, builder: Any, kind: Any, value: Any) -> Callable[..., Any]:
    array = context.make_array(kind)(context, builder, value)
    pitch = cgutils.unpack_tuple(builder, array.strides, 2)[0]
    start = builder.ptrtoint(array.data, _long)

    def address(row: Any, column: Any, kind: Any = _vector) -> Any:
        offset = builder.add(builder.mul(row, pitch), builder.mul(column, _long(4)))
        return builder.inttoptr(builder.add(start, offset), kind.as_pointer())

    return address


def _read(builder: Any, address: Any) -> Any:
    found = builder.load(address)
    found.align = 4
    return found


def _write(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, address).align = 4


def _call(builder: Any, name: str, *operands: Any) -> Any:
    """A function of vectors that LLVM has, such as fma."""
    return called(builder, f"llvm.{name}.v{LANES}f32", _vector, *operands)


def _all(number: float) -> Any:
    return ir.Constant(_vector, [number] * LANES)


# -- memory -----------------------------------------------------------------------------------


@_defined(_V, _M, _I, _I)
def load(builder: Any, source: Any, row: Any, column: Any) -> Any:
    """The vector from an element on."""
    return _read(builder, source(row, column))


@_defined(types.void, _M, _I, _I, _V)
def store(builder: Any, target: Any, row: Any, column: Any, vector: Any) -> None:
    """Write a vector from an element on."""
    _write(builder, vector, target(row, column))


@_defined(_T, _M, _I, _I)
def load_tile(builder: Any, source: Any, row: Any, column: Any) -> Any:
    """The tile whose first element is that."""
    tile = ir.Constant(_tile, ir.Undefined)
    for r in range(LANES):
        vector = _read(builder, source(builder.add(row, _long(r)), column))
        tile = builder.insert_value(tile, vector, r)
    return tile


@_defined(types.void, _M, _I, _I, _T)
def store_tile(builder: Any, target: Any, row: Any, column: Any, tile: Any) -> None:
    """Write a tile from an element on."""
    for r in range(LANES):
        at = target(builder.add(row, _long(r)), column)
        _write(builder, builder.extract_value(tile, r), at)


# -- products ---------------------------------------------------------------------------------


@_defined(_T)
def zeros(_builder: Any) -> Any:
    """A tile of zeros."""
    return ir.Constant(_tile, None)


@_defined(_T, _T, _M, _I, _I, _V)
def add_down(builder: Any, tile: Any, left: Any, row: Any, column: Any, vector: Any) -> Any:
    """Add to each vector r of a tile left[row + r, column] times a vector."""
    for r in range(LANES):
        number = builder.load(left(builder.add(row, _long(r)), column, _number))
        tile = _added(builder, tile, r, number, vector)
    return tile


@_defined(_T, _T, _M, _I, _V)
def add_along(builder: Any, tile: Any, left: Any, row: Any, vector: Any) -> Any:
    """Add to each vector r of a tile left[row, r] times a vector."""
    for r in range(LANES):
        number = builder.load(left(row, _long(r), _number))
        tile = _added(builder, tile, r, number, vector)
    return tile


def _added(builder: Any, tile: Any, r: int, number: Any, vector: Any) -> Any:
    known = builder.extract_value(tile, r)
    found = _call(builder, "fma", spread(builder, number, LANES), vector, known)
    return builder.insert_value(tile, found, r)


@_defined(_V, _V, _M, _I, _T)
def add_collected(builder: Any, vector: Any, left: Any, row: Any, tile: Any) -> Any:
    """Add to a vector Σ_r left[row, r] times vector r of a tile."""
    sums = [vector, _ZERO]  # two: each product waits for the one before
    for r in range(LANES):
        number = spread(builder, builder.load(left(row, _long(r), _number)), LANES)
        sums[r % 2] = _call(builder, "fma", number, builder.extract_value(tile, r), sums[r % 2])
    return builder.fadd(*sums)


@_defined(_T, _T)
def transposed(builder: Any, tile: Any) -> Any:
    """A tile with its two axes swapped, by blocks of 1, 2, 4 … numbers."""
    rows = [builder.extract_value(tile, r) for r in range(LANES)]
    lanes = range(LANES)
    for size in (1 << bit for bit in range(LANES.bit_length() - 1)):
        upper = _words([lane if not lane & size else LANES + lane - size for lane in lanes])
        lower = _words([lane + size if not lane & size else LANES + lane for lane in lanes])
        for r in (r for r in lanes if not r & size):
            pair = rows[r], rows[r + size]
            rows[r] = builder.shuffle_vector(*pair, upper)
            rows[r + size] = builder.shuffle_vector(*pair, lower)
    for r, row in enumerate(rows):
        tile = builder.insert_value(tile, row, r)
    return tile


# -- vectors ----------------------------------------------------------------------------------


@_defined(_V, _F)
def filled(builder: Any, number: Any) -> Any:
    """A vector with the number in every lane."""
    return spread(builder, number, LANES)


@_defined(_V, _V, _V)
def add(builder: Any, left: Any, right: Any) -> Any:
    """The sum."""
    return builder.fadd(left, right)


@_defined(_V, _V, _V)
def subtract(builder: Any, left: Any, right: Any) -> Any:
    """The difference."""
    return builder.fsub(left, right)


@_defined(_V, _V, _V)
def multiply(builder: Any, left: Any, right: Any) -> Any:
    """The product, number by number."""
    return builder.fmul(left, right)


@_defined(_V, _V, _V)
def larger(builder: Any, left: Any, right: Any) -> Any:
    """The larger of each two numbers, NaN where one of them is."""
    return _larger(builder, left, right)


def _larger(builder: Any, left: Any, right: Any) -> Any:
    # LLVM has a function for it, which its versions before 17 do not know on every processor.
    found = builder.select(builder.fcmp_unordered(">", left, right), left, right)
    return builder.select(builder.fcmp_unordered("uno", right, right), right, found)


@_defined(_F, _V)
def largest(builder: Any, vector: Any) -> Any:
    """The largest number of a vector, NaN where one of them is."""
    for half in (LANES >> step for step in range(1, LANES.bit_length())):
        upper = _words([(lane + half) % LANES for lane in range(LANES)])
        vector = _larger(builder, vector, builder.shuffle_vector(vector, _NOTHING, upper))
    return builder.extract_element(vector, _word(0))


@_defined(_V, _V, _I, _F)
def kept_from(builder: Any, vector: Any, first: Any, other: Any) -> Any:
    """The vector, with `other` in the lanes before lane `first`."""
    bound = spread(builder, builder.trunc(first, _word), LANES)
    keeps = builder.icmp_signed(">=", _words(list(range(LANES))), bound)
    return builder.select(keeps, vector, spread(builder, other, LANES))


_LOG2E = math.log2(math.e)
_SHIFT = 1.5 * 2**23  # added to a number, leaves its nearest integer in the lowest bits
_POWERS = (1.546531e-4, 1.339528e-3, 9.61804e-3, 5.5503407e-2, 0.24022651, 0.6931472, 1.0)
"""Of 2^x for |x| up to a half, highest power first; off by 6e-9 at most."""


@_defined(_V, _V)
def exponential(builder: Any, vector: Any) -> Any:
    """Exp of numbers up to 88, zero below -87; 2^x with x rounded, times the rest's polynomial."""
    power = builder.fmul(vector, _all(_LOG2E))
    above = builder.fcmp_unordered(">", power, _all(-126.0))  # a NaN stays
    power = builder.select(above, power, _all(-126.0))
    rounded = builder.fadd(power, _all(_SHIFT))
    rest = builder.fsub(power, builder.fsub(rounded, _all(_SHIFT)))
    found = _all(_POWERS[0])
    for coefficient in _POWERS[1:]:
        found = _call(builder, "fma", found, rest, _all(coefficient))
    exponent = builder.add(builder.bitcast(rounded, _words), _words([127] * LANES))
    exponent = builder.bitcast(builder.shl(exponent, _words([23] * LANES)), _vector)
    return builder.select(above, builder.fmul(found, exponent), _ZERO)
