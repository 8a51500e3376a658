"""Rows in order of a score: a column of the influence table, or a formula over it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import polars as pl
from polars import selectors

from curate.errors import UsageError
from curate.query import evaluate
from curate.sandboxed import prepared

if TYPE_CHECKING:
    from curate.rundir import RunDirectory

Tables = tuple[pl.LazyFrame, pl.LazyFrame]
Result = TypeVar("Result")
SHOWN = ("row", "id", "source", "score", "score_se", "rank")
_EXPANDS = re.compile(
    r"""\b(?:columns|frame)\b | \# | -- | /\*
    | (?:^ | [^\w)\]}"'\s*] | \b(?:by|distinct|all)) \s* \*""",
    re.VERBOSE | re.IGNORECASE,
)
"""SQL that may reach columns without their names: COLUMNS(…), the row as a whole, #1, a star that
multiplies nothing (comments could hide one). It may find too much, never too little."""


@dataclass(frozen=True)
class RankConfig:
    """What to order by (a column or an SQL expression), which end first, which rows, how many."""

    by: str = "total"
    descending: bool = True
    where: str | None = None
    top: int | None = None


def scored(
    frame: pl.DataFrame,
    by: str,
    *,
    descending: bool = True,
    where: str | None = None,
    columns: pl.DataFrame | None = None,
) -> pl.DataFrame:
    """`frame` with score, score_se (where `by` is a column that has one), rank, and `passes`.

    `rank` counts from 1 among all rows that have a score and pass; ties go by `row`. A score that
    is NaN counts as none. `passes` is False where `where` is false or NULL. `columns` are the score
    and the condition of these rows where `evaluated` has given them before.

    Raises:
        UsageError: `by` is not a number for each row, or `where` is not a condition.
    """
    known = evaluated(frame, by, where) if columns is None else columns
    found = frame.drop("score", "score_se", "rank", "passes", strict=False).with_columns(
        known["score"], _standard_error(frame, by).alias("score_se"), known["passes"]
    )
    order = (
        found.filter(pl.col("passes") & pl.col("score").is_not_null())
        .sort("score", "row", descending=[descending, False])
        .select("row")
        .with_row_index("rank", 1)
        .select("row", pl.col("rank").cast(pl.Int64))
    )
    return found.join(order, on="row", how="left", maintain_order="left")


def evaluated(frame: pl.DataFrame, by: str, where: str | None) -> pl.DataFrame:
    """`score` (float64, NULL where NaN) and `passes` of the rows of `frame`; names need no SQL.

    Raises UsageError as `scored`.
    """
    expressions = {} if by in frame.columns else {"by": by}
    if where is not None:
        expressions["where"] = where
    found = evaluate(frame, expressions) if expressions else pl.DataFrame()
    score = frame[by] if by in frame.columns else found["by"]
    if not score.dtype.is_numeric():
        raise UsageError(f"--by {by!r} gives {score.dtype}, expected numbers to order rows by")
    passes = pl.repeat(True, frame.height, eager=True) if where is None else found["where"]
    if passes.dtype not in (pl.Boolean, pl.Null):
        raise UsageError(
            f"--where {where!r} gives {passes.dtype}, expected a condition like total > 0"
        )
    return pl.DataFrame(
        {
            "score": score.cast(pl.Float64).fill_nan(None),
            "passes": passes.cast(pl.Boolean).fill_null(False),
        }
    )


def _standard_error(frame: pl.DataFrame, by: str) -> pl.Series:
    """The column `<by>_se`, or nulls: a formula's standard error is not known."""
    if by in frame.columns and f"{by}_se" in frame.columns:
        return frame[f"{by}_se"].cast(pl.Float64)
    return pl.repeat(None, frame.height, dtype=pl.Float64, eager=True)


def rank_frame(
    frame: pl.DataFrame, config: RankConfig, columns: pl.DataFrame | None = None
) -> pl.DataFrame:
    """The rows of `frame` that pass, best first; score and rank beside what identifies them.

    `columns` as for `scored`. Raises UsageError for what that refuses, or a `top` below 1.
    """
    if config.top is not None and config.top < 1:
        raise UsageError(f"--top is {config.top}, expected 1 or more")
    found = scored(
        frame, config.by, descending=config.descending, where=config.where, columns=columns
    )
    best = _arranged(found.filter(pl.col("rank").is_not_null()).sort("rank"))
    return best if config.top is None else best.head(config.top)


def _arranged(best: pl.DataFrame) -> pl.DataFrame:
    """What identifies a row first, its text last."""
    last = [name for name in ("text",) if name in best.columns]
    first = [name for name in SHOWN if name in best.columns]
    rest = [name for name in best.columns if name not in {*first, *last, "passes"}]
    return best.select(*first, *rest, *last)


def default_query(run: RunDirectory, query: str | None) -> str:
    """`query`, or the one query set whose mean was scored; UsageError where it is unclear."""
    if query is not None:
        return query
    means = [name for name, entry in run.manifest.influence.items() if entry.group is None]
    if len(means) == 1:
        return means[0]
    known = ", ".join(means) or "none yet: run `curate score` first"
    raise UsageError(f"say which query to go by with --query (scored: {known})")


