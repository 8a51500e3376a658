"""The sketch of δᵀa in one go, on processors whose registers hold tiles of matrices (AMX).

A tile is 16 rows of 64 bytes; one instruction multiplies two tiles of bfloat16 and adds the product
to a third, of float32. Of an example 32 columns and 32 rows of δᵀa are made at a time, in four
tiles, and added to their buckets from there: δᵀa is never whole in memory, as it is not in the
GPU's kernel. Factors are packed as tiles are read, one after another: of the left one two tokens of
a row lie side by side, of the right one 32 tokens of a column. Packing rounds to bfloat16, adds up
what rounding may be off by, and puts the rows' signs on the left factor; the columns' are put on
where they are added.

A turn is an example, or a range of its columns. Each thread has room of its own to pack to, small
enough for its cache: stretches of tokens are done in turn, and of each blocks of rows.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba.core import types

from sdi.compiled.factors import SIDE
from sdi.compiled.tileinstructions import (
    SPAN,
    TILE,
    add_side,
    add_span,
    begin,
    configure,
    end,
    pack_halves,
    pack_words,
    release,
    step,
    turn_halves,
    turn_words,
)
from sdi.compiled.turns import TURNS, carray, kernel, pointer, turn

BEGUN, EXAMPLES, RANGES, TOKENS, ROWS, COLUMNS, DIM, STRETCH, BLOCK = range(1, 10)
"""Places in a job: counts the threads that began; B; ranges of columns an example; n, R, C, M;
tokens of a stretch and rows of a block, multiples of `SPAN`."""
LEFT, RIGHT = 10, 14
"""The factors, four places each: address, numbers between examples and between tokens, and whether
these are float32 (else bfloat16)."""
STARTS, ROW_SIGN, COLUMN_SIGN, OUT, NOISE, SUMS, CONFIGURATION, ROOMS, SIZE = range(18, 27)
"""Addresses: of int64 (C,), float32 (R,) and (C,); of float32, to be added to, (B, ranges, M),
(B, ranges) and (B, ranges, stretches, R), the last two of which are for float32 factors; of the
tiles' configuration; of the threads' rooms, and a room's bytes."""
PACKED, LENGTHS, SQUARES, PRODUCT, REST, ZEROS = range(27, 33)
"""Where in a room, which begins with the packed right factor: the left one's block; (stretch, 16)
and (stretch,) float32, squared lengths of the left one's tokens in parts, and of the right one's;
the four tiles of two products; (32, C) numbers, the last tokens; and as many zeros as a block has
rows."""
_LENGTH = ZEROS + 1

_places, _floats = pointer(types.int64), pointer(types.float32)


@numba.njit
def _zero(place: Any, count: Any) -> None:
    """So many float32 numbers."""
    numbers = carray(_floats(place), (count,))
    numbers[:] = 0


@numba.njit
def _spans(count: Any) -> Any:
    """How many spans as many tokens or columns are, the last perhaps a part."""
    return (count + SPAN - 1) // SPAN


@numba.njit
def _apart(count: Any) -> Any:
    """Bytes between packed tiles of as many tokens and those of the next rows or columns: a line of
    a cache more than there are, for a power of two would put all in the same few places of it.
    """
    return _spans(count) * TILE + 64


@numba.njit
def _given(job: Any, factor: Any, example: Any, token: Any) -> Any:
    """Where a factor's token is, the bytes to the next token, and those of a number."""
    size = 4 if job[factor + 3] else 2
    apart = size * job[factor + 2]
    return job[factor] + size * example * job[factor + 1] + token * apart, apart, size


