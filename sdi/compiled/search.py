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

BANDS, DIM, PLANES, STRIPES, LIKELY, ROOM, OFFSETS = range(1, 8)
"""Places in a job: how many bands; M; planes, and stripes of each; how many are sought, k; how many
finds there is room for; room for `OFFSET` times the sum of the whole numbers."""
TOLD, RESTS, LOST, SCALES, NORMS, REALS, TABLES, WHOLE = range(8, 16)
"""Addresses of int64 (bands, 5) as below; of float64 (bands,), how far off a product with codes may
be for a query of norm one; of float64 (bands, planes · stripes), the mean of ‖e‖ / ‖v‖ at each
level; of float32, the scale and the norm of each vector of these bands, the longest first; of
float64 (6,) as below; of uint8 tables (M / 4, 16) with `BIAS` added; and of the query in whole
numbers, int16 (M,)."""
SUMS, PASSED, BEST, PLACES, LOW, HIGH, STATE = range(16, 23)
"""Addresses of room: int32, a sum and a place for each vector of `PIECE`; of float64 (k,), the
largest lower bounds that are known, smallest first; of int64, the places of what was found, counted
from the first band's first vector on, and float64, the bounds on their products; and of int64 (3,):
how many there are, how many bands were gone through, and how many vectors were seen."""
BITS, GAINS, CODES, COUNT, APART = range(5)
"""Of a band: addresses of its bits, (planes, stripes, blocks, M / 8 / stripes, LANES) bytes, of the
float32 gains and rests of all levels, in whole blocks, and of its codes, uint8 (count, M) with
`OFFSET` added; how many vectors; bytes of a level's gains. Zeros where it is not open."""
SIZE, LENGTH, SHORT, UNIT, LEFT, THERE, LAST = range(7)
"""Of a query of norm one: what a sum of the tables has to be multiplied with; the norm of what the
tables are of, and of what they leave of the query; what the whole numbers have to be multiplied
with, and the norm of what they leave of it; 0 where it is no query but zero, or else 1."""
CODED, QUERIES, BETWEEN, PRODUCTS, FACTORS, SIZES, FAR, LIMITS, HITS, REACHED = range(1, 11)
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
PIECE = 2048
"""Vectors of a band that are gone through at once, in whole blocks."""
_ROUNDED = 2.0**-16
"""More than float32 rounds off a bound, of the product of both norms."""
_TINY = 1e-30
"""Norms whose bounds in float32 might round by more than that."""
_SCATTERED = 1.5
"""What reading the codes of a vector here and there costs more than reading them in a row."""

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
def level(lost: Any, room: Any, dim: Any, size: Any) -> Any:
    """The level that costs least, 0 where reading all codes does.

    Products are taken to be normal, of a variance of 1/M: those of vectors without a direction in
    common. Where they are not, too many pass, which costs time alone.

    Args:
        lost: ‖e‖ / ‖v‖ at each level.
        room: what a bound has to reach, in norms of the longest vector.
        size: bytes of a vector's bits in a stripe.
    """
    cheapest, found = float(dim), 0
    for number in range(lost.shape[0]):
        over = room - lost[number]
        passed = np.exp(-0.5 * dim * over * over) if over > 0 else 1.0
        cost = (number + 1) * size + _SCATTERED * dim * passed
        if cost < cheapest:
            cheapest, found = cost, number + 1
    return found


