"""Gradients of a normalisation's gain and bias, one pass over memory."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba.core import types

from sdi.compiled.adds import widened
from sdi.compiled.turns import LOOSE, TURNS, carray, kernel, pointer, turn

EXAMPLES, TOKENS, COLUMNS, HALF, CENTRED, EPSILON, DELTA, INPUTS, GAIN, BIAS = range(1, 11)
"""Places in a job: B, n, C, whether numbers are bfloat16 (else float32), whether the inputs' mean
is taken off, the bits of ε as a float64, and addresses: of δ and the inputs, (B, n, C) each one
number after another, and of float32 zeros (B, blocks, C), for both gradients' sums over a block."""
_LENGTH = BIAS + 1
BLOCK = 256
"""Tokens a turn; float32 sums over more would lose digits."""

_halves, _floats, _doubles = map(pointer, (types.uint16, types.float32, types.float64))


@numba.njit(fastmath=LOOSE)
def _mean(numbers: Any) -> Any:
    total = np.float32(0)
    for i in range(numbers.shape[0]):
        total += widened(numbers[i])
    return total / np.float32(numbers.shape[0])


@numba.njit(fastmath=LOOSE)
def _variance(numbers: Any, mean: Any) -> Any:
    total = np.float32(0)
    for i in range(numbers.shape[0]):
        off = widened(numbers[i]) - mean
        total += off * off
    return total / np.float32(numbers.shape[0])


@numba.njit(fastmath=LOOSE)
def _add(gain: Any, bias: Any, delta: Any, inputs: Any, mean: Any, factor: Any) -> None:
    for i in range(gain.shape[0]):
        each = widened(delta[i])
        gain[i] += each * ((widened(inputs[i]) - mean) * factor)
        bias[i] += each


@numba.njit
def _block(delta: Any, inputs: Any, gain: Any, bias: Any, centred: Any, epsilon: Any) -> None:
    """`delta`, `inputs`: (n, C)."""
    for t in range(delta.shape[0]):
        mean = _mean(inputs[t]) if centred else np.float32(0)
        factor = np.float32(1 / np.sqrt(_variance(inputs[t], mean) + epsilon))
        _add(gain, bias, delta[t], inputs[t], mean, factor)


@kernel
def normed(address: Any) -> None:
    """See `sdi.rules.norm`; a turn is a block of an example's tokens."""
    job = carray(address, (_LENGTH,), np.int64)
    epsilon = carray(_doubles(job.ctypes.data), (_LENGTH,))[EPSILON]
    tokens, columns = job[TOKENS], job[COLUMNS]
    blocks = (tokens + BLOCK - 1) // BLOCK
    number = turn(address, TURNS)
    while number < job[EXAMPLES] * blocks:
        gain = carray(_floats(job[GAIN] + 4 * columns * number), (columns,))
        bias = carray(_floats(job[BIAS] + 4 * columns * number), (columns,))
        token = number % blocks * BLOCK
        shape = (min(BLOCK, tokens - token), columns)
        first = (number // blocks * tokens + token) * columns
        if job[HALF]:
            delta = carray(_halves(job[DELTA] + 2 * first), shape)
            inputs = carray(_halves(job[INPUTS] + 2 * first), shape)
            _block(delta, inputs, gain, bias, job[CENTRED], epsilon)
        else:
            whole_delta = carray(_floats(job[DELTA] + 4 * first), shape)
            whole_inputs = carray(_floats(job[INPUTS] + 4 * first), shape)
            _block(whole_delta, whole_inputs, gain, bias, job[CENTRED], epsilon)
        number = turn(address, TURNS)
