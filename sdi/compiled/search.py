"""What a search asks of vectors in memory: first bits, products of codes, and of the sketches.

A search goes down the bands of an index, a piece of a band at a time. The first bits of a piece's
vectors tell which may be among the best (`curate.bitplanes`, `sdi.compiled.lookups`), the codes of
these, multiplied out, which still may, and what is known of them then settles how much of the next
piece has to be read. What is left is multiplied with the sketches themselves.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba.core import types

from sdi.compiled.instructions import ask, ask_row
from sdi.compiled.lookups import LANES, MOST_PAIRS, look_up, multiply
from sdi.compiled.turns import LOOSE, carray, kernel, pointer

BANDS, DIM, PLANES, STRIPES, LIKELY, ROOM, OFFSETS = range(1, 8)
"""Places in a job: how many bands; M; planes, and stripes of each; how many are sought, k; how many
finds there is room for; room for `OFFSET` times the sum of the whole numbers."""
TOLD, RESTS, LOST, SCALES, NORMS, REALS, TABLES, WHOLE = range(8, 16)
"""Addresses of int64 (bands, 5) as below; of float64 (bands,), how far off a product with codes may
be for a query of norm one; of float64 (bands, planes · stripes), the mean of ‖e‖ / ‖v‖ at each
level; of float32, the scale and the norm of each vector of these bands, the longest first; of
float64 (5,) as below; of uint8 tables (M / 4, 16) with `BIAS` added; and of the query in whole
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
SIZE, LENGTH, SHORT, UNIT, LEFT = range(5)
"""Of a query of norm one: what a sum of the tables has to be multiplied with; the norm of what the
tables are of, and of what they leave of the query; what the whole numbers have to be multiplied
with, and the norm of what they leave of it."""
CODED, QUERIES, BETWEEN, PRODUCTS, FACTORS, SIZES, FAR, LIMITS, HITS, REACHED = range(1, 11)
"""Places in a job of `reached`: how many codes and queries; numbers from one code's products to the
next one's; addresses of int32 products, of float32 scales of the codes, of the sizes of the
queries' numbers, how far off their products may be, and what they need; of int32, the number of
each hit among all products; and of int64 (1,), how many there are."""
PAIRS, WIDTH, CHECKPOINTS, FROM, SCALED, ROOTS, SOUGHT, WHICH, VECTOR, OUT = range(1, 11)
"""Places in a job of `settled`: how many pairs of a vector and a query; M; how many checkpoints;
addresses of int64 (checkpoints, pairs) twice, where the int8 sketches lie, or 0, and their float32
scales; of float32 (checkpoints,) what these are multiplied with; of float64 (queries, M), and of
int64 (pairs,), which of these; of room, float32 (M,); and of the products, float64 (pairs,)."""
OFFSET = 128
"""What FAISS adds to a number to store it in a byte."""
_FEW = 16
"""Vectors that are asked together whether any of them may be among the best."""
_NEXT, _COMING = 4, 16
"""How many rows ahead codes are asked for that are multiplied, and sketches that are read."""
PIECE = 2048
"""Vectors of a band that are gone through at once."""
assert PIECE % LANES == 0 and LANES % _FEW == 0
_ROUNDED = 2.0**-16
"""More than float32 rounds off a bound, of the product of both norms."""
_TINY = 1e-30
"""Norms whose bounds in float32 might round by more than that."""
_SCATTERED = 1.5
"""What reading the codes of a vector here and there costs more than reading them in a row."""

_longs, _words, _halves = pointer(types.int64), pointer(types.int32), pointer(types.int16)
_floats, _doubles = pointer(types.float32), pointer(types.float64)
_signed = pointer(types.int8)


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
            for pair in range(0, pairs, MOST_PAIRS):
                look_up(
                    place + LANES * (pairs * block + pair),
                    tables + 32 * pair,
                    min(MOST_PAIRS, pairs - pair),
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
    reals = carray(_doubles(job[REALS]), (LEFT + 1,))
    best = carray(_doubles(job[BEST]), (job[LIKELY],))
    scales = carray(_floats(job[SCALES]), (first + start + count,))
    norms = carray(_floats(job[NORMS]), (first + start + count,))
    room = (job[ROOM],)
    places = carray(_longs(job[PLACES]), room)
    lows, highs = carray(_doubles(job[LOW]), room), carray(_doubles(job[HIGH]), room)
    passed = carray(_words(job[PASSED]), (PIECE,))
    norm = np.float64(norms[first + start])
    need, levels = best[0] - (reals[SHORT] + _ROUNDED) * norm, 0
    if norm > _TINY:
        levels = level(lost, need / norm, dim, dim // (8 * job[STRIPES]))
    codes, offset = band[CODES] + dim * start, job[OFFSETS]
    hits = _passed(job, band, reals, levels, start, count, np.float32(need), passed)
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
    whole = carray(_halves(job[WHOLE]), (dim,))
    job[OFFSETS] = 0
    for i in range(dim):
        job[OFFSETS] += OFFSET * whole[i]
    found, first, number = 0, 0, 0
    while number < bands and told[number, BITS] and found + told[number, COUNT] <= job[ROOM]:
        band = told[number]
        norms = carray(_floats(job[NORMS]), (first + band[COUNT],))
        start = 0
        while start < band[COUNT] and not best[0] >= norms[first + start]:
            found = _found(job, band, rests[number], lost[number], first, start, found)
            start = min(start + PIECE, band[COUNT])
        first += start
        number = number + 1 if start == band[COUNT] else bands
    state = carray(_longs(job[STATE]), (3,))
    state[0], state[1], state[2] = found, number, first


@numba.njit
def _add(vector: Any, values: Any, factor: Any) -> None:
    """Rounded as NumPy rounds it, so that a search finds the same without this."""
    for i in range(vector.shape[0]):
        vector[i] += np.float32(values[i]) * factor


@numba.njit(fastmath=LOOSE)
def _dot(vector: Any, query: Any) -> Any:
    total = 0.0
    for i in range(vector.shape[0]):
        total += np.float64(vector[i]) * query[i]
    return total


@kernel
def settled(address: Any) -> None:
    """See `curate.pooledvectors.PooledVectors.products`. Sketches lie all over memory; a processor
    waits for one after another unless it is asked for several.
    """
    job = carray(address, (OUT + 1,), np.int64)
    pairs, dim = job[PAIRS], job[WIDTH]
    places = carray(_longs(job[FROM]), (job[CHECKPOINTS], pairs))
    scaled = carray(_longs(job[SCALED]), (job[CHECKPOINTS], pairs))
    roots = carray(_floats(job[ROOTS]), (job[CHECKPOINTS],))
    which = carray(_longs(job[WHICH]), (pairs,))
    vector = carray(_floats(job[VECTOR]), (dim,))
    out = carray(_doubles(job[OUT]), (pairs,))
    for pair in range(-_COMING, pairs):
        for checkpoint in range(job[CHECKPOINTS]):
            if pair + _COMING < pairs:
                ask(scaled[checkpoint, pair + _COMING])
                ask_row(places[checkpoint, pair + _COMING], dim)
        if pair >= 0:
            vector[:] = 0
            for checkpoint in range(job[CHECKPOINTS]):
                if places[checkpoint, pair]:
                    values = carray(_signed(places[checkpoint, pair]), (dim,))
                    scale = carray(_floats(scaled[checkpoint, pair]), (1,))[0]
                    _add(vector, values, roots[checkpoint] * scale)
            query = carray(_doubles(job[SOUGHT] + 8 * dim * which[pair]), (dim,))
            out[pair] = _dot(vector, query)


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
