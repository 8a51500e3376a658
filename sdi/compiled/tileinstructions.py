"""What numba has no words for: tiles of a processor's registers (AMX), and how numbers are packed
for them. All are functions of compiled code, and what they are given are addresses.

A tile is 16 rows of 64 bytes. Eight are used: 0 to 3 are float32 or int32, the quarters of a
product of `SPAN` rows and columns; 4 and 5 are the left factor's, 32 bfloat16 or 64 int8 numbers of
half of the rows each; 6 and 7 the right one's, two or four numbers of a column side by side.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from sdi.compiled.factors import (
    SIDE,
    each,
    half_type,
    number_type,
    read_vector,
    rounded,
    turned,
    vector,
    word_type,
    write_vector,
)
from sdi.compiled.instructions import called, cgutils, spread

SPAN = 2 * SIDE
"""Rows and columns of four tiles; tokens of a tile."""
TILE = 1024
"""Bytes."""

_byte, _long = ir.IntType(8), ir.IntType(64)


def _instruct(builder: Any, name: str, *given: Any) -> None:
    """An instruction of the processor, of addresses, strides and, as bytes, the tiles' numbers."""
    values = [ir.Constant(_byte, one) if isinstance(one, int) else one for one in given]
    called(builder, f"llvm.x86.{name}", ir.VoidType(), *values)


def _at(builder: Any, place: Any, offset: int = 0) -> Any:
    moved = builder.add(place, ir.Constant(_long, offset))
    return builder.inttoptr(moved, _byte.as_pointer())


def _fused(builder: Any, one: Any, other: Any, addend: Any) -> Any:
    """The sum of `addend` and one · other, rounded once."""
    product = builder.fmul(one, other, flags=("contract",))
    return builder.fadd(product, addend, flags=("contract",))


def _configure(_context: Any, configuration: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, given: Any) -> None:
        _instruct(builder, "ldtilecfg", _at(builder, given[0]))

    return types.void(configuration), generate


def _release(_context: Any) -> Any:
    def generate(_context: Any, builder: Any, _signature: Any, _given: Any) -> None:
        _instruct(builder, "tilerelease")

    return types.void(), generate


def _begin(_context: Any) -> Any:
    """Tiles 0 to 3 become zero."""

    def generate(_context: Any, builder: Any, _signature: Any, _given: Any) -> None:
        for tile in range(4):
            _instruct(builder, "tilezero", tile)

    return types.void(), generate


def _step(instruction: str) -> Any:
    """Add the products of tiles at two addresses with those at two others."""

    def build(_context: Any, upper: Any, lower: Any, near: Any, far: Any) -> Any:
        def generate(_context: Any, builder: Any, _signature: Any, given: Any) -> None:
            for tile, place in enumerate(given, 4):
                _instruct(builder, "tileloadd64", tile, _at(builder, place), ir.Constant(_long, 64))
            for tile, pair in enumerate(((4, 6), (4, 7), (5, 6), (5, 7))):
                _instruct(builder, instruction, tile, *pair)

        return types.void(upper, lower, near, far), generate

    return intrinsic(build)


