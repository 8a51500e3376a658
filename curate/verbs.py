"""The verbs of the command line on a run directory: path and settings in, a table to print out.

A notebook uses the functions below these (`curate.rank.rank`, `curate.filter.filter`, …), which
take a `RunDirectory` and return the whole result; a verb opens the run, holds the writer's lock
where it writes, and sums the result up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate.console import Console
from curate.errors import CurateError, UsageError
from curate.rundir import RunDirectory

if TYPE_CHECKING:
    import polars as pl


# -- score ----------------------------------------------------------------------------------------


def score_queries(
    path: Path,
    queries: Sequence[str],
    settings: Mapping[str, Any],
    console: Console,
) -> pl.DataFrame:
    """Score several query sets, all of the run's if none is named; one row per table made.

    `settings` are keyword arguments of `curate.scores.score_run`.
    """
    import polars as pl

    sets = RunDirectory.open(path).manifest.sets
    chosen = list(queries) or [name for name, entry in sets.items() if entry.role == "query"]
    if not chosen:
        raise UsageError(f"{path} has no query set; its sets are: {', '.join(sets) or 'none yet'}")
    unknown = [name for name in chosen if name not in sets]
    if unknown:
        raise UsageError(f"{path} has no set {unknown[0]!r}; its sets are: {', '.join(sets)}")
    names = [name for query in chosen for name in score_one(path, query, settings, console)]
    run = RunDirectory.open(path)
    return pl.DataFrame([_summed_influence(run, name) for name in names])


def score_one(path: Path, query: str, settings: Mapping[str, Any], console: Console) -> list[str]:
    """Score one query set; returns the names of the tables it has now."""
    from curate.scores import score_run

    def progress(done: int, total: int) -> None:
        console.progress(f"score {query}", done, total)

    return score_run(RunDirectory.open(path), query, progress=progress, **settings)


def _summed_influence(run: RunDirectory, name: str) -> dict[str, Any]:
    """Means over the rows of an influence table, beside the mean standard error."""
    import polars as pl

    means = ("early", "late", "total", "total_se", "energy")
    frame = run.influence(name)
    row = frame.select(
        pl.len().alias("rows"),
        (pl.col("total") > 0).mean().alias("helping"),
        *(pl.col(column).mean() for column in means),
    ).collect()
    return {"query": name, "kind": run.influence_entry(name).kind, **row.to_dicts()[0]}


# -- index ----------------------------------------------------------------------------------------


def build_run_index(path: Path, set_name: str, *, overwrite: bool, console: Console) -> None:
    """Build the search index of a set, where it is missing or out of date."""
    from curate.index import build_index

    run = RunDirectory.open(path)
    build_index(run, set_name, overwrite=overwrite)
    console.log(f"      the index of {set_name} is in {run.index_directory}")


def nearest_rows(
    path: Path,
    *,
    row: int | None,
    row_id: str | None,
    step: int,
    k: int,
    query: str | None,
    console: Console,
) -> pl.DataFrame:
    """The k (row, step) with the largest M to one row, given by number or by id, at one step."""
    from curate.index import neighbours

    run = RunDirectory.open(path)
    if row is None:
        ids = run.ids(query or "train")
        if row_id not in ids:
            raise UsageError(f"set {query or 'train'!r} has no row with the id {row_id!r}")
        row = ids.index(row_id)
    return neighbours(run, row=row, step=step, k=k, query=query, log=console.log)


# -- rank, filter, reweight, export ---------------------------------------------------------------


def rank_rows(path: Path, query: str | None, **settings: Any) -> pl.DataFrame:
    """The rows of a run in the order of their influence; see `curate.rank.rank`."""
    from curate.rank import rank

    return rank(RunDirectory.open(path), query, **settings)


def filter_rows(
    path: Path,
    query: str | None,
    name: str,
    rules: Mapping[str, Any],
    *,
    overwrite: bool = False,
    dry_run: bool = False,
) -> pl.DataFrame:
    """Decide which rows are kept, and sum the decisions up by source and by reason."""
    from curate.filter import FilterConfig, decided
    from curate.filter import filter as decide
    from curate.rank import default_query
    from curate.strict import validated

    config = validated(FilterConfig, dict(rules), "filter")
    run = RunDirectory.open(path)
    if dry_run:
        return summed_decisions(decided(run, default_query(run, query), config))
    with run.writing():
        return summed_decisions(decide(run, query, name, config, overwrite=overwrite))


def summed_decisions(decisions: pl.DataFrame) -> pl.DataFrame:
    """Per source: rows, kept, the share kept, the mean score, and the reasons of the dropped."""
    import polars as pl

    if "source" not in decisions.columns:
        decisions = decisions.with_columns(pl.lit("all").alias("source"))
    kept = pl.col("kept")
    return (
        decisions.group_by("source")
        .agg(
            pl.len().alias("rows"),
            kept.sum().alias("kept"),
            kept.mean().alias("share"),
            pl.col("score").mean().alias("mean score"),
            pl.col("score").filter(kept).mean().alias("mean score kept"),
            pl.col("rule").filter(~kept).drop_nulls().unique().sort().alias("dropped because"),
        )
        .sort("source")
    )


def reweight_rows(
    path: Path,
    selection: str,
    settings: Mapping[str, Any],
    *,
    overwrite: bool = False,
    dry_run: bool = False,
) -> pl.DataFrame:
    """Give a selection's kept rows weights, and sum the weights up by source."""
    from curate.reweight import ReweightConfig, reweight, reweight_frame
    from curate.strict import validated

    config = validated(ReweightConfig, dict(settings), "reweight")
    run = RunDirectory.open(path)
    entry = run.selection_entry(selection)
    there = entry.config.get("reweight")
    if dry_run:
        if config.by is not None:
            raise UsageError("--dry-run shows weights by the selection's own score; leave --by out")
        return summed_weights(reweight_frame(run.selection(selection).collect(), config))
    if there is not None and not overwrite and there != config.model_dump():
        raise CurateError(f"selection {selection!r} has weights already; --overwrite replaces them")
    with run.writing():
        return summed_weights(reweight(run, selection, config))


def summed_weights(decisions: pl.DataFrame) -> pl.DataFrame:
    """Per source: kept rows, and the smallest, mean and largest weight."""
    import polars as pl

    weight = pl.col("weight")
    return (
        decisions.filter(pl.col("kept"))
        .group_by("source")
        .agg(
            pl.len().alias("kept"),
            weight.min().alias("smallest"),
            weight.mean().alias("mean"),
            weight.max().alias("largest"),
        )
        .sort("source")
    )


def export_selection(
    path: Path,
    selection: str,
    directory: Path,
    *,
    columns: Sequence[str] | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> str:
    """Write a selection as a dataset directory; returns the line that says so."""
    from curate.export import export

    run = RunDirectory.open(path)
    entry = run.selection_entry(selection)
    what = f"{entry.kept:,} of {entry.rows:,} rows"
    if dry_run:
        return f"would write {what} to {directory}"
    written = export(run, selection, directory, overwrite=overwrite, columns=columns)
    return f'{what} are in {written}: datasets.load_dataset("{written}") reads them'