@numba.njit
def _pack_left(
    job: Any, room: Any, example: Any, token: Any, count: Any, row: Any, summed: Any
) -> None:
    """A block of rows from `row` on, of `count` tokens from `token` on; sums go to `summed`."""
    start, apart, size = _given(job, LEFT, example, token)
    source = start + size * row
    tiles = min(job[BLOCK], job[ROWS] - row) // SIDE
    signs, sums = job[ROW_SIGN] + 4 * row, summed + 4 * row
    for first in range(0, _spans(count) * SPAN, 2):
        one = source + apart * first if first < count else room + job[ZEROS]
        two = source + apart * (first + 1) if first + 1 < count else room + job[ZEROS]
        target = room + job[PACKED] + TILE * (first // SPAN) + 32 * (first % SPAN)
        lengths = room + job[LENGTHS] + 64 * first
        if job[LEFT + 3]:
            pack_words(one, two, target, _apart(count), signs, lengths, sums, tiles)
        else:
            pack_halves(one, two, target, _apart(count), signs, lengths, sums, tiles)


@numba.njit
def _pack_right(
    job: Any, room: Any, example: Any, token: Any, count: Any, column: Any, last: Any
) -> None:
    """Columns from `column` to `last`, of `count` tokens from `token` on."""
    start, apart, size = _given(job, RIGHT, example, token)
    source, width = start + size * column, last - column
    for first in range(0, count, SPAN):
        place, between = source + apart * first, apart
        if first + SPAN > count:  # the last ones, and zeros
            between = size * width
            place = _copied(job, room, place, count - first, between, apart)
        squares = room + job[SQUARES] + 4 * first
        for own in range(0, width, SIDE):
            target = room + _apart(count) * (own // SIDE) + TILE * (first // SPAN)
            if job[RIGHT + 3]:
                turn_words(place + size * own, between, target, squares)
            else:
                turn_halves(place + size * own, between, target, squares)


@numba.njit
def _copied(job: Any, room: Any, source: Any, count: Any, size: Any, apart: Any) -> Any:
    """Where `count` tokens of so many bytes lie with zeros behind them, `SPAN` of them."""
    place = room + job[REST]
    _zero(place, SPAN * size // 4)
    for token in range(count):
        given = carray(_floats(source + apart * token), (size // 4,))
        carray(_floats(place + size * token), (size // 4,))[:] = given
    return place


@numba.njit
def _add(job: Any, out: Any, product: Any, row: Any, rows: Any, column: Any, columns: Any) -> None:
    """Add a product's rows and columns to their buckets."""
    dim = job[DIM]
    starts = carray(_places(job[STARTS]), (job[COLUMNS],))
    signs = carray(_floats(job[COLUMN_SIGN]), (job[COLUMNS],))
    for own in range(columns):
        bucket, sign = starts[column + own] + row, signs[column + own]
        bucket -= dim if bucket >= dim else 0
        source = product + 4 * SPAN * own
        if bucket + rows <= dim:
            if rows == SPAN:
                add_span(out + 4 * bucket, source, sign)
            else:
                add_side(out + 4 * bucket, source, sign)
        else:
            buckets = carray(_floats(out), (dim,))
            numbers = carray(_floats(source), (rows,))
            for i in range(rows):
                buckets[(bucket + i) % dim] += numbers[i] * sign


@numba.njit
def _multiply(job: Any, room: Any, out: Any, count: Any, row: Any, column: Any, last: Any) -> None:
    """Columns from `column` to `last` times a packed block of rows from `row` on."""
    steps = _spans(count)
    rows = min(job[BLOCK], job[ROWS] - row)
    far = _apart(count)
    product, other_product = room + job[PRODUCT], room + job[PRODUCT] + 4 * TILE
    waiting, before = False, (row, 0, column, 0)
    for across in range(0, last - column, SPAN):
        columns = min(SPAN, last - column - across)
        upper = room + far * (across // SIDE)
        lower = upper + far if columns > SIDE else upper
        for down in range(0, rows, SPAN):
            height = min(SPAN, rows - down)
            near = room + job[PACKED] + far * (down // SIDE)
            other = near + far if height > SIDE else near
            begin()
            for number in range(steps):
                at = TILE * number
                step(upper + at, lower + at, near + at, other + at)
            if waiting:  # while the tiles are busy
                _add(job, out, other_product, *before)
            product, other_product = other_product, product
            end(other_product, 4 * SPAN)
            before = (row + down, height, column + across, columns)
            waiting = True
    if waiting:
        _add(job, out, other_product, *before)


@numba.njit
def _noise(job: Any, room: Any, count: Any) -> Any:
    """Σ over the stretch's tokens of both squared lengths, multiplied."""
    parts = carray(_floats(room + job[LENGTHS]), (count, SIDE))
    squares = carray(_floats(room + job[SQUARES]), (job[STRETCH],))
    total = np.float32(0)
    for token in range(count):
        length = np.float32(0)
        for part in range(SIDE):
            length += parts[token, part]
        own = token % SPAN
        total += length * squares[token - own + own % 2 * SIDE + own // 2]
    return total


@numba.njit
def _range(job: Any, room: Any, example: Any, number: Any) -> None:
    """A range of an example's columns."""
    spans = _spans(job[COLUMNS])
    column = SPAN * (spans * number // job[RANGES])
    last = min(job[COLUMNS], SPAN * (spans * (number + 1) // job[RANGES]))
    place = example * job[RANGES] + number
    out = job[OUT] + 4 * job[DIM] * place
    stretches = (job[TOKENS] + job[STRETCH] - 1) // job[STRETCH]
    for stretch in range(stretches):
        token = stretch * job[STRETCH]
        summed = job[SUMS] + 4 * job[ROWS] * (place * stretches + stretch)
        count = min(job[STRETCH], job[TOKENS] - token)
        _zero(room + job[LENGTHS], SIDE * job[STRETCH])
        _zero(room + job[SQUARES], job[STRETCH])
        _pack_right(job, room, example, token, count, column, last)
        for row in range(0, job[ROWS], job[BLOCK]):
            _pack_left(job, room, example, token, count, row, summed)
            _multiply(job, room, out, count, row, column, last)
        if job[NOISE]:
            carray(_floats(job[NOISE]), (place + 1,))[place] += _noise(job, room, count)


@kernel
def sketched(address: Any) -> None:
    """See `sdi.sketch.tiles`; a turn is a range of an example's columns."""
    job = carray(address, (_LENGTH,), np.int64)
    room = job[ROOMS] + job[SIZE] * turn(address, BEGUN)
    _zero(room + job[ZEROS], job[BLOCK])
    configure(job[CONFIGURATION])
    number = turn(address, TURNS)
    while number < job[EXAMPLES] * job[RANGES]:
        _range(job, room, number // job[RANGES], number % job[RANGES])
        number = turn(address, TURNS)
    release()
