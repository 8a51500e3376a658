"""What a survey keeps of a block of rows, from the products of its rows with all vectors.

`curate.multiply` writes vectors in digits, whose products with int8 sketches are int32; a survey
(`curate.surveyplan`) joins them to scores, and takes moments and the best rows. In torch that is
two dozen passes over a block, which take as long as the product where that is quick. Here it is
one, by one thread.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba.core import types

from sdi.compiled.turns import LOOSE, carray, kernel, pointer

PARTS, ROWS, SLOTS, COLUMNS, QUERIES, SIZES, UNIT = range(1, 8)
"""Places in a job: P, B, U, C, Q, whether a key is of the scores' sizes, and the bits of a digit's
unit in the digit before it as a float64. Addresses follow."""
PLAN, SHARES, LIMITS, SUMS, HITS, KEYS, SPACE, COUNT = range(8, 16)
"""Of int64 (P, 6), the parts; of float32 (3, C, Q), what early, late and the key take of the
scores; of float32 (Q,), what a key has to exceed; of float64 (3, 2, Q), early's and late's first,
the sum of what the rows are off by from there, and that of its squares; of int32 (B·Q,), the number
of each hit among these; of float32 (B·Q,), their keys; of float32 (3 + C, Q). Last, of int32 (1,):
how many hits there are, or -1 where a score is not finite."""
WHOLE, DIGITS, WIDTH, SCALES, FACTORS, SLOT = range(6)
"""Of a part: the address of its products (B, WIDTH), int32 of vectors in digits, digit by digit, or
float32 where there are none; how many digits; addresses of float32 scales of the vectors and
factors (B,) of the rows; and which slot its vectors are, of C·Q/U each."""

_words, _longs = pointer(types.int32), pointer(types.int64)
_floats, _doubles = pointer(types.float32), pointer(types.float64)
_LARGEST = np.finfo(np.float32).max


@numba.njit(fastmath=LOOSE)
def _join(scores: Any, products: Any, scales: Any, weight: Any) -> None:
    """Add a digit's."""
    for i in range(scores.shape[0]):
        scores[i] += np.float32(products[i]) * (scales[i] * weight)


@numba.njit(fastmath=LOOSE)
def _join_floats(scores: Any, products: Any, factor: Any) -> None:
    for i in range(scores.shape[0]):
        scores[i] += products[i] * factor


@numba.njit
def _part(scores: Any, part: Any, row: int, unit: Any) -> None:
    """Add a part's to a row's scores (slots, vectors)."""
    own, width = scores[part[SLOT]], part[WIDTH]
    count = own.shape[0]
    weight = carray(_floats(part[FACTORS] + 4 * row), (1,))[0]
    place = part[WHOLE] + 4 * width * row
    if part[DIGITS] == 0:
        _join_floats(own, carray(_floats(place), (count,)), weight)
    scales = carray(_floats(part[SCALES]), (count,))
    for digit in range(part[DIGITS]):
        _join(own, carray(_words(place + 4 * count * digit), (count,)), scales, weight)
        weight *= unit


@numba.njit(fastmath=LOOSE)
def _taken(out: Any, scores: Any, shares: Any) -> None:
    """A row's early, late and key, from its scores (C, Q)."""
    out[:] = 0
    for column in range(scores.shape[0]):
        for window in range(3):
            for i in range(out.shape[1]):
                out[window, i] += shares[window, column, i] * scores[column, i]


@numba.njit(fastmath=LOOSE)
def _taken_sizes(key: Any, scores: Any, shares: Any) -> None:
    """The key where it is of the scores' sizes."""
    key[:] = 0
    for column in range(scores.shape[0]):
        for i in range(key.shape[0]):
            key[i] += shares[column, i] * abs(scores[column, i])


@numba.njit(fastmath=LOOSE)
def _add(sums: Any, windows: Any) -> None:
    for window in range(2):
        for i in range(windows.shape[1]):
            off = windows[window, i] - sums[0, window, i]
            sums[1, window, i] += off
            sums[2, window, i] += off * off


@numba.njit(fastmath=LOOSE)
def _over(numbers: Any, limits: Any) -> Any:
    """How many there are over their limits."""
    count = 0
    for i in range(limits.shape[0]):
        count += numbers[i] > limits[i]
    return count


@numba.njit
def _not_finite(numbers: Any) -> Any:
    """How many are NaN or infinite."""
    count = 0
    for window in range(3):
        for i in range(numbers.shape[1]):
            count += not abs(numbers[window, i]) <= _LARGEST
    return count


@kernel
def surveyed(address: Any) -> None:
    """See `curate.surveyplan.Taken`."""
    job = carray(address, (COUNT + 1,), np.int64)
    unit = np.float32(carray(_doubles(job.ctypes.data), (COUNT + 1,))[UNIT])
    rows, columns, queries = job[ROWS], job[COLUMNS], job[QUERIES]
    parts = carray(_longs(job[PLAN]), (job[PARTS], SLOT + 1))
    shares = carray(_floats(job[SHARES]), (3, columns, queries))
    limits = carray(_floats(job[LIMITS]), (queries,))
    sums = carray(_doubles(job[SUMS]), (3, 2, queries))
    hits = carray(_words(job[HITS]), (rows * queries,))
    keys = carray(_floats(job[KEYS]), (rows * queries,))
    space = carray(_floats(job[SPACE]), (3, queries))
    place = job[SPACE] + 12 * queries
    scores = carray(_floats(place), (columns, queries))
    by_slot = carray(_floats(place), (job[SLOTS], columns // job[SLOTS] * queries))
    count, bad = 0, 0
    for row in range(rows):
        scores[:] = 0
        for part in range(job[PARTS]):
            _part(by_slot, parts[part], row, unit)
        _taken(space, scores, shares)
        if job[SIZES]:
            _taken_sizes(space[2], scores, shares[2])
        if row == 0:
            sums[0] = space[:2]
            sums[1:] = 0
        _add(sums, space)
        bad += _not_finite(space)
        if _over(space[2], limits):
            for query in range(queries):
                if space[2, query] > limits[query]:
                    hits[count], keys[count] = row * queries + query, space[2, query]
                    count += 1
    carray(_words(job[COUNT]), (1,))[0] = count if bad == 0 else -1
