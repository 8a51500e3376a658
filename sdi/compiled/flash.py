"""Attention, softmax(scale·Q·Kᵀ + mask)·V, of one head after another, and its gradient; float32.

How it works. `LANES` queries at a time: their scores with every key are one matrix (keys, queries),
so that a vector holds one key's scores, and maxima, sums and the softmax run over the queries of a
vector without ever adding across it. Keys after a block of causal queries are left out. What the
gradient needs of the softmax is made anew from the scores and the logarithm of their sum (Dao et
al., FlashAttention, 2022, algorithm 4).

Why not torch's kernel for CPUs: it multiplies blocks through a library whose calls cost more than
such blocks, and gains little from a second core. What this gives up: dropout, second derivatives,
and blocks of keys: heads whose keys and values exceed the cache are read anew by every block of
queries.

Letters: B rows, H heads, T queries, N keys, D width of a head. Copies are padded to whole tiles.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba.core import types
from numpy.lib.stride_tricks import as_strided

from sdi.compiled.turns import TURNS, carray, kernel, pointer, turn
from sdi.compiled.vectors import (
    LANES,
    add,
    add_along,
    add_collected,
    add_down,
    exponential,
    filled,
    kept_from,
    larger,
    largest,
    load,
    load_tile,
    multiply,
    store,
    store_tile,
    subtract,
    transposed,
    zeros,
)

THREADS, SCRATCH, ROWS, HEADS, QUERIES, KEYS, WIDTH, CAUSAL, SCALE, OPERANDS = range(1, 11)
"""Places in a job: how many threads have begun, the address of `room` floats for each of them,
B, H, T, N, D, whether causal, the scale (float64), and the operands."""
QUERY, KEY, VALUE, MASK, OUTPUT, LOGARITHM, DELTA, OF_QUERY, OF_KEY, OF_VALUE = range(10)
"""The operands, four numbers each: the address, 0 for none, and bytes along B, H and T or N."""
_LENGTH = OPERANDS + 4 * 10

_floats = pointer(types.float32)
_INFINITY, _LEAST = np.float32(np.inf), np.finfo(np.float32).min
_ZERO, _ONE = np.float32(0), np.float32(1)


@numba.njit
def _whole(count: Any) -> Any:
    """A number of rows or columns, padded to whole tiles."""
    return -(-count // LANES) * LANES


@numba.njit
def _room(keys: Any, depth: Any, both: Any) -> Any:
    wide, long = _whole(depth), _whole(keys)
    of_keys, of_queries = (1 + both) * long * (2 * wide + LANES), (3 + 2 * both) * LANES * wide
    return of_keys + of_queries + LANES * LANES


def room(keys: int, depth: int, *, backward: bool) -> int:
    """Floats of scratch memory that each thread of a kernel needs."""
    return int(_room.py_func(keys, depth, int(backward)))


@numba.njit
def _scratch(address: Any, job: Any, both: Any) -> Any:
    """A thread's own memory, undefined: for forward, or with `both` for backward, several each of

    (N, D), (N, LANES), (LANES, D) and (D, LANES); and one (LANES, LANES).
    """
    keys, depth = job[KEYS], job[WIDTH]
    wide, long = _whole(depth), _whole(keys)
    at = job[SCRATCH] + 4 * turn(address, THREADS) * _room(keys, depth, both)
    whole, at = _carved(at, 2 + 2 * both, long, wide)
    scores, at = _carved(at, 1 + both, long, LANES)
    queries, at = _carved(at, 2 + both, LANES, wide)
    turned, at = _carved(at, 1 + both, wide, LANES)
    blocks, at = _carved(at, 1, LANES, LANES)
    return whole, scores, queries, turned, blocks[0]


@numba.njit
def _carved(start: Any, count: Any, rows: Any, columns: Any) -> Any:
    """(count, rows, columns) of scratch memory, and the address after them."""
    return carray(_floats(start), (count, rows, columns)), start + 4 * count * rows * columns


@numba.njit
def _head(job: Any, operand: Any, number: Any, rows: Any, columns: Any) -> Any:
    """(rows, columns) of an operand at one head."""
    at = OPERANDS + 4 * operand
    row, head = number // job[HEADS], number % job[HEADS]
    start = job[at] + row * job[at + 1] + head * job[at + 2]
    return as_strided(carray(_floats(start), (1,)), (rows, columns), (job[at + 3], 4))


@numba.njit
def _read(target: Any, source: Any, first: Any, count: Any) -> None:
    """Some rows of an operand; zeros beside and below them."""
    columns = source.shape[1]
    whole = columns // LANES * LANES
    for row in range(count):
        for column in range(0, whole, LANES):
            store(target, row, column, load(source, first + row, column))
        for column in range(whole, columns):
            target[row, column] = source[first + row, column]
        target[row, columns:] = 0
    target[count:] = 0


@numba.njit
def _write(target: Any, first: Any, source: Any, count: Any, factor: Any) -> None:
    """Rows of an operand from `first` on, times a factor."""
    columns = target.shape[1]
    whole = columns // LANES * LANES
    for row in range(count):
        for column in range(0, whole, LANES):
            vector = multiply(load(source, row, column), filled(factor))
            store(target, first + row, column, vector)
        for column in range(whole, columns):
            target[first + row, column] = source[row, column] * factor


@numba.njit
def _turn(target: Any, source: Any, factor: Any) -> None:
    """The transpose of `LANES` rows, times a factor."""
    for column in range(0, source.shape[1], LANES):
        store_tile(target, column, 0, transposed(load_tile(source, 0, column)))
    for row in range(target.shape[0]):
        store(target, row, 0, multiply(load(target, row, 0), filled(factor)))


@numba.njit
def _multiply(out: Any, left: Any, right: Any, rows: Any, depth: Any) -> None:
    """Rows of left (·, depth) · right (depth, LANES), in whole tiles."""
    for row in range(0, rows, LANES):
        sums = zeros()
        for d in range(depth):
            sums = add_down(sums, left, row, d, load(right, d, 0))
        store_tile(out, row, 0, sums)


@numba.njit
def _mix(out: Any, shares: Any, values: Any, rows: Any) -> None:
    """sharesᵀ (LANES, rows) · values (rows, ·)."""
    for column in range(0, values.shape[1], LANES):
        sums = zeros()
        for row in range(rows):
            sums = add_along(sums, shares, row, load(values, row, column))
        store_tile(out, 0, column, sums)


@numba.njit
def _collect(out: Any, shares: Any, values: Any, rows: Any) -> None:
    """Add shares (rows, LANES) · values (LANES, ·)."""
    for column in range(0, values.shape[1], LANES):
        tile = load_tile(values, 0, column)
        for row in range(rows):
            store(out, row, column, add_collected(load(out, row, column), shares, row, tile))


@numba.njit
def _scores(
    out: Any, job: Any, number: Any, first: Any, count: Any, key: Any, turned: Any, block: Any
) -> Any:
    """Scores of a block of queries, turned (D, LANES), with as many keys as one of them may see."""
    keys = job[KEYS]
    if job[OPERANDS + 4 * MASK]:
        mask = _head(job, MASK, number, job[QUERIES], keys)
        seen = _seen(mask, first, count)
        _multiply(out, key, turned, seen, job[WIDTH])
        _mask(out, mask, first, count, seen, block)
    else:
        seen = min(keys, first + count) if job[CAUSAL] else keys
        _multiply(out, key, turned, seen, job[WIDTH])
    return seen


@numba.njit
def _seen(mask: Any, first: Any, count: Any) -> Any:
    """How many keys there are up to the last vector of them that is masked for every query."""
    seen = mask.shape[1]
    while seen >= LANES:
        most = filled(-_INFINITY)
        for row in range(first, first + count):
            most = larger(most, load(mask, row, seen - LANES))
        if largest(most) != -_INFINITY:
            break
        seen -= LANES
    return seen


@numba.njit
def _mask(scores: Any, mask: Any, first: Any, count: Any, seen: Any, block: Any) -> None:
    """Add a mask (T, N), turned, to the scores (N, LANES) of the queries from `first` on."""
    for key in range(0, seen, LANES):
        keys = min(LANES, seen - key)
        if keys == LANES and count == LANES:
            tile = load_tile(mask, first, key)
        else:
            block[:] = 0
            for row in range(count):
                for column in range(keys):
                    block[row, column] = mask[first + row, key + column]
            tile = load_tile(block, 0, 0)
        store_tile(block, 0, 0, transposed(tile))
        for row in range(keys):
            store(scores, key + row, 0, add(load(scores, key + row, 0), load(block, row, 0)))


@numba.njit
def _softmax(scores: Any, seen: Any, diagonal: Any, found: Any) -> None:
    """Exponentials in place of scores; the logarithms of their sums in found[0], 1/sums in [1].

    Key `diagonal` + l is the last that query l sees. A query that sees none has zeros throughout.
    """
    for key in range(diagonal + 1, seen):
        store(scores, key, 0, kept_from(load(scores, key, 0), key - diagonal, -_INFINITY))
    most = filled(_LEAST)
    for key in range(seen):
        most = larger(most, load(scores, key, 0))
    total = filled(_ZERO)
    for key in range(seen):
        share = exponential(subtract(load(scores, key, 0), most))
        store(scores, key, 0, share)
        total = add(total, share)
    store(found, 0, 0, most)
    store(found, 1, 0, total)
    for lane in range(LANES):
        if found[1, lane] == 0:
            found[0, lane] = 0
        else:
            found[0, lane] += np.log(found[1, lane])
            found[1, lane] = _ONE / found[1, lane]


@numba.njit
def _change(shares: Any, changes: Any, seen: Any, diagonal: Any, known: Any) -> None:
    """Shares p in place of scores, and p·(change − δ) in place of the changes of shares.

    known[0] are the logarithms of the queries' sums, known[1] their δ = Σ output · gradient.
    """
    logarithm, own = load(known, 0, 0), load(known, 1, 0)
    for key in range(seen):
        share = exponential(subtract(load(shares, key, 0), logarithm))
        if key > diagonal:
            share = kept_from(share, key - diagonal, _ZERO)
        store(shares, key, 0, share)
        store(changes, key, 0, multiply(share, subtract(load(changes, key, 0), own)))


@numba.njit(fastmath={"contract", "reassoc"})
def _dot(left: Any, right: Any) -> Any:
    """Of two contiguous vectors."""
    total = _ZERO
    for column in range(len(left)):
        total += left[column] * right[column]
    return total


@kernel
def forward(address: Any) -> None:
    """OUTPUT (B, H, T, D), and LOGARITHM (B, H, T, 1), that of the sums of exponentials."""
    job = carray(address, (_LENGTH,))
    queries, keys, depth = job[QUERIES], job[KEYS], job[WIDTH]
    scale = np.float32(job.view(np.float64)[SCALE])
    whole, scored, of_queries, turns, block = _scratch(address, job, 0)
    key, value, scores, turned = whole[0], whole[1], scored[0], turns[0]
    own, mixed = of_queries[0], of_queries[1]
    number = turn(address, TURNS)
    while number < job[ROWS] * job[HEADS]:
        _read(key, _head(job, KEY, number, keys, depth), 0, keys)
        _read(value, _head(job, VALUE, number, keys, depth), 0, keys)
        output = _head(job, OUTPUT, number, queries, depth)
        logarithm = _head(job, LOGARITHM, number, queries, 1)
        for first in range(0, queries, LANES):
            count = min(LANES, queries - first)
            _read(own, _head(job, QUERY, number, queries, depth), first, count)
            _turn(turned, own, scale)
            seen = _scores(scores, job, number, first, count, key, turned, block)
            _softmax(scores, seen, first if job[CAUSAL] else keys, block)
            _mix(mixed, scores, value, seen)
            for row in range(count):
                logarithm[first + row, 0] = block[0, row]
                _write(output, first + row, mixed[row:], 1, block[1, row])
        number = turn(address, TURNS)


@kernel
def backward(address: Any) -> None:
    """OF_QUERY, OF_KEY and OF_VALUE, the gradients of Σ DELTA · OUTPUT."""
    job = carray(address, (_LENGTH,))
    queries, keys, depth = job[QUERIES], job[KEYS], job[WIDTH]
    scale = np.float32(job.view(np.float64)[SCALE])
    whole, scored, of_queries, turns, block = _scratch(address, job, 1)
    key, value, of_key, of_value = whole[0], whole[1], whole[2], whole[3]
    shares, changes, turned, changed = scored[0], scored[1], turns[0], turns[1]
    own, delta, mixed = of_queries[0], of_queries[1], of_queries[2]
    number = turn(address, TURNS)
    while number < job[ROWS] * job[HEADS]:
        _read(key, _head(job, KEY, number, keys, depth), 0, keys)
        _read(value, _head(job, VALUE, number, keys, depth), 0, keys)
        of_key[:], of_value[:] = 0, 0
        logarithm = _head(job, LOGARITHM, number, queries, 1)
        for first in range(0, queries, LANES):
            count = min(LANES, queries - first)
            _read(own, _head(job, QUERY, number, queries, depth), first, count)
            _read(delta, _head(job, DELTA, number, queries, depth), first, count)
            _read(mixed, _head(job, OUTPUT, number, queries, depth), first, count)
            _turn(turned, own, scale)
            _turn(changed, delta, _ONE)
            seen = _scores(shares, job, number, first, count, key, turned, block)
            _multiply(changes, value, changed, seen, depth)
            for row in range(LANES):
                block[0, row] = logarithm[first + row, 0] if row < count else _INFINITY
                block[1, row] = _dot(mixed[row], delta[row])
            _change(shares, changes, seen, first if job[CAUSAL] else keys, block)
            _collect(of_value, shares, delta, seen)
            _collect(of_key, changes, own, seen)
            _mix(mixed, changes, key, seen)
            _write(_head(job, OF_QUERY, number, queries, depth), first, mixed, count, scale)
        _write(_head(job, OF_KEY, number, keys, depth), 0, of_key, keys, scale)
        _write(_head(job, OF_VALUE, number, keys, depth), 0, of_value, keys, _ONE)
        number = turn(address, TURNS)