def from_examples(
    run: RunDirectory,
    query: str,
    work: Callable[[pl.DataFrame], Result],
    by: str,
    where: str | None = None,
    needed: Sequence[str] = (),
) -> Result:
    """What `work` makes of every training row with its influence on `query`, by row.

    It is given the columns that are `needed` and those that `by` and `where` name; or all, where
    these may mean columns that they do not name, or where it raises UsageError, whose message says
    which columns there are.
    """
    train = run.influence_entry(query).train_set
    whole = _joined((run.influence(query), run.examples(train))).sort("row")
    if not any(_EXPANDS.search(text) for text in (by, where or "")):
        wanted = {*_named(whole, by, where), *needed}
        with suppress(UsageError):
            return work(whole.select(selectors.by_name(*wanted, require_all=False)).collect())
    return work(whole.collect())


def _joined(tables: Tables, rows: list[int] | None = None) -> pl.LazyFrame:
    """Both the influence and the rows, unread but for losses and in the order of the rows' table;
    of some rows on request.
    """
    influence, examples = tables
    known = set(influence.collect_schema().names()) - {"row"}
    ours = [name for name in examples.collect_schema().names() if name not in known]
    if rows is not None:  # on both sides, so that neither is read whole
        influence, examples = (
            table.filter(pl.col("row").is_in(rows)) for table in (influence, examples)
        )
    return examples.select(ours).join(influence, on="row", how="left", maintain_order="left")


def _ranked(
    tables: Tables, joined: Callable[..., pl.LazyFrame], config: RankConfig
) -> pl.DataFrame:
    """The best rows, from no more columns than the configuration names; arguments as for `_rank`.

    Read whole, they go to SQL in the order of the rows, as all columns would: a window function
    without ORDER BY sees the same neighbours. A join of the Parquet files in SQL keeps no order.
    """
    influence = tables[0]
    ours, theirs = (_named(table, config.by, config.where) for table in tables)
    alone = config.by in ours and config.where is None  # a row without has no rank
    if not alone:
        alone = set(theirs) <= {"row", *ours} and _same_rows(tables)
    table = influence if alone else joined()
    frame = table.select(_named(table, config.by, config.where)).collect().sort("row")
    columns = evaluated(frame, config.by, config.where)
    front = _front(columns, config)
    return rank_frame(frame.filter(front), config, columns.filter(front))


def _named(table: pl.LazyFrame, by: str, where: str | None) -> list[str]:
    """The columns of a table that a score and a condition may name, the error, and `row`."""
    text = f"{by} {where or ''}".lower()
    names = table.collect_schema().names()
    return [n for n in names if n in ("row", f"{by}_se") or n.lower() in text]


def _same_rows(tables: Tables) -> bool:
    """Whether every row has an influence, so that a join takes none and adds none."""
    counts = [table.select(pl.len()).collect().item() for table in tables]
    return bool(counts[0] == counts[1])


def _front(columns: pl.DataFrame, config: RankConfig) -> pl.Series:
    """(N,) bool: the rows that reach the `top` place, ties included."""
    score, passes = columns["score"], columns["passes"]
    first = score.filter(passes).drop_nulls()
    if config.top is None or len(first) <= config.top:
        return passes
    if config.descending:
        return passes & (score >= first.top_k(config.top).min()).fill_null(False)
    return passes & (score <= first.bottom_k(config.top).max()).fill_null(False)


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
    or the examples table, or an SQL expression over both. Where only the `top` are asked for, the
    columns that `by` and `where` name are read whole, and the others of those rows alone; where
    they may mean columns that they do not name (`COLUMNS('s0.')`, `*`), all are read whole.
    """
    config = RankConfig(by=by, descending=descending, where=where, top=top)
    name = default_query(run, query)
    influence = run.influence(name)
    examples = partial(run.examples, run.influence_entry(name).train_set)
    tables = influence, examples(())
    plain = by in influence.collect_schema().names()
    is_name = plain or by in tables[1].collect_schema().names()

    def joined(rows: list[int] | None = None) -> pl.LazyFrame:
        return _joined((influence, examples(rows)), rows)

    with nullcontext() if is_name and where is None else prepared():
        return _rank(tables, joined, config, ("" if plain else by, where or ""))


def _rank(
    tables: Tables,
    joined: Callable[..., pl.LazyFrame],
    config: RankConfig,
    expressions: tuple[str, str],
) -> pl.DataFrame:
    """The best rows with all their columns, of which few are read whole where that will do.

    The `tables` may lack losses; `joined` joins them with these, for all rows or for some.
    """
    if config.top is None or config.top < 1 or any(map(_EXPANDS.search, expressions)):
        return rank_frame(joined().sort("row").collect(), config)
    try:
        best = _ranked(tables, joined, config)
    except UsageError:  # the message names the columns there are, so it needs them all
        return rank_frame(joined().sort("row").collect(), config)
    whole = joined(best["row"].sort().to_list()).collect()
    kept = best.select("row", "score", "score_se", "rank")
    found = whole.drop("score", "score_se", "rank", "passes", strict=False).join(kept, on="row")
    return _arranged(found.sort("rank"))
