"""Rows of sketches as the score and index passes read them: any row range, straight from the maps.

Letters: N rows of a set, τ steps, M sketch dimension, U slots (1 where one total per row is read,
τ where the steps are).
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from curate.errors import CurateError

if TYPE_CHECKING:
    from curate.rundir import RunDirectory
    from sdi.shards import Shard

Floats = npt.NDArray[np.float32]
Numbers = npt.NDArray[np.int64]
BLOCK_BYTES = 32 << 20
"""How many bytes of float32 one block may take."""
FEW = 6
"""Rows a shard below which they are taken one by one."""
AHEAD = 2
"""How many shards the system is asked to read before they are wanted."""


@dataclass(frozen=True)
class Block:
    """Some rows: `values` int8 (rows, U, M), `scale` and `norm` float32 (rows, U)."""

    values: npt.NDArray[np.int8]
    scale: Floats
    norm: Floats


class SketchRows:
    """All shards of one set at one checkpoint, read as one array of rows.

    Args:
        pieces: (first row, row after the last, shard) in row order, as the run directory lists.
        label: what to call them in an error.

    Raises:
        CurateError: there are none, they leave rows out, or a shard is not what is listed.
    """

    def __init__(self, pieces: Sequence[tuple[int, int, Shard]], rows: int, label: str) -> None:
        reached = 0
        for first, last, _ in pieces:
            if first != reached:
                break
            reached = last
        if not pieces or reached != rows:
            raise CurateError(
                f"{label}: sketches of {reached} of {rows} rows; run `curate sketch` first"
            )
        dim = int(pieces[0][2].values.shape[-1])
        for first, last, shard in pieces:  # a kernel reads them by their addresses
            found = (shard.rows, int(shard.values.shape[-1]))
            if found != (last - first, dim):
                raise CurateError(
                    f"{label}: the shard of rows {first} to {last} holds {found[0]} sketches of "
                    f"M = {found[1]}, expected {last - first} of {dim}; remove the shard from the "
                    "manifest and sketch these rows again"
                )
        self._pieces = list(pieces)
        self._starts = [first for first, _, _ in pieces]
        # Plain arrays over the same maps: indexing a memmap costs several times as much.
        self._plain = [self._whole(shard) for _, _, shard in pieces]
        self._asked = 0
        self.rows = rows
        self.dim = dim
        self._widths = np.array([self._slots(shard) for _, _, shard in pieces])
        self.slots = int(self._widths.max())

    def read(self, start: int, stop: int) -> Block:
        """Rows start..stop as they lie on disk; rows of fewer slots are filled up with zeros."""
        parts = [
            self._cut(piece, max(start, first) - first, min(stop, last) - first)
            for piece, first, last in self._between(start, stop)
        ]
        if len(parts) == 1:
            return parts[0]
        return Block(
            np.concatenate([part.values for part in parts]),
            np.concatenate([part.scale for part in parts]),
            np.concatenate([part.norm for part in parts]),
        )

    def spans(self, start: int, stop: int, size: int) -> list[tuple[int, int]]:
        """Rows start..stop in ranges of at most `size`, in order.

        Where shards have half as many rows or more, no range leaves its shard, and each is read
        without a copy.
        """
        found: list[tuple[int, int]] = []
        for edge in [*(first for first in self._starts if start < first < stop), stop]:
            if edge == stop or 2 * (edge - start) >= size:
                found += spans(start, edge, size)
                start = edge
        return found

    def take(self, rows: Numbers, slots: Numbers | None = None) -> Block:
        """Any rows, in the order that is asked for; with `slots`, one slot of each, as U = 1.

        Slots that a row does not have are zeros, as in `read`.
        """
        values, scale, norm = self._gathered(rows, slots, ("values", "scale", "norm"))
        return Block(values, scale, norm)

    def vectors(self, rows: Numbers, slots: Numbers) -> tuple[npt.NDArray[np.int8], Floats]:
        """`values` and `scale` of what `take` takes, in two thirds of its time."""
        values, scale = self._gathered(rows, slots, ("values", "scale"))
        return values, scale

    def places(self, rows: Numbers, slots: Numbers) -> tuple[Numbers, Numbers]:
        """Addresses of the values and the scale of one slot of each row, for a kernel to read; 0
        where a row does not have it.
        """
        if len(rows) and not 0 <= rows.min() <= rows.max() < self.rows:
            raise IndexError(f"rows {rows.min()} to {rows.max()} of {self.rows}")
        owner, own = self._located(rows)
        widths = self._widths[owner]
        here, number = slots < widths, own * widths + slots
        values, scale = self._addresses
        return (
            np.where(here, values[owner] + self.dim * number, 0),
            np.where(here, scale[owner] + np.float32().itemsize * number, 0),
        )

    def _located(self, rows: Numbers) -> tuple[Numbers, Numbers]:
        """The shard of each row, and its place there."""
        owner = np.searchsorted(self._starts, rows, side="right") - 1
        return owner, rows - np.asarray(self._starts)[owner]

    @cached_property
    def _addresses(self) -> tuple[Numbers, Numbers]:
        """Where each shard's values and scales lie."""
        arrays = [(plain.values, plain.scale) for plain in self._plain]
        for values, scale in arrays:
            assert values.flags.c_contiguous and values.dtype == np.int8
            assert scale.flags.c_contiguous and scale.dtype == np.float32
        values, scale = np.array([[each.ctypes.data for each in pair] for pair in arrays]).T
        return values, scale

    def _gathered(
        self, rows: Numbers, slots: Numbers | None, names: Sequence[str]
    ) -> list[npt.NDArray[Any]]:
        """Those of a block's arrays that are named, in the order of `rows`."""
        one = slots if self.slots > 1 or (slots is not None and slots.any()) else None
        width = self.slots if slots is None else 1
        first = (getattr(self._plain[0], name) for name in names)
        found = [np.zeros((len(rows), width, *array.shape[2:]), array.dtype) for array in first]
        owner, own = self._located(rows)
        order = np.argsort(owner, kind="stable")
        ends = [*(np.flatnonzero(np.diff(owner[order])) + 1).tolist(), len(order)]
        if len(rows) < FEW * len(ends):
            self._one_by_one(found, names, owner, own, one)
            return found
        start = 0
        for end in ends:
            there = order[start:end]
            which = None if one is None else one[there]
            for into, name in zip(found, names, strict=True):
                array = getattr(self._plain[owner[there[0]]], name)
                if which is None:
                    into[there, : array.shape[1]] = array[own[there]]
                else:
                    has = which < array.shape[1]
                    into[there[has], 0] = array[own[there[has]], which[has]]
            start = end
        return found

    def _one_by_one(
        self,
        found: list[npt.NDArray[Any]],
        names: Sequence[str],
        owner: Numbers,
        own: Numbers,
        slots: Numbers | None,
    ) -> None:
        """Fill what `_gathered` returns row by row, which is quicker for a few of many shards."""
        places = list(zip(owner.tolist(), own.tolist(), strict=True))
        which = None if slots is None else slots.tolist()
        for into, name in zip(found, names, strict=True):
            arrays = [getattr(plain, name) for plain in self._plain]
            for row, (piece, place) in enumerate(places):
                array = arrays[piece]
                if which is None:
                    into[row, : array.shape[1]] = array[place]
                elif which[row] < array.shape[1]:
                    into[row, 0] = array[place, which[row]]

    def _between(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Pieces that hold rows start..stop, with their own rows; the next ones are asked for."""
        number = max(0, bisect_right(self._starts, start) - 1)
        if start == 0:
            self._asked = 0
        while number < len(self._pieces) and self._starts[number] < stop:
            first, last, _ = self._pieces[number]
            yield number, first, last
            number += 1
        for coming in range(max(number, self._asked), min(number + AHEAD, len(self._pieces))):
            _read_ahead(self._pieces[coming][2].values)
            self._asked = coming + 1

    @staticmethod
    def _slots(shard: Shard) -> int:
        return int(shard.values.shape[1]) if shard.values.ndim == 3 else 1

    def norms(self) -> Floats:
        """Norms of all rows, (N, U): four bytes a step."""
        return np.concatenate(
            [
                self._cut(piece, 0, last - first).norm
                for piece, (first, last, _) in enumerate(self._pieces)
            ]
        )

    def _whole(self, shard: Shard) -> Block:
        """A shard as one block, not read yet."""
        slots = self._slots(shard)
        return Block(
            np.asarray(shard.values).reshape(shard.rows, slots, -1),
            np.asarray(shard.scale).reshape(shard.rows, slots),
            np.asarray(shard.norm).reshape(shard.rows, slots),
        )

    def _cut(self, piece: int, start: int, stop: int) -> Block:
        whole = self._plain[piece]
        part = Block(whole.values[start:stop], whole.scale[start:stop], whole.norm[start:stop])
        missing = self.slots - part.values.shape[1]
        if not missing:
            return part
        scale, norm = (np.pad(array, ((0, 0), (0, missing))) for array in (part.scale, part.norm))
        return Block(np.pad(part.values, ((0, 0), (0, missing), (0, 0))), scale, norm)


def _read_ahead(array: npt.NDArray[np.int8]) -> None:
    """Ask the system to read a mapped file, and do not wait for it."""
    name = getattr(array, "filename", None)
    if name is None or not hasattr(os, "posix_fadvise"):
        return
    descriptor = os.open(name, os.O_RDONLY)
    try:
        if not _in_memory(descriptor, array.nbytes):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(descriptor)


def _in_memory(descriptor: int, size: int) -> bool:
    """Whether the first, the middle and the last page of a file are; a question costs less than
    the system's own search for pages that are not.
    """
    if not hasattr(os, "RWF_NOWAIT"):
        return False
    room = [bytearray(1)]
    try:
        return all(
            os.preadv(descriptor, room, place, os.RWF_NOWAIT) for place in (0, size // 2, size - 1)
        )
    except OSError:  # it would have to wait, or cannot tell
        return False


def open_rows(
    run: RunDirectory, set_name: str, checkpoint: str, kind: Literal["steps", "totals"]
) -> SketchRows:
    """The sketches of a set at a checkpoint.

    Raises:
        CurateError: the set is unknown, rows of it have no sketch of this kind, or these are not of
            the run's dimension.
    """
    sets = run.manifest.sets
    if set_name not in sets:
        raise CurateError(
            f"{run.path} has no set {set_name!r}; it has {', '.join(map(repr, sets)) or 'none'}"
        )
    label = f"{run.path}: {kind} of {set_name!r} at checkpoint {checkpoint!r}"
    found = SketchRows(run.shards(set_name, checkpoint, kind), sets[set_name].rows, label)
    said = run.manifest.sketch
    if said and found.dim != said.dim:
        raise CurateError(
            f"{label} have M = {found.dim}, expected {said.dim}, which the manifest says; sketch "
            "them into a new run"
        )
    return found


def block_rows(slots: int, dim: int) -> int:
    """How many rows of (slots, dim) float32 make a block of at most `BLOCK_BYTES`."""
    return max(1, min(4096, BLOCK_BYTES // (4 * slots * dim)))


def spans(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    """[start, stop) cut into ranges of at most `size`."""
    return [(a, min(a + size, stop)) for a in range(start, stop, size)]
