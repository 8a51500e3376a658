"""Counter-based hashes: every random choice of a sketch is a pure function of a key.

How. A key (seed, sketch version, checkpoint, parameter name, role, block) is digested with BLAKE2b
to 64 bits; a stream of integers is SplitMix64 of that key plus a counter. No generator state
exists, so a parameter's hash is the same whatever else is sketched beside it, in whatever order,
and on every device (integers are made with numpy on the CPU and copied).

Why. The store outlives the process: rows sketched next month must meet the rows of today.

Source: SplitMix64 is Steele, Lea & Flood, "Fast splittable pseudorandom number generators" (2014).
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

SKETCH_VERSION = 2  # 2: each matrix of a 3-D parameter has hashes of its own

Words = NDArray[np.uint64]


def key(*parts: str | int) -> int:
    """64-bit key of a sequence of strings and integers (order and boundaries matter)."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        text = f"{type(part).__name__}:{part}".encode()
        digest.update(len(text).to_bytes(8, "little") + text)
    return int.from_bytes(digest.digest(), "little")


def words(stream: int, count: int) -> Words:
    """`count` pseudo-random 64-bit words, SplitMix64 at counters 1..count of `stream`."""
    counter = np.arange(1, count + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        z = np.uint64(stream) + counter * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(z ^ (z >> np.uint64(31)), dtype=np.uint64)


def signs(stream: int, count: int) -> NDArray[np.float32]:
    """`count` signs, +1 or −1, float32: the top bit of each word."""
    top = (words(stream, count) >> np.uint64(63)).astype(np.float32)
    return np.asarray(1.0 - 2.0 * top, dtype=np.float32)


def permutation(stream: int, size: int) -> NDArray[np.int64]:
    """A permutation of 0..size−1: the argsort of integer keys, ties by index."""
    return np.argsort(words(stream, size), kind="stable").astype(np.int64)


def buckets_without_replacement(stream: int, count: int, size: int) -> NDArray[np.int64]:
    """`count` buckets below `size`; each block of `size` items is a fresh permutation."""
    blocks = -(-count // size)
    parts = [permutation(key(stream, block), size) for block in range(blocks)]
    return np.concatenate(parts)[:count] if parts else np.zeros(0, dtype=np.int64)


def contiguous_buckets(stream: int, count: int, size: int) -> NDArray[np.int64]:
    """Bucket (i + offset) mod `size`, with a fresh offset for each block of `size` items."""
    index = np.arange(count, dtype=np.int64)
    offsets = (words(stream, -(-count // size)) % np.uint64(size)).astype(np.int64)
    return np.asarray((index + offsets[index // size]) % size, dtype=np.int64)
