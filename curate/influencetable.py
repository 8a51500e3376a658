"""Parquet files of the score tables: written whole, floats without dictionaries."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl
import pyarrow.parquet as pq

from curate import atomic
from curate.manifest import File

if TYPE_CHECKING:
    from curate.rundir import RunDirectory

OPTIONS = {"compression": "zstd", "use_dictionary": False}


def write_parquet(
    run: RunDirectory, path: Path, frame: pl.DataFrame, rows: tuple[int, int] | None = None
) -> File:
    """Write a table and return its record for the manifest."""
    with atomic.replacing(path) as temporary:
        pq.write_table(frame.to_arrow(), temporary, row_group_size=len(frame) or 1, **OPTIONS)
    return run.file(path, rows)


def merge_best(best: pl.DataFrame | None, other: pl.DataFrame, by: str) -> pl.DataFrame:
    """Of two tables with the same rows, for each row the one with the larger `by`.

    Whole rows are taken, so that the steps of a row still add up to its total; of equals the first.
    """
    if best is None:
        return other
    better = (other[by] > best[by]).fill_null(False)
    marked = best.with_columns(better.alias("_better"))
    return marked.select(
        pl.when(pl.col("_better")).then(other[name]).otherwise(pl.col(name)).alias(name)
        for name in best.columns
    )


def discard(run: RunDirectory, files: Iterable[File]) -> None:
    """Remove files that the manifest no longer lists; what is still listed stays."""
    listed = {path for path, _ in run.listed()}
    for file in files:
        path = run.path / file.path
        if path not in listed:
            with contextlib.suppress(OSError):
                path.unlink()
