"""Bit planes: the first bits of an index's vectors, which tell most of them from what is sought.

What a search goes through is mostly vectors hardly longer than the best products it knows, and a
coarse picture is enough to say that these are too small: with v = g·x + e, where x has up to four
bits an entry, ⟨q, v⟩ ≤ g·⟨q, x⟩ + ‖q‖·‖e‖ (the vector-approximation file of Weber, Schek & Blott
1998). That is a small part of what reading all codes takes, which is as long as memory takes.

An entry's bits are its place among 16 equal cells, and the first plane has the first bit of each.
A plane lies in four stripes, of a quarter of the entries each. At level ℓ a search has read the
first ℓ stripes of some vectors of a band, and the gain g and the rest ‖e‖ of that level. The longer
these are, the higher the level that pays. What passes is multiplied with the codes.

Letters: V vectors, M sketch dimension, B bands, L levels, T stretches of `LANES` vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt

from curate import atomic
from curate.errors import CurateError
from sdi import team

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64]
PLANES, STRIPES = 4, 4
LEVELS = PLANES * STRIPES
AGAIN = "make it again with `curate index --overwrite`"
LANES = 64
"""Vectors whose bits lie side by side."""
STEP = 32
"""M is a multiple of this: a stripe is whole bytes."""
DEEPEST = 1 << 16
"""The largest M; there whole numbers still tell a query to a thousandth."""
ENDS = (".planes.npy", ".bounds.npy")
"""uint8 (PLANES, STRIPES, T, M / 32, LANES) bits, and float32 (L, 2, T · LANES) gains and rests."""
_CELL = 0.335
"""Of a cell, in standard deviations: the best 16 equal cells for normal numbers (Max 1960)."""
_SUMS = 127
"""The largest sum of four whole numbers that fits into a byte, with or without a sign."""
_SHORT, _WORDS = 2**15 - 1, 2**31 * 16 // (2 * 255) - 1
"""The largest whole number, and M times it, whose products with codes the kernel can add up."""
_ROOM = 1 << 16
"""Of how many finds there is room at least, so that small bands do not end a call early."""
_PART = 256
"""Vectors that are worked on at once."""


def fits(dim: int) -> bool:
    """Whether vectors of M = `dim` have planes."""
    return dim % STEP == 0 and dim <= DEEPEST


def write_planes(path: Path, values: Floats) -> list[float]:
    """Write the planes of vectors (V, M), none of them zero.

    Returns:
        The mean of ‖e‖ / ‖v‖ at each level.
    """
    count, dim = values.shape
    blocks = -(-count // LANES)
    bits = np.zeros((PLANES, blocks * LANES, dim // 8), dtype=np.uint8)
    bounds = np.zeros((LEVELS, 2, blocks * LANES), dtype=np.float32)
    lost = np.zeros(LEVELS)
    for start in range(0, count, _PART):
        part = values[start : start + _PART].astype(np.float64)
        here = slice(start, start + len(part))
        planes = _planes(part)
        bits[:, here] = np.packbits(planes, axis=2, bitorder="little")
        bounds[:, :, here], share = _bounds(part, planes)
        lost += share.sum(axis=1)
    laid = bits.reshape(PLANES, blocks, LANES, STRIPES, -1).transpose(0, 3, 1, 4, 2)
    for end, array in zip(ENDS, (np.ascontiguousarray(laid), bounds), strict=True):
        atomic.write_array(path.with_suffix(end), array)
    return [round(float(each), 4) for each in lost / count]


def _planes(values: Doubles) -> Bytes:
    """The bits (PLANES, V, M) of the cells that entries lie in, the first of each first."""
    size = _CELL * np.sqrt(np.square(values).mean(axis=1))
    half = 1 << (PLANES - 1)
    found = np.clip(np.floor(values / size[:, None]) + half, 0, 2 * half - 1)
    places = np.arange(PLANES - 1, -1, -1, dtype=np.uint8)[:, None, None]
    planes: Bytes = found.astype(np.uint8) >> places & 1
    return planes


def _bounds(values: Doubles, planes: Bytes) -> tuple[Floats, Doubles]:
    """The gains and rests (L, 2, V), and ‖e‖ / ‖v‖ (L, V).

    The gain is that of least squares, as float32 rounds it, and the rest is of that gain.
    """
    parts = values.reshape(len(values), STRIPES, -1)
    whole = np.square(values).sum(axis=1)
    seen, along, size = np.zeros_like(parts), np.zeros((2, STRIPES, len(values))), []
    bounds = np.zeros((LEVELS, 2, len(values)), dtype=np.float32)
    share = np.zeros((LEVELS, len(values)))
    for level in range(LEVELS):
        plane, stripe = divmod(level, STRIPES)
        if stripe == 0:
            weight = 1 << (PLANES - 1 - plane)
            seen += weight * (2.0 * planes[plane].reshape(parts.shape) - 1)
            size = [np.einsum("vsi,vsi->sv", seen, each) for each in (parts, seen)]
        along[0, stripe], along[1, stripe] = size[0][stripe], size[1][stripe]
        inner, square = along.sum(axis=1)
        gain = (inner / np.where(square > 0, square, 1)).astype(np.float32)
        left = whole - 2 * gain * inner + np.square(gain, dtype=np.float64) * square
        rest = np.sqrt(np.maximum(left, 0) + 1e-12 * whole)
        bounds[level] = gain, np.nextafter(rest.astype(np.float32), np.float32(np.inf))
        share[level] = rest / np.sqrt(whole)
    return bounds, share


class Planes:
    """A band's bit planes, mapped, and its codes.

    Attributes:
        told: what a kernel is told of them: addresses of bits, gains and codes, how many vectors,
            and the bytes of a level's gains.

    Args:
        path: of the band's index.
        codes: uint8 (V, M), as FAISS stores them.
        holder: what the codes lie in.

    Raises:
        CurateError: the files are not there, or not of these codes.
    """

    def __init__(self, path: Path, codes: Bytes, holder: object) -> None:
        count, dim = codes.shape
        blocks = -(-count // LANES)
        try:
            bits, bounds = (np.load(path.with_suffix(end), mmap_mode="r") for end in ENDS)
        except (OSError, ValueError, EOFError) as error:
            raise CurateError(
                f"{path.with_suffix('')}: no bit planes ({error}); {AGAIN}"
            ) from error
        shapes = (PLANES, STRIPES, blocks, dim // STEP, LANES), (LEVELS, 2, blocks * LANES)
        expected = [(np.dtype(kind), shape) for kind, shape in zip("Bf", shapes, strict=True)]
        found = [(array.dtype, array.shape) for array in (bits, bounds)]
        if found != expected:
            raise CurateError(
                f"{path.with_suffix('')}: bit planes of {found}, expected {expected}; {AGAIN}"
            )
        self._held = holder, codes, bits, bounds
        at_codes, at_bits, at_bounds = (array.ctypes.data for array in (codes, bits, bounds))
        self.told = (at_bits, at_bounds, at_codes, count, 4 * LANES * blocks)


@dataclass(frozen=True)
class Screened:
    """What a search may find in some bands.

    Attributes:
        places: of vectors, counted from the first band's first one on.
        low, high: bounds on their products with the query.
        bands: how many were gone through; all of them where no later vector can enter.
        seen: how many vectors were.
    """

    places: Numbers
    low: Doubles
    high: Doubles
    bands: int
    seen: int


class Probe:
    """A query of norm one as the kernel takes it, twice in whole numbers: those that bits are asked
    with, so small that the sums over a group of four entries fit into bytes, and those that codes
    are multiplied with: `_size` and `_step` times these are the query but for what has the norms
    `_short` and `_left`.

    Args:
        unit: float64 (M,); or zeros.
    """

    def __init__(self, unit: Doubles) -> None:
        groups = np.abs(unit).reshape(-1, 4).sum(axis=1)
        # Four entries are rounded up by no more than 2 in all.
        self._size = (float(groups.max()) or 1.0) / (_SUMS - 2)
        coarse = np.rint(unit / self._size)
        self._short = float(np.linalg.norm(unit - self._size * coarse))
        self._length = float(np.linalg.norm(self._size * coarse))
        signs = 2 * (np.arange(16)[:, None] >> np.arange(4) & 1) - 1
        self._tables = (coarse.reshape(-1, 4) @ signs.T + _SUMS + 1).astype(np.uint8)
        self._step = (float(np.abs(unit).max()) or 1.0) / min(_SHORT, _WORDS // len(unit))
        self._whole = np.rint(unit / self._step).astype(np.int16)
        self._left = float(np.linalg.norm(unit - self._step * self._whole))
        reals = (self._size, self._length, self._short, self._step, self._left)
        self._reals = np.array(reals)

    def screen(
        self,
        kernels: ModuleType,
        told: Numbers,
        rests: Doubles,
        lost: Doubles,
        scales: Floats,
        norms: Floats,
        best: Doubles,
    ) -> Screened:
        """Go down bands, one after another by norm, until no later vector can be among the best.

        It may end before, where a band is not open or much was found, but not at the first band.

        Args:
            told: as `Planes` has it, of each band; of those that are not open zeros.
            rests: how far off the products of each band's codes may be.
            lost: ‖e‖ / ‖v‖ of each band (B, L).
            scales, norms: of the bands' vectors.
            best: (k,) the k largest lower bounds known so far, the smallest first; where there are
                fewer, -∞. It is left with those known then.
        """
        room = max(_ROOM, 2 * int(told[:, 3].max()))
        places, state = np.empty(room, dtype=np.int64), np.zeros(3, dtype=np.int64)
        low, high = np.empty(room), np.empty(room)
        work = np.empty((2, kernels.PIECE), dtype=np.int32)
        arrays = (
            told, rests, lost, scales, norms, self._reals, self._tables, self._whole,
            work[0], work[1], best, places, low, high, state,
        )  # fmt: skip
        assert all(array.flags.c_contiguous for array in arrays)
        job = (
            0, len(told), len(self._whole), PLANES, STRIPES, len(best), room, 0,
            *(array.ctypes.data for array in arrays),
        )  # fmt: skip
        team.run(kernels.screened, job, 1)
        count, bands, seen = state.tolist()
        return Screened(places[:count], low[:count], high[:count], bands, seen)
