"""Products of int8 rows with vectors, exact in int32, in tile registers (AMX).

A tile is 16 rows of 64 bytes; one instruction multiplies two tiles of int8 and adds to a third, of
int32. Vectors are packed once, four numbers of each side by side (`curate.multiply`); rows are
copied to a thread's room some dozens at a time, since as they lie the same column of all of them
falls into one place of a cache. Of these, stretches of columns are multiplied in turn, for what is
read again and again to be in the nearest cache.

A turn is `CHUNK` rows.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from sdi.compiled.factors import SIDE
from sdi.compiled.tileinstructions import (
    SPAN,
    TILE,
    begin,
    byte_step,
    configure,
    copy_line,
    end,
    release,
    resume,
)
from sdi.compiled.turns import TURNS, carray, kernel, turn

BEGUN, ROWS, DIM, WIDTH, FACTOR, APART, FLIPS = range(1, 8)
"""Places in a job: counts the threads that began; R, M (a multiple of `LINE`), the number of
vectors with those that fill up to a multiple of `SPAN`; address of int8 (R, M), `APART` bytes from
row to row, and which bits of each four bytes are to be flipped."""
PACKED, OUT, CONFIGURATION, ROOMS, SIZE = range(8, 13)
"""Addresses of the packed vectors, of int32 (R, WIDTH), of the tiles' configuration, of the
threads' rooms, (CHUNK, M) bytes, and a room's size."""
LINE = 64
"""Numbers of a row of a tile."""
CHUNK = 4 * SPAN
"""Rows that are copied at once."""
_DEEP = 8
"""Tiles of a stretch."""


@numba.njit
def _copy(job: Any, room: Any, first: Any, tiles: Any) -> None:
    """Rows from `first` on as tiles; the last one again where there are no more."""
    for own in range(CHUNK):
        row = min(first + own, job[ROWS] - 1)
        source = job[FACTOR] + job[APART] * row
        target = room + TILE * tiles * (own // SIDE) + LINE * (own % SIDE)
        for tile in range(tiles):
            copy_line(source + LINE * tile, target + TILE * tile, job[FLIPS])


@numba.njit
def _multiply(job: Any, room: Any, first: Any, tiles: Any) -> None:
    """A chunk of rows, with all vectors."""
    line, far = 4 * job[WIDTH], TILE * tiles
    groups = (min(CHUNK, job[ROWS] - first) + SPAN - 1) // SPAN
    for begun in range(0, tiles, _DEEP):
        last = min(tiles, begun + _DEEP)
        for vector in range(0, job[WIDTH], SPAN):
            near = job[PACKED] + far * (vector // SIDE)
            for group in range(groups):
                out = job[OUT] + line * (first + SPAN * group) + 4 * vector
                upper = room + far * (2 * group)
                if begun:
                    resume(out, line)
                else:
                    begin()
                for tile in range(begun, last):
                    at = TILE * tile
                    byte_step(upper + at, upper + far + at, near + at, near + far + at)
                end(out, line)


@kernel
def multiplied(address: Any) -> None:
    """See `curate.multiply.Operand.products`; `OUT` has room for whole spans of rows."""
    job = carray(address, (SIZE + 1,), np.int64)
    room = job[ROOMS] + job[SIZE] * turn(address, BEGUN)
    tiles = job[DIM] // LINE
    configure(job[CONFIGURATION])
    number = turn(address, TURNS)
    while CHUNK * number < job[ROWS]:
        _copy(job, room, CHUNK * number, tiles)
        _multiply(job, room, CHUNK * number, tiles)
        number = turn(address, TURNS)
    release()
