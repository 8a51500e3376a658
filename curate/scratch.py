"""Raw scores on their way to the influence table.

Standardising needs the whole training set, so scores are first appended to one plain array per
(chunk of groups, part of rows), under the digest of all that they depend on. A file that is there
is whole: it was renamed when it was flushed. So an interrupted scoring goes on where it was, and
memory holds one block at a time.

Letters: N rows of the part, G groups of the chunk, τ steps.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from curate import atomic
from curate.blocks import spans

PART_ROWS = 131_072
"""Rows a part, so a file of the influence table has at least 100k rows where there are so many."""

TABLE_ROWS = 16_384
"""Rows a block that becomes a piece of a table, a row group of its file."""

Raw = npt.NDArray[np.float32]


class Scratch:
    """The raw scores of one scoring.

    Args:
        home: directory of this query; what other settings left in it is removed.
        digest: of the settings and of the data.
        rows: N of the training set.
    """

    def __init__(self, home: Path, digest: str, rows: int) -> None:
        self._home = home
        self._directory = home / digest
        self.parts = [(a, min(a + PART_ROWS, rows)) for a in range(0, rows, PART_ROWS)]
        for other in home.iterdir() if home.is_dir() else ():
            if other != self._directory:
                shutil.rmtree(other)

    def path(self, chunk: int, part: int) -> Path:
        """File of one chunk of groups and one part of rows."""
        return self._directory / f"scores-{chunk:04d}-{part:04d}.npy"

    def write(
        self, chunk: int, part: int, shape: tuple[int, ...], blocks: Iterator[npt.NDArray[Any]]
    ) -> None:
        """Append blocks (rows, G, τ + 8) to a file of `shape`; nothing stays where one fails."""
        with atomic.replacing(self.path(chunk, part)) as temporary, temporary.open("wb") as stream:
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(stream, header)
            for block in blocks:
                stream.write(np.ascontiguousarray(block, dtype="<f4").tobytes())

    def group(self, chunk: int, group: int) -> Iterator[Raw]:
        """One group's raw scores (rows, τ + 8), block by block."""
        for part in range(len(self.parts)):
            raw = np.load(self.path(chunk, part), mmap_mode="r")[:, group]
            for start, stop in spans(0, len(raw), TABLE_ROWS):
                yield np.asarray(raw[start:stop])

    def missing(self, chunk: int) -> list[int]:
        """Parts of a chunk that are still to be scored."""
        return [n for n in range(len(self.parts)) if not self.path(chunk, n).exists()]

    def remove(self) -> None:
        """Remove everything, once the tables are in the manifest."""
        shutil.rmtree(self._home, ignore_errors=True)


Progress = Callable[[int, int], None]
"""Called with (rows done, rows in all)."""