@numba.njit
def _sum(job: Any, band: Any, levels: Any, start: Any, count: Any) -> None:
    """What the bits of some vectors of a band come to."""
    pairs = job[DIM] // (8 * job[STRIPES])
    blocks, first = (band[COUNT] + LANES - 1) // LANES, start // LANES
    for stripe in range(levels):
        weight = 1 << (job[PLANES] - 1 - stripe // job[STRIPES])
        place = band[BITS] + LANES * pairs * (blocks * stripe + first)
        tables = job[TABLES] + 32 * pairs * (stripe % job[STRIPES])
        for block in range((count + LANES - 1) // LANES):
            for pair in range(0, pairs, _PAIRS):
                look_up(
                    place + LANES * (pairs * block + pair),
                    tables + 32 * pair,
                    min(_PAIRS, pairs - pair),
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
def _passed(
    job: Any, band: Any, reals: Any, levels: Any, start: Any, count: Any, need: Any, passed: Any
) -> Any:
    """Put the places of some vectors of a band whose bounds reach what is needed; how many."""
    if levels == 0:
        for place in range(count):
            passed[place] = place
        return count
    blocks = (count + LANES - 1) // LANES
    place = band[GAINS] + 2 * band[APART] * (levels - 1) + 4 * start
    gains = carray(_floats(place), (LANES * blocks,))
    rests = carray(_floats(place + band[APART]), (LANES * blocks,))
    sums = carray(_words(job[SUMS]), (LANES * blocks,))
    sums[:] = 0
    _sum(job, band, levels, start, count)
    size, length, end = np.float32(reals[SIZE]), np.float32(reals[LENGTH]), 0
    for first in range(0, count, _FEW):
        if _some(sums, gains, rests, size, length, need, first):
            for place in range(first, min(first + _FEW, count)):
                bound = np.float32(sums[place]) * size * gains[place] + rests[place] * length
                if bound >= need:
                    passed[end] = place
                    end += 1
    return end


@numba.njit
def _replace(best: Any, low: Any) -> None:
    """Take a bound in the place of the smallest; the smaller of what two places hold lies before
    them.
    """
    place, size = 0, best.shape[0]
    while 2 * place + 1 < size:
        child = 2 * place + 1
        if child + 1 < size and best[child + 1] < best[child]:
            child += 1
        if best[child] >= low:
            break
        best[place] = best[child]
        place = child
    best[place] = low


@numba.njit
def _found(job: Any, band: Any, rest: Any, lost: Any, first: Any, start: Any, found: Any) -> Any:
    """Put what could be among the best of a piece of a band that begins with vector `first`, after
    what was found before; how many there are then.
    """
    dim, count = job[DIM], min(PIECE, band[COUNT] - start)
    reals = carray(_doubles(job[REALS]), (LAST,))
    best = carray(_doubles(job[BEST]), (job[LIKELY],))
    scales = carray(_floats(job[SCALES]), (first + start + count,))
    norms = carray(_floats(job[NORMS]), (first + start + count,))
    room = (job[ROOM],)
    places = carray(_longs(job[PLACES]), room)
    lows, highs = carray(_doubles(job[LOW]), room), carray(_doubles(job[HIGH]), room)
    passed = carray(_words(job[PASSED]), (PIECE,))
    norm = np.float64(norms[first + start])
    need, levels = best[0] - (reals[SHORT] + _ROUNDED) * norm, 0
    if 0 < best[0] < np.inf and norm > _TINY:
        levels = level(lost, need / norm, dim, dim // (8 * job[STRIPES]))
    wanted = np.float32(need - abs(need) * _ROUNDED)
    codes, offset = band[CODES] + dim * start, job[OFFSETS]
    hits = _passed(job, band, reals, levels, start, count, wanted, passed)
    for hit in range(hits):
        place = passed[hit]
        if hit + _NEXT < hits:
            ask_row(codes + dim * passed[hit + _NEXT], dim)
        own = first + start + place
        scale = np.float64(scales[own])
        dot = (multiply(codes + dim * place, job[WHOLE], dim) - offset) * reals[UNIT] * scale
        off = rest * (1 + reals[LEFT]) * scale + reals[LEFT] * norms[own]
        if dot + off >= best[0]:
            places[found], lows[found], highs[found] = own, dot - off, dot + off
            found += 1
            if dot - off > best[0]:
                _replace(best, dot - off)
    return found


@kernel
def screened(address: Any) -> None:
    """See `curate.bitplanes.Probe.screen`."""
    job = carray(address, (STATE + 1,), np.int64)
    bands, dim = job[BANDS], job[DIM]
    told = carray(_longs(job[TOLD]), (bands, APART + 1))
    rests = carray(_doubles(job[RESTS]), (bands,))
    lost = carray(_doubles(job[LOST]), (bands, job[PLANES] * job[STRIPES]))
    best = carray(_doubles(job[BEST]), (job[LIKELY],))
    there = carray(_doubles(job[REALS]), (LAST,))[THERE]
    whole = carray(_halves(job[WHOLE]), (dim,))
    job[OFFSETS] = 0
    for i in range(dim):
        job[OFFSETS] += OFFSET * whole[i]
    found, first, number = 0, 0, 0
    while number < bands and told[number, BITS] and found + told[number, COUNT] <= job[ROOM]:
        band = told[number]
        norms = carray(_floats(job[NORMS]), (first + band[COUNT],))
        start = 0
        while start < band[COUNT] and not best[0] >= there * norms[first + start]:
            found = _found(job, band, rests[number], lost[number], first, start, found)
            start = min(start + PIECE, band[COUNT])
        first += start
        number = number + 1 if start == band[COUNT] else bands
    state = carray(_longs(job[STATE]), (3,))
    state[0], state[1], state[2] = found, number, first


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
    scales = carray(_floats(job[FACTORS]), (codes,))
    sizes = carray(_floats(job[SIZES]), (queries,))
    far, limits = carray(_floats(job[FAR]), (queries,)), carray(_floats(job[LIMITS]), (queries,))
    hits = carray(_words(job[HITS]), (codes * queries,))
    for code in range(codes):
        products = carray(_words(job[PRODUCTS] + 4 * job[BETWEEN] * code), (queries,))
        if _count(products, scales[code], sizes, far, limits):
            for i in range(queries):
                if (np.float32(products[i]) * sizes[i] + far[i]) * scales[code] >= limits[i]:
                    hits[found] = queries * code + i
                    found += 1
    carray(_longs(job[REACHED]), (1,))[0] = found
