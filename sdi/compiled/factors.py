"""The factors of a product of bfloat16 matrices: rounded to bfloat16, one of them transposed.

A library of matrix products copies what does not lie as it reads it, and for bfloat16 that copy
takes as long as the product. Here it is one pass over memory with the rounding; what rounding may
be off by is told by the squared lengths of the tokens, which the same pass adds up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from sdi.compiled.turns import LOOSE, TURNS, carray, kernel, pointer, turn

EXAMPLES, TOKENS, COLUMNS, EXAMPLE_STEP, TOKEN_STEP, WHOLE, FACTOR, OUT, SQUARES, SUMS = range(
    1, 11
)
"""Places in a job: B, n, C, numbers between examples and between tokens, whether they are float32
(else bfloat16), and addresses: of the factor, of the result, and of (B, n) float32 zeros, to which
the squared lengths of the tokens are added where numbers are float32; of `narrow` also of float32
zeros (B, blocks, C), to which each block's tokens are added."""
_LENGTH = SUMS + 1
SIDE = 16
"""Numbers of a vector; rows and columns that are transposed in registers."""
BLOCK = 256
"""Tokens a turn."""

_words, _halves = pointer(types.uint32), pointer(types.uint16)
_floats = pointer(types.float32)
half_type, word_type, number_type = ir.IntType(16), ir.IntType(32), ir.FloatType()


def vector(kind: Any) -> Any:
    """The type of `SIDE` numbers."""
    return ir.VectorType(kind, SIDE)


def each(value: int) -> Any:
    """A vector of words that are all the same."""
    return ir.Constant(vector(word_type), [value] * SIDE)


def read_vector(builder: Any, place: Any, kind: Any) -> Any:
    """The vector at an address."""
    return builder.load(builder.inttoptr(place, vector(kind).as_pointer()), align=2)


def write_vector(builder: Any, place: Any, vector: Any) -> None:
    """Put it at an address."""
    builder.store(vector, builder.inttoptr(place, vector.type.as_pointer()), align=2)


def rounded(builder: Any, words: Any) -> Any:
    """Of float32 numbers, as their bits, the nearest bfloat16; of two as near the even one."""
    odd = builder.and_(builder.lshr(words, each(16)), each(1))
    near = builder.lshr(builder.add(builder.add(words, each(0x7FFF)), odd), each(16))
    magnitude = builder.and_(words, each(0x7FFFFFFF))
    is_nan = builder.icmp_unsigned(">", magnitude, each(0x7F800000))
    return builder.trunc(builder.select(is_nan, each(0x7FC0), near), vector(half_type))


