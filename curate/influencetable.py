"""Parquet files of the score tables: written whole, floats without dictionaries."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow.parquet as pq

from curate import atomic
from curate.manifest import File

if TYPE_CHECKING:
    from curate.rundir import RunDirectory

OPTIONS = {"compression": "zstd", "use_dictionary": False}


def write_parquet(
    run: RunDirectory,
    path: Path,
    frames: Iterable[pl.DataFrame],
    rows: tuple[int, int] | None = None,
) -> File:
    """Write a table, a row group for each of `frames`, and return its record for the manifest."""
    with atomic.replacing(path) as temporary:
        writer: pq.ParquetWriter | None = None
        try:
            for frame in frames:
                table = frame.to_arrow()
                writer = writer or pq.ParquetWriter(temporary, table.schema, **OPTIONS)
                writer.write_table(table, row_group_size=len(table) or 1)
        finally:
            if writer is not None:
                writer.close()
    return run.file(path, rows)


class Best:
    """Which group is the best of each row of a part; of equals the first.

    Args:
        span: first row of the part, and the row after its last.
    """

    def __init__(self, span: tuple[int, int]) -> None:
        self._first = span[0]
        self._value = np.full(span[1] - span[0], np.nan, dtype=np.float32)
        self._group = np.ones(span[1] - span[0], dtype=np.int32)

    def offer(self, number: int, rows: npt.NDArray[np.int64], values: pl.Series) -> None:
        """Take group `number` for those of `rows` where its value is larger than any before."""
        at = rows - self._first
        offered, best = values.to_numpy().astype(np.float32), self._value[at]
        better = (offered > best) | (np.isnan(best) & ~np.isnan(offered))
        self._value[at[better]] = offered[better]
        self._group[at[better]] = number

    def of(self, start: int, stop: int) -> list[tuple[int, npt.NDArray[np.int64]]]:
        """The groups that are best somewhere in start..stop, each with its rows."""
        chosen = self._group[start - self._first : stop - self._first]
        return [(int(n), start + np.flatnonzero(chosen == n)) for n in np.unique(chosen)]


def discard(run: RunDirectory, files: Iterable[File]) -> None:
    """Remove files that the manifest no longer lists; what is still listed stays."""
    listed = {path for path, _ in run.listed()}
    for file in files:
        path = run.path / file.path
        if path not in listed:
            with contextlib.suppress(OSError):
                path.unlink()
