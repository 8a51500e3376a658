"""Rows of sketches as the score and index passes read them: any row range, straight from the maps.

Letters: N rows of a set, τ steps, M sketch dimension, U slots (1 where one total per row is read,
τ where the steps are).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from curate.errors import CurateError

if TYPE_CHECKING:
    from curate.rundir import RunDirectory
    from sdi.shards import Shard

Floats = npt.NDArray[np.float32]
BLOCK_BYTES = 32 << 20
"""How many bytes of float32 one block may take."""


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
        CurateError: there are none, or they leave rows out.
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
        self._pieces = list(pieces)
        self.rows = rows
        self.dim = int(pieces[0][2].values.shape[-1])
        self.slots = max(
            int(shard.values.shape[1]) if shard.values.ndim == 3 else 1 for _, _, shard in pieces
        )

    def read(self, start: int, stop: int) -> Block:
        """Rows start..stop as they lie on disk; rows of fewer slots are filled up with zeros."""
        parts = [
            self._cut(shard, max(start, first) - first, min(stop, last) - first)
            for first, last, shard in self._pieces
            if first < stop and last > start
        ]
        if len(parts) == 1:
            return parts[0]
        return Block(
            np.concatenate([part.values for part in parts]),
            np.concatenate([part.scale for part in parts]),
            np.concatenate([part.norm for part in parts]),
        )

    def norms(self) -> Floats:
        """Norms of all rows, (N, U): four bytes a step."""
        return np.concatenate(
            [self._cut(shard, 0, last - first).norm for first, last, shard in self._pieces]
        )

    def _cut(self, shard: Shard, start: int, stop: int) -> Block:
        count = stop - start
        values = shard.values[start:stop].reshape(count, -1, self.dim)
        scale = np.asarray(shard.scale[start:stop]).reshape(count, -1)
        norm = np.asarray(shard.norm[start:stop]).reshape(count, -1)
        missing = self.slots - values.shape[1]
        if missing:
            values = np.pad(values, ((0, 0), (0, missing), (0, 0)))
            scale, norm = (np.pad(array, ((0, 0), (0, missing))) for array in (scale, norm))
        return Block(values, scale, norm)


def open_rows(
    run: RunDirectory, set_name: str, checkpoint: str, kind: Literal["steps", "totals"]
) -> SketchRows:
    """The sketches of a set at a checkpoint.

    Raises:
        CurateError: the set is unknown, or rows of it have no sketch of this kind.
    """
    sets = run.manifest.sets
    if set_name not in sets:
        raise CurateError(
            f"{run.path} has no set {set_name!r}; it has {', '.join(map(repr, sets)) or 'none'}"
        )
    label = f"{run.path}: {kind} of {set_name!r} at checkpoint {checkpoint!r}"
    return SketchRows(run.shards(set_name, checkpoint, kind), sets[set_name].rows, label)


def block_rows(slots: int, dim: int) -> int:
    """How many rows of (slots, dim) float32 make a block of at most `BLOCK_BYTES`."""
    return max(1, min(4096, BLOCK_BYTES // (4 * slots * dim)))


def spans(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    """[start, stop) cut into ranges of at most `size`."""
    return [(a, min(a + size, stop)) for a in range(start, stop, size)]