def turned(builder: Any, rows: list[Any]) -> list[Any]:
    """`SIDE` vectors transposed: four times rows i and i + 8 are interleaved, which each time makes
    the highest binary digit of a number's row the lowest of its column.
    """
    for _ in range(SIDE.bit_length() - 1):
        pairs = zip(rows[: SIDE // 2], rows[SIDE // 2 :], strict=True)
        rows = [_interleaved(builder, *pair, at) for pair in pairs for at in (0, SIDE // 2)]
    return rows


def _interleaved(builder: Any, one: Any, other: Any, first: int) -> Any:
    """Half of two vectors' numbers by turns, from `first` on."""
    order = [place for i in range(first, first + SIDE // 2) for place in (i, SIDE + i)]
    return builder.shuffle_vector(one, other, ir.Constant(vector(word_type), order))


def _squared(builder: Any, columns: list[Any]) -> Any:
    """The sums of squares of vectors of bfloat16, in float32."""
    total = ir.Constant(vector(number_type), [0.0] * SIDE)
    for column in columns:
        wide = builder.zext(column, vector(word_type))
        bits = builder.shl(wide, each(16))
        number = builder.bitcast(bits, vector(number_type))
        total = builder.fadd(total, builder.fmul(number, number))
    return total


def _square(kind: Any) -> Callable[..., Any]:
    """Transpose `SIDE` rows of as many numbers: addresses of both sides, steps between rows in
    bytes, and the address of their tokens' squared lengths, for float32 numbers.
    """

    def build(
        _context: Any, source: Any, step: Any, target: Any, target_step: Any, squares: Any
    ) -> Any:
        def generate(_context: Any, builder: Any, _signature: Any, given: Any) -> Any:
            def at(base: Any, step: Any, number: int) -> Any:
                return builder.add(base, builder.mul(step, ir.Constant(step.type, number)))

            source, step, target, target_step, squares = given
            rows = [read_vector(builder, at(source, step, i), kind) for i in range(SIDE)]
            if kind is word_type:
                rows = [rounded(builder, row) for row in rows]
            columns = turned(builder, rows)
            for i, column in enumerate(columns):
                write_vector(builder, at(target, target_step, i), column)
            if kind is word_type:
                known = read_vector(builder, squares, number_type)
                write_vector(builder, squares, builder.fadd(known, _squared(builder, columns)))

        return types.void(source, step, target, target_step, squares), generate

    return build


def _round_vector(_context: Any, source: Any, target: Any) -> Any:
    """Round `SIDE` numbers, from an address to another."""

    def generate(_context: Any, builder: Any, _signature: Any, given: Any) -> Any:
        write_vector(builder, given[1], rounded(builder, read_vector(builder, given[0], word_type)))

    return types.void(source, target), generate


half_square: Any = intrinsic(_square(half_type))  # numba fills in the context
word_square: Any = intrinsic(_square(word_type))
round_vector: Any = intrinsic(_round_vector)


@numba.njit
def _near(word: Any) -> Any:
    """`rounded` of one number."""
    if word & 0x7FFFFFFF > 0x7F800000:
        return 0x7FC0
    return (word + 0x7FFF + (word >> 16 & 1)) >> 16


@numba.njit
def _number_at(place: Any) -> Any:
    return carray(_floats(place), (1,))[0]


@numba.njit
def _rounded_at(place: Any) -> Any:
    return _near(np.int64(carray(_words(place), (1,))[0]))


@numba.njit(fastmath=LOOSE)
def _sum(numbers: Any, sums: Any) -> Any:
    """The sum of squares; the numbers are added to `sums`."""
    total = np.float32(0)
    for i in range(numbers.shape[0]):
        total += numbers[i] * numbers[i]
        sums[i] += numbers[i]
    return total


@numba.njit
def _turn(job: Any, example: int, first: int) -> None:
    """Tokens of an example from `first` on, transposed."""
    tokens, columns, step, whole = job[TOKENS], job[COLUMNS], job[TOKEN_STEP], job[WHOLE]
    size = 4 if whole else 2
    last = min(tokens, first + BLOCK)
    factor = job[FACTOR] + size * example * job[EXAMPLE_STEP]
    out = job[OUT] + 2 * tokens * columns * example
    squares = job[SQUARES] + 4 * tokens * example
    whole_last, whole_columns = last - (last - first) % SIDE, columns // SIDE * SIDE
    for token in range(first, whole_last, SIDE):
        for column in range(0, whole_columns, SIDE):
            source = factor + size * (token * step + column)
            target, place = out + 2 * (column * tokens + token), squares + 4 * token
            if whole:
                word_square(source, 4 * step, target, 2 * tokens, place)
            else:
                half_square(source, 2 * step, target, 2 * tokens, place)
    lengths = carray(_floats(squares), (tokens,))
    for token in range(first, last):
        for column in range(whole_columns if token < whole_last else 0, columns):
            place, target = factor + size * (token * step + column), out + 2 * column * tokens
            if whole:
                carray(_halves(target), (tokens,))[token] = _rounded_at(place)
                lengths[token] += _number_at(place) ** 2
            else:
                carray(_halves(target), (tokens,))[token] = carray(_halves(place), (1,))[0]


@kernel
def transpose(address: Any) -> None:
    """See `sdi.sketch.kernels.halves`; a turn is a block of an example's tokens."""
    job = carray(address, (_LENGTH,), np.int64)
    blocks = (job[TOKENS] + BLOCK - 1) // BLOCK
    number = turn(address, TURNS)
    while number < job[EXAMPLES] * blocks:
        _turn(job, number // blocks, number % blocks * BLOCK)
        number = turn(address, TURNS)


@kernel
def narrow(address: Any) -> None:
    """See `sdi.sketch.kernels.halves`; of float32, a turn is a block of an example's tokens."""
    job = carray(address, (_LENGTH,), np.int64)
    tokens, columns = job[TOKENS], job[COLUMNS]
    blocks = (tokens + BLOCK - 1) // BLOCK
    number = turn(address, TURNS)
    while number < job[EXAMPLES] * blocks:
        example, first = number // blocks, number % blocks * BLOCK
        squares = carray(_floats(job[SQUARES] + 4 * tokens * example), (tokens,))
        sums = carray(_floats(job[SUMS] + 4 * columns * number), (columns,))
        for token in range(first, min(tokens, first + BLOCK)):
            row = job[FACTOR] + 4 * (example * job[EXAMPLE_STEP] + token * job[TOKEN_STEP])
            target = job[OUT] + 2 * columns * (example * tokens + token)
            for column in range(0, columns - SIDE + 1, SIDE):
                round_vector(row + 4 * column, target + 2 * column)
            out = carray(_halves(target), (columns,))
            for column in range(columns // SIDE * SIDE, columns):
                out[column] = _rounded_at(row + 4 * column)
            squares[token] += _sum(carray(_floats(row), (columns,)), sums)
        number = turn(address, TURNS)