def _moved(instruction: str) -> Any:
    """Tiles 0 to 3 from or to (SPAN, SPAN) numbers of four bytes, rows some bytes apart."""

    def build(_context: Any, product: Any, apart: Any) -> Any:
        def generate(_context: Any, builder: Any, _signature: Any, given: Any) -> None:
            lower = builder.add(given[0], builder.mul(given[1], ir.Constant(_long, SIDE)))
            for tile in range(4):
                place = _at(builder, lower if tile // 2 else given[0], 64 * (tile % 2))
                _instruct(builder, instruction, tile, place, given[1])

        return types.void(product, apart), generate

    return intrinsic(build)


def _copy_line(_context: Any, source: Any, target: Any, flips: Any) -> Any:
    """Copy 64 bytes; of each four the bits of a word are flipped."""

    def generate(_context: Any, builder: Any, _signature: Any, given: Any) -> None:
        source, target, flips = given
        flipped = spread(builder, builder.trunc(flips, word_type), SIDE)
        read = read_vector(builder, source, word_type)
        write_vector(builder, target, builder.xor(read, flipped))

    return types.void(source, target, flips), generate


def _add_numbers(count: int) -> Any:
    """Add so many times `SIDE` float32 numbers, each times a sign."""

    def build(_context: Any, target: Any, source: Any, sign: Any) -> Any:
        def generate(_context: Any, builder: Any, _signature: Any, given: Any) -> None:
            signs = spread(builder, given[2], SIDE)
            for part in range(count):
                at = ir.Constant(_long, 4 * SIDE * part)
                target, source = (builder.add(place, at) for place in given[:2])
                known = read_vector(builder, target, number_type)
                new = read_vector(builder, source, number_type)
                write_vector(builder, target, _fused(builder, new, signs, known))

        return types.void(target, source, sign), generate

    return intrinsic(build)


def _paired(builder: Any, first: Any, second: Any) -> Any:
    """bfloat16 numbers of two tokens side by side, as words."""
    one, two = (builder.zext(half, vector(word_type)) for half in (first, second))
    return builder.or_(one, builder.shl(two, each(16)))


def _signed(builder: Any, pairs: Any, signs: Any) -> Any:
    """Both of each pair times the sign of a float, given its bits."""
    negative = builder.and_(signs, each(1 << 31))
    return builder.xor(pairs, builder.or_(negative, builder.lshr(negative, each(16))))


def _turn(kind: Any) -> Any:
    """A packed tile of `SIDE` columns of `SPAN` tokens, which lie some bytes apart. Of float32
    numbers the squares of each token are added to `squares`: of the even ones, then of the odd.
    """

    def build(_context: Any, source: Any, apart: Any, target: Any, squares: Any) -> Any:
        def generate(_context: Any, builder: Any, _signature: Any, given: Any) -> None:
            source, apart, target, squares = given

            def token(number: int) -> Any:
                step = builder.mul(apart, ir.Constant(_long, number))
                numbers = read_vector(builder, builder.add(source, step), kind)
                return rounded(builder, numbers) if kind is word_type else numbers

            pairs = [_paired(builder, token(i), token(i + 1)) for i in range(0, SPAN, 2)]
            columns = turned(builder, pairs)
            for number, column in enumerate(columns):
                into = builder.add(target, ir.Constant(_long, 64 * number))
                write_vector(builder, into, column)
            if kind is word_type:
                for odd in (0, 1):
                    into = builder.add(squares, ir.Constant(_long, 64 * odd))
                    total = read_vector(builder, into, number_type)
                    for column in columns:
                        even = builder.shl(column, each(16))
                        bits = builder.and_(column, each(0xFFFF0000)) if odd else even
                        number = builder.bitcast(bits, vector(number_type))
                        total = _fused(builder, number, number, total)
                    write_vector(builder, into, total)

        return types.void(source, apart, target, squares), generate

    return intrinsic(build)


def _pack(kind: Any) -> Any:
    """Numbers of two tokens as pairs, from two addresses on, `tiles` times `SIDE` of them; those of
    a tile of rows go `apart` bytes behind those of the one before. Of float32 numbers the sums of
    squares of each token are written as two vectors, and they themselves added to `sums`.
    """

    def build(
        _context: Any,
        first: Any,
        second: Any,
        target: Any,
        apart: Any,
        signs: Any,
        squares: Any,
        sums: Any,
        tiles: Any,
    ) -> Any:
        def generate(_context: Any, builder: Any, _signature: Any, given: Any) -> None:
            first, second, target, apart, signs, squares, sums, tiles = given
            zero = ir.Constant(vector(number_type), [0.0] * SIDE)
            parts = [cgutils.alloca_once_value(builder, zero) for _ in range(2)]
            with cgutils.for_range(builder, tiles, intp=_long) as loop:

                def at(base: Any, size: int) -> Any:
                    return builder.add(base, builder.mul(loop.index, ir.Constant(_long, size)))

                halves, place = [], at(sums, 4 * SIDE)
                for source, square in zip((first, second), parts, strict=True):
                    if kind is half_type:
                        half = read_vector(builder, at(source, 2 * SIDE), half_type)
                    else:
                        words = read_vector(builder, at(source, 4 * SIDE), word_type)
                        half = rounded(builder, words)
                        number = builder.bitcast(words, vector(number_type))
                        length = _fused(builder, number, number, builder.load(square))
                        builder.store(length, square)
                        known = read_vector(builder, place, number_type)
                        write_vector(builder, place, builder.fadd(known, number))
                    halves.append(half)
                sign = read_vector(builder, at(signs, 4 * SIDE), word_type)
                into = builder.add(target, builder.mul(loop.index, apart))
                pairs = _paired(builder, *halves)
                write_vector(builder, into, _signed(builder, pairs, sign))
            if kind is word_type:
                for number, square in enumerate(parts):
                    into = builder.add(squares, ir.Constant(_long, 4 * SIDE * number))
                    known = read_vector(builder, into, number_type)
                    write_vector(builder, into, builder.fadd(known, builder.load(square)))

        given = (first, second, target, apart, signs, squares, sums, tiles)
        return types.void(*given), generate

    return intrinsic(build)


configure: Any = intrinsic(_configure)  # numba fills in the contexts
release: Any = intrinsic(_release)
begin: Any = intrinsic(_begin)
copy_line: Any = intrinsic(_copy_line)
step, byte_step = _step("tdpbf16ps"), _step("tdpbssd")
resume, end = _moved("tileloadd64"), _moved("tilestored64")
add_side, add_span = _add_numbers(1), _add_numbers(2)
turn_words, turn_halves = _turn(word_type), _turn(half_type)
pack_words, pack_halves = _pack(word_type), _pack(half_type)
