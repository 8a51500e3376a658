"""What a search asks of vectors in memory: first bits, products, rows.

The first bits of an index's vectors tell which may be among the best (`curate.bitplanes`). A byte
holds four bits of one group of four entries of a vector and four of the next, and the same bytes of
`LANES` vectors lie side by side. What the sixteen patterns of a group come to with a query is a
table of sixteen bytes, and one instruction looks up as many vectors' as a register has bytes
(André, Kermarrec & Le Scouarnec 2015). What still may be among the best is multiplied out.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from sdi import team
from sdi.compiled.instructions import PAGE, ask_row, called, cgutils, prefetch, spread
from sdi.compiled.turns import LOOSE, carray, kernel, pointer

BANDS, DIM, PLANES, STRIPES, PLAN, NEEDS, TABLES, WHOLE = range(1, 9)
"""Places in a job: how many bands; M; planes, and stripes of each; addresses of int64 (bands, 7) as
below, of float32 (bands,) that a bound has to reach, of uint8 tables (M / 4, 16) with `BIAS` added,
and of the query in whole numbers, int16 (M,)."""
SIZE, LENGTH, SUMS, PLACES, DOTS, FOUND = range(9, 15)
"""Of float64 numbers the bits: what a sum of the tables has to be multiplied with, and the length
of the query that the tables are of. Addresses of int32, one for each vector of a band in whole
blocks; of int32, the places of what was found; of int64, their products with the whole numbers; of
int64 (1,), how many there are."""
BITS, LEVEL, COUNT, GAINS, RESTS, CODES, LEAST = range(7)
"""Of a band: the address of its bits, (stripes, blocks, M / 8 / STRIPES, LANES) bytes; how many
stripes are read; how many vectors; addresses of float32 gains and rests at that level, in whole
blocks; of its codes, uint8 (count, M), with `OFFSET` added; and the least product of these with the
whole numbers that is of use."""
CODED, QUERIES, APART, PRODUCTS, SCALES, SIZES, FAR, LIMITS, HITS, REACHED = range(1, 11)
"""Places in a job of `reached`: how many codes and queries; numbers from one code's products to the
next one's; addresses of int32 products, of float32 scales of the codes, of the sizes of the
queries' numbers, how far off their products may be, and what they need; of int32, the number of
each hit among all products; and of int64 (1,), how many there are."""
ROWS, WIDTH, FROM, OUT = range(1, 5)
"""Places in a job of `gathered`: how many rows; bytes of each; addresses of int64 (rows,), where
each of them lies or 0, and of where they go, one after another."""
LANES = 64
"""Vectors of a block."""
BIAS = OFFSET = 128
_PAIRS = 128
"""Of groups whose sums fit into 16 bits."""
_FEW = 16
"""Vectors that are asked together whether any of them may be among the best."""
_NEXT, _COMING = 4, 16
"""How many rows ahead codes are asked for that are multiplied, and rows that are copied."""

_byte, _half, _word, _long = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_longs, _words, _halves = pointer(types.int64), pointer(types.int32), pointer(types.int16)
_floats, _doubles = pointer(types.float32), pointer(types.float64)
_bytes = pointer(types.uint8)


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


@numba.njit
def _sum(job: Any, band: Any, blocks: Any) -> None:
    """What the bits of a band's vectors come to."""
    pairs = job[DIM] // (8 * job[STRIPES])
    for stripe in range(band[LEVEL]):
        weight = 1 << (job[PLANES] - 1 - stripe // job[STRIPES])
        place = band[BITS] + LANES * pairs * blocks * stripe
        tables = job[TABLES] + 32 * pairs * (stripe % job[STRIPES])
        for block in range(blocks):
            for first in range(0, pairs, _PAIRS):
                look_up(
                    place + LANES * (pairs * block + first),
                    tables + 32 * first,
                    min(_PAIRS, pairs - first),
                    job[SUMS] + 4 * LANES * block,
                    weight,
                )


@numba.njit(fastmath=LOOSE)
def _some(sums: Any, gains: Any, rests: Any, size: Any, length: Any, need: Any, start: Any) -> Any:
    """How many of the next bounds reach what is needed."""
    count = 0
    for i in range(start, start + _FEW):
        count += np.float32(sums[i]) * size * gains[i] + rests[i] * length >= need
    return count


@numba.njit
def _passed(job: Any, band: Any, size: Any, length: Any, need: Any, places: Any, end: Any) -> Any:
    """Put the places of a band's vectors whose bounds reach what is needed; where they end."""
    count = band[COUNT]
    blocks = (count + LANES - 1) // LANES
    sums = carray(_words(job[SUMS]), (LANES * blocks,))
    gains = carray(_floats(band[GAINS]), (LANES * blocks,))
    rests = carray(_floats(band[RESTS]), (LANES * blocks,))
    sums[:] = 0
    _sum(job, band, blocks)
    for start in range(0, count, _FEW):
        if _some(sums, gains, rests, size, length, need, start):
            for place in range(start, min(start + _FEW, count)):
                bound = np.float32(sums[place]) * size * gains[place] + rests[place] * length
                if bound >= need:
                    places[end] = place
                    end += 1
    return end


@kernel
def screened(address: Any) -> None:
    """See `curate.bitplanes.Probe.screen`."""
    job = carray(address, (FOUND + 1,), np.int64)
    told = carray(_doubles(job.ctypes.data), (FOUND + 1,))
    size, length = np.float32(told[SIZE]), np.float32(told[LENGTH])
    plan = carray(_longs(job[PLAN]), (job[BANDS], LEAST + 1))
    needs = carray(_floats(job[NEEDS]), (job[BANDS],))
    found, first, dim = 0, 0, job[DIM]
    offset = 0
    whole = carray(_halves(job[WHOLE]), (dim,))
    for i in range(dim):
        offset += OFFSET * whole[i]
    for number in range(job[BANDS]):
        band = plan[number]
        count = band[COUNT]
        places = carray(_words(job[PLACES]), (first + count,))
        dots = carray(_longs(job[DOTS]), (first + count,))
        end = found
        if band[LEVEL] == 0:
            for place in range(count):
                places[end] = place
                end += 1
        else:
            end = _passed(job, band, size, length, needs[number], places, end)
        for hit in range(found, end):
            place = places[hit]
            if hit + _NEXT < end:
                ask_row(band[CODES] + dim * places[hit + _NEXT], dim)
            dot = multiply(band[CODES] + dim * place, job[WHOLE], dim) - offset
            if dot >= band[LEAST]:
                places[found], dots[found] = first + place, dot
                found += 1
        first += count
    carray(_longs(job[FOUND]), (1,))[0] = found


@kernel
def gathered(address: Any) -> None:
    """Copy rows from all over memory; those that are nowhere are left out. A processor waits for
    one after another unless it is asked for several.
    """
    job = carray(address, (OUT + 1,), np.int64)
    rows, width = job[ROWS], job[WIDTH]
    places = carray(_longs(job[FROM]), (rows,))
    for row in range(min(_COMING, rows)):
        ask_row(places[row], width)
    for row in range(rows):
        if row + _COMING < rows:
            ask_row(places[row + _COMING], width)
        if places[row]:
            source = carray(_bytes(places[row]), (width,))
            carray(_bytes(job[OUT] + width * row), (width,))[:] = source


@numba.njit(fastmath=LOOSE)
def _count(products: Any, scale: Any, sizes: Any, far: Any, limits: Any) -> Any:
    """How many of a code's products are large enough."""
    count = 0
    for i in range(sizes.shape[0]):
        count += (np.float32(products[i]) * sizes[i] + far[i]) * scale >= limits[i]
    return count


@kernel
def reached(address: Any) -> None:
    """See `curate.bands.Bands.reached`."""
    job = carray(address, (REACHED + 1,), np.int64)
    codes, queries, found = job[CODED], job[QUERIES], 0
    scales = carray(_floats(job[SCALES]), (codes,))
    sizes = carray(_floats(job[SIZES]), (queries,))
    far, limits = carray(_floats(job[FAR]), (queries,)), carray(_floats(job[LIMITS]), (queries,))
    hits = carray(_words(job[HITS]), (codes * queries,))
    for code in range(codes):
        products = carray(_words(job[PRODUCTS] + 4 * job[APART] * code), (queries,))
        if _count(products, scales[code], sizes, far, limits):
            for i in range(queries):
                if (np.float32(products[i]) * sizes[i] + far[i]) * scales[code] >= limits[i]:
                    hits[found] = queries * code + i
                    found += 1
    carray(_longs(job[REACHED]), (1,))[0] = found
