"""Instructions that tell vectors by their first bits, and multiply codes with whole numbers.

A byte holds four bits of one group of four entries of a vector and four of the next, and the same
bytes of `LANES` vectors lie side by side (`curate.bitplanes`). What the sixteen patterns of a group
come to with a query is a table of sixteen bytes, and one instruction looks up as many vectors' as a
register has bytes (André, Kermarrec & Le Scouarnec 2015).
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from sdi import team
from sdi.compiled.instructions import PAGE, called, cgutils, prefetch, spread

LANES = 64
"""Vectors of a block."""
BIAS = 128
"""What is added to the numbers of a table."""
MOST_PAIRS = 128
"""Of groups whose sums fit into 16 bits."""
_byte, _half, _word, _long = (ir.IntType(bits) for bits in (8, 16, 32, 64))
REGISTER = 64 if "avx512bw" in team.features() else 32
"""Bytes of a register; a target without AVX2 would have none of what follows (`curate.bands`)."""
_LOOK = {64: "llvm.x86.avx512.pshuf.b.512", 32: "llvm.x86.avx2.pshuf.b"}[REGISTER]


def _vector(kind: Any, count: int) -> Any:
    return ir.VectorType(kind, count)


def _all(kind: Any, count: int, value: int) -> Any:
    return ir.Constant(_vector(kind, count), [value] * count)


def _read(builder: Any, place: Any, kind: Any, count: int) -> Any:
    return builder.load(builder.inttoptr(place, _vector(kind, count).as_pointer()), align=1)


def _shuffled(builder: Any, one: Any, other: Any, order: list[int]) -> Any:
    return builder.shuffle_vector(one, other, ir.Constant(_vector(_word, len(order)), order))


def _look_up(_context: Any, bits: Any, tables: Any, pairs: Any, sums: Any, weight: Any) -> Any:
    """Add to the sums of a block's vectors what `pairs` of groups come to, times a weight.

    Bytes are added up in 16 bits: all of a register as they lie, which leaves the upper ones in the
    lower ones' sums, and the upper ones alone, which tell what that was.
    """
    shorts = REGISTER // 2

    def generate(_context: Any, builder: Any, _signature: Any, given: Any) -> None:
        bits, tables, pairs, sums, weight = given
        zero = _all(_half, shorts, 0)
        registers = range(LANES // REGISTER)
        both = [cgutils.alloca_once_value(builder, zero) for _ in registers]
        upper = [cgutils.alloca_once_value(builder, zero) for _ in registers]
        with cgutils.for_range(builder, pairs, intp=_long) as loop:

            def at(base: Any, size: int, offset: int = 0) -> Any:
                moved = builder.mul(loop.index, ir.Constant(_long, size))
                return builder.add(builder.add(base, moved), ir.Constant(_long, offset))

            prefetch(builder, at(bits, LANES, PAGE))
            wide = [number % 16 for number in range(REGISTER)]
            small = [_read(builder, at(tables, 32, 16 * i), _byte, 16) for i in range(2)]
            table = [_shuffled(builder, each, each, wide) for each in small]
            low = _all(_byte, REGISTER, 15)
            for number in registers:
                read = _read(builder, at(bits, LANES, REGISTER * number), _half, shorts)
                moved = builder.lshr(read, _all(_half, shorts, 4))
                for part, values in zip((read, moved), table, strict=True):
                    which = builder.and_(builder.bitcast(part, low.type), low)
                    found = called(builder, _LOOK, low.type, values, which)
                    added = builder.bitcast(found, zero.type)
                    high = builder.lshr(added, _all(_half, shorts, 8))
                    for total, more in ((both[number], added), (upper[number], high)):
                        builder.store(builder.add(builder.load(total), more), total)
        bias = builder.mul(pairs, ir.Constant(_long, 2 * BIAS))
        for number in registers:
            high = builder.load(upper[number])
            over = builder.shl(high, _all(_half, shorts, 8))
            lower = builder.sub(builder.load(both[number]), over)
            order = [place for i in range(shorts) for place in (i, shorts + i)]
            made = builder.zext(_shuffled(builder, lower, high, order), _vector(_word, REGISTER))
            for value, function in ((bias, builder.sub), (weight, builder.mul)):
                made = function(made, spread(builder, builder.trunc(value, _word), REGISTER))
            place = builder.add(sums, ir.Constant(_long, 4 * REGISTER * number))
            known = _read(builder, place, _word, REGISTER)
            target = builder.inttoptr(place, made.type.as_pointer())
            builder.store(builder.add(known, made), target, align=4)

    return types.void(bits, tables, pairs, sums, weight), generate


def _multiply(_context: Any, codes: Any, whole: Any, dim: Any) -> Any:
    """The product of uint8 codes and int16 numbers, 16 at a time."""

    def generate(_context: Any, builder: Any, _signature: Any, given: Any) -> Any:
        codes, whole, dim = given
        total = cgutils.alloca_once_value(builder, _all(_word, 8, 0))
        with cgutils.for_range(
            builder, builder.lshr(dim, ir.Constant(_long, 4)), intp=_long
        ) as loop:
            place = builder.mul(loop.index, ir.Constant(_long, 16))
            read = _read(builder, builder.add(codes, place), _byte, 16)
            numbers = _read(builder, builder.add(whole, builder.add(place, place)), _half, 16)
            wide = builder.zext(read, numbers.type)
            made = called(builder, "llvm.x86.avx2.pmadd.wd", _vector(_word, 8), wide, numbers)
            builder.store(builder.add(builder.load(total), made), total)
        kept = builder.sext(builder.load(total), _vector(_long, 8))
        sums = [builder.extract_element(kept, ir.Constant(_word, i)) for i in range(8)]
        while len(sums) > 1:
            sums = [builder.add(*pair) for pair in zip(sums[::2], sums[1::2], strict=True)]
        return sums[0]

    return types.int64(codes, whole, dim), generate


look_up: Any = intrinsic(_look_up)  # numba fills in the contexts
multiply: Any = intrinsic(_multiply)
