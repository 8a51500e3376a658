"""Rows in order of a score: a column of the influence table, or a formula over it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import polars as pl

from curate.errors import UsageError
from curate.query import evaluate

if TYPE_CHECKING:
    from curate.rundir import RunDirectory

SHOWN = ("row", "id", "source", "score", "score_se", "rank")


@dataclass(frozen=True)
class RankConfig:
    """What to order by (a column or an SQL expression), which end first, which rows, how many."""

    by: str = "total"
    descending: bool = True
    where: str | None = None
    top: int | None = None


def scored(
    frame: pl.DataFrame, by: str, *, descending: bool = True, where: str | None = None
) -> pl.DataFrame:
    """`frame` with score, score_se (where `by` is a column that has one), rank, and `passes`.

    `rank` counts from 1 among all rows that have a score and pass; ties go by `row`. A score that
    is NaN counts as none. `passes` is False where `where` is false or NULL.

    Raises:
        UsageError: `by` is not a number for each row, or `where` is not a condition.
    """
    columns = _columns(frame, by, where)
    score = columns["by"]
    if not score.dtype.is_numeric():
        raise UsageError(f"--by {by!r} gives {score.dtype}, expected numbers to order rows by")
    found = frame.drop("score", "score_se", "rank", "passes", strict=False).with_columns(
        score.cast(pl.Float64).fill_nan(None).alias("score"),
        _standard_error(frame, by).alias("score_se"),
        columns["where"].fill_null(False).alias("passes"),
    )
    order = (
        found.filter(pl.col("passes") & pl.col("score").is_not_null())
        .sort("score", "row", descending=[descending, False])
        .select("row")
        .with_row_index("rank", 1)
        .select("row", pl.col("rank").cast(pl.Int64))
    )
    return found.join(order, on="row", how="left", maintain_order="left")


def _columns(frame: pl.DataFrame, by: str, where: str | None) -> pl.DataFrame:
    """Columns `by` and `where` over the rows of `frame`; plain names need no SQL."""
    expressions = {} if by in frame.columns else {"by": by}
    if where is not None:
        expressions["where"] = where
    plain = {"where": pl.repeat(True, frame.height, eager=True)}
    if by in frame.columns:
        plain["by"] = frame[by]
    found = pl.DataFrame(plain)
    if expressions:
        found = found.with_columns(evaluate(frame, expressions))
    if where is None:
        return found
    if found["where"].dtype not in (pl.Boolean, pl.Null):
        raise UsageError(
            f"--where {where!r} gives {found['where'].dtype}, expected a condition like total > 0"
        )
    return found.with_columns(pl.col("where").cast(pl.Boolean))


def _standard_error(frame: pl.DataFrame, by: str) -> pl.Series:
    """The column `<by>_se`, or nulls: a formula's standard error is not known."""
    if by in frame.columns and f"{by}_se" in frame.columns:
        return frame[f"{by}_se"].cast(pl.Float64)
    return pl.repeat(None, frame.height, dtype=pl.Float64, eager=True)


def rank_frame(frame: pl.DataFrame, config: RankConfig) -> pl.DataFrame:
    """The rows of `frame` that pass, best first; score and rank beside what identifies them.

    Raises UsageError for what `scored` refuses, or a `top` below 1.
    """
    if config.top is not None and config.top < 1:
        raise UsageError(f"--top is {config.top}, expected 1 or more")
    found = scored(frame, config.by, descending=config.descending, where=config.where)
    best = found.filter(pl.col("rank").is_not_null()).sort("rank")
    last = [name for name in ("text",) if name in best.columns]
    first = [name for name in SHOWN if name in best.columns]
    rest = [name for name in best.columns if name not in {*first, *last, "passes"}]
    best = best.select(*first, *rest, *last)
    return best if config.top is None else best.head(config.top)


def default_query(run: RunDirectory, query: str | None) -> str:
    """`query`, or the one query set whose mean was scored; UsageError where it is unclear."""
    if query is not None:
        return query
    means = [name for name, entry in run.manifest.influence.items() if entry.group is None]
    if len(means) == 1:
        return means[0]
    known = ", ".join(means) or "none yet: run `curate score` first"
    raise UsageError(f"say which query to go by with --query (scored: {known})")


def scored_examples(run: RunDirectory, query: str) -> pl.DataFrame:
    """Every training row with its influence on `query` and its example columns, by row."""
    entry = run.influence_entry(query)
    influence = run.influence(query).collect()
    examples = run.examples(entry.train_set).collect()
    ours = [name for name in examples.columns if name == "row" or name not in influence.columns]
    joined = examples.select(ours).join(influence, on="row", how="left", maintain_order="left")
    return joined.sort("row")


def rank(
    run: RunDirectory,
    query: str | None = None,
    by: str = "total",
    descending: bool = True,
    top: int | None = None,
    where: str | None = None,
) -> pl.DataFrame:
    """The rows of a run's training set in order of their influence on `query`.

    `by` is early, late, total, contrast, peak, centre, energy, any other column of the influence
    or the examples table, or an SQL expression over both.
    """
    frame = scored_examples(run, default_query(run, query))
    return rank_frame(frame, RankConfig(by=by, descending=descending, where=where, top=top))
