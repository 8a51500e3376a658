"""A run as a notebook sees it: tables, SQL, neighbours and charts behind one object."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from curate.rundir import RunDirectory

if TYPE_CHECKING:
    from curate.plots import Plots


class Run:
    """A run directory, opened for reading. Make one with `curate.open`.

    Attributes:
        directory: the run on disk, with lazy tables for what does not fit in memory.
    """

    def __init__(self, directory: RunDirectory) -> None:
        self.directory = directory

    @property
    def path(self) -> Path:
        """Where the run is."""
        return self.directory.path

    @property
    def examples(self) -> pl.DataFrame:
        """All sets, with the set's name in column `set`. Read into memory."""
        tables = [
            self.directory.examples(name).with_columns(pl.lit(name).alias("set"))
            for name in self.directory.manifest.sets
        ]
        return pl.concat(tables, how="diagonal_relaxed").collect() if tables else pl.DataFrame()

    @property
    def queries(self) -> list[str]:
        """Names of the influence tables."""
        return sorted(self.directory.manifest.influence)

    @property
    def steps(self) -> tuple[str, ...]:
        """Labels of the loop's steps."""
        return self.directory.manifest.steps

    def influence(self, query: str) -> pl.DataFrame:
        """The influence table of a query, with the rows' id and source. Read into memory."""
        entry = self.directory.influence_entry(query)
        labels = self.directory.examples(entry.train_set)
        names = set(labels.collect_schema().names())
        wanted = [name for name in ("id", "source") if name in names]
        scores = self.directory.influence(query)
        joined = scores.join(labels.select("row", *wanted), on="row", how="left")
        rest = [name for name in scores.collect_schema().names() if name != "row"]
        return joined.select("row", *wanted, *rest).sort("row").collect()

    def tops(self, query: str) -> pl.DataFrame:
        """The best training rows of each single query."""
        return self.directory.tops(query).collect()

    def decisions(self, name: str) -> pl.DataFrame:
        """Every row of a selection, kept or dropped."""
        return self.directory.selection(name).collect()

    def profile(self, query: str, by: str | None = "source") -> pl.DataFrame:
        """Mean influence of each step by source; see `curate.profile.profile`."""
        from curate.profile import profile

        return profile(self.directory, query, by)

    def sql(self, statement: str, **options: Any) -> pl.DataFrame:
        """The answer to one reading SQL statement, from the sandbox; see `curate.query.sql`."""
        from curate.query import sql

        return sql(self.directory, statement, **options)

    def neighbours(self, *, row: int, step: int, k: int = 10, **options: Any) -> pl.DataFrame:
        """The k (row, step) nearest to one row at one step; see `curate.index.neighbours`."""
        from curate.index import neighbours

        return neighbours(self.directory, row=row, step=step, k=k, **options)

    @property
    def plot(self) -> Plots:
        """Charts: trajectories, energy, contrast."""
        from curate.plots import Plots

        return Plots(self.directory)

    @property
    def manifest(self) -> Mapping[str, Any]:
        """The manifest as plain values."""
        return self.directory.manifest.model_dump(by_alias=True)

    def __repr__(self) -> str:
        sets = ", ".join(f"{k}: {v.rows}" for k, v in self.directory.manifest.sets.items())
        return f"<Run {self.path} ({sets}); queries {', '.join(self.queries) or 'none yet'}>"


def open_run(path: str | Path) -> Run:
    """The run at `path`.

    Raises:
        CurateError: where there is none.
    """
    return Run(RunDirectory.open(path))
