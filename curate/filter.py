"""Which rows are kept, and for each that is not, the first rule that dropped it.

The rules apply in this order, each to what the ones before it left: leaks, `where`, a missing
score, `quantile`, `quotas`, one of `top`, `fraction` and `round_robin`, and the token budget.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import polars as pl
from pydantic import BaseModel, ConfigDict, Field

from curate.errors import CurateError, UsageError
from curate.manifest import SelectionEntry
from curate.rank import default_query, from_examples, scored

if TYPE_CHECKING:
    from curate.rundir import RunDirectory

KEPT = "kept"
NEEDED = ("row", "id", "source", "tokens", "leaks")
"""Columns that the rules speak of, beside those of the score and the condition."""


class FilterConfig(BaseModel):
    """The rules. `quotas`: by source, at most this many rows (above 1) or this share of its rows
    (up to 1); a source that is not named has no quota. `round_robin`: this many rows in all, taken
    by the queries in turn, each its best row that is left. `quantile`: drop what scores worse than
    this quantile. `tokens`: best rows first until the next would exceed this many tokens.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    by: str = "total"
    descending: bool = True
    where: str | None = None
    top: int | None = Field(default=None, ge=1)
    fraction: float | None = Field(default=None, gt=0, le=1)
    quantile: float | None = Field(default=None, ge=0, le=1)
    round_robin: int | None = Field(default=None, ge=1)
    tokens: int | None = Field(default=None, ge=1)
    quotas: dict[str, float] = {}
    drop_leaks: bool = True


def decide(
    frame: pl.DataFrame, config: FilterConfig, tops: pl.DataFrame | None = None
) -> pl.DataFrame:
    """row, id, source, kept, rule, score, score_se, rank, weight for every row of `frame`.

    `frame` needs row and what `config` speaks of (`source`, `tokens`, `leaks`); `tops` needs
    query_row, row and rank (1 is best), for `round_robin`. `rule` is "kept" or why the row was
    dropped; `rank` is among the rows that have a score and pass `where`. `weight` is 1 or 0.

    Raises:
        UsageError: rules that contradict each other, or name what `frame` does not have.
    """
    _check(frame, config, tops)
    found = scored(frame, config.by, descending=config.descending, where=config.where)
    found = found.with_columns(pl.lit(None, dtype=pl.String).alias("rule"))
    if config.drop_leaks and "leaks" in found.columns:
        found = _drop(found, pl.col("leaks").list.len() > 0, "same content as a query")
    found = _drop(found, ~pl.col("passes"), f"not {config.where}")
    found = _drop(found, pl.col("score").is_null(), "no score")
    found = _by_quantile(found, config)
    found = _by_quota(found, config.quotas)
    found = _by_count(found, config, tops)
    found = _by_tokens(found, config.tokens)
    kept = pl.col("rule").is_null()
    found = found.with_columns(
        kept.alias("kept"), kept.cast(pl.Float64).alias("weight"), pl.col("rule").fill_null(KEPT)
    )
    named = ("row", "id", "source", "kept", "rule", "score", "score_se", "rank", "weight")
    return found.select(name for name in named if name in found.columns).sort("row")


def _check(frame: pl.DataFrame, config: FilterConfig, tops: pl.DataFrame | None) -> None:
    """Refuse rules that exclude each other or need a column that is not there."""
    counts = [name for name in ("top", "fraction", "round_robin") if getattr(config, name)]
    if len(counts) > 1:
        raise UsageError(f"{' and '.join(counts)} each say how many rows to keep; give one of them")
    if config.round_robin and tops is None:
        raise UsageError("round_robin needs the best rows of each query; score with top_k first")
    for rule, column in (("quotas", "source"), ("tokens", "tokens")):
        if getattr(config, rule) and column not in frame.columns:
            raise UsageError(f"{rule} needs a column {column!r}; there are {frame.columns}")
    bad = [f"{name}: {quota:g}" for name, quota in config.quotas.items() if not quota >= 0]
    if bad:
        raise UsageError(f"quotas must be 0 or more, seen {', '.join(bad)}")
    if config.quotas:
        sources = set(frame["source"].unique().to_list())
        unknown = sorted(set(config.quotas) - sources)
        if unknown:
            there = ", ".join(sorted(map(str, sources)))
            raise UsageError(f"quotas name {', '.join(unknown)}; the sources are {there}")


def _drop(frame: pl.DataFrame, bad: pl.Expr, reason: str) -> pl.DataFrame:
    """Give `reason` to the rows where `bad` holds that no earlier rule dropped."""
    rule = pl.when(pl.col("rule").is_null() & bad.fill_null(False)).then(pl.lit(reason))
    return frame.with_columns(rule.otherwise(pl.col("rule")).alias("rule"))


def _standing(frame: pl.DataFrame) -> pl.DataFrame:
    """The rows that are still in, best first."""
    return frame.filter(pl.col("rule").is_null()).sort("rank")


def _keep_only(frame: pl.DataFrame, rows: pl.Series, reason: str) -> pl.DataFrame:
    return _drop(frame, ~pl.col("row").is_in(rows.implode()), reason)


def _by_quantile(frame: pl.DataFrame, config: FilterConfig) -> pl.DataFrame:
    if config.quantile is None:
        return frame
    level = config.quantile if config.descending else 1 - config.quantile
    bound = _standing(frame)["score"].quantile(level, "linear")
    if bound is None:
        return frame
    worse = pl.col("score") < bound if config.descending else pl.col("score") > bound
    return _drop(frame, worse, f"worse than quantile {config.quantile:g}")


def _by_quota(frame: pl.DataFrame, quotas: Mapping[str, float]) -> pl.DataFrame:
    standing = _standing(frame)
    for source, quota in quotas.items():
        own = standing.filter(pl.col("source") == source)["row"]
        count = round(quota * len(own)) if quota <= 1 else int(quota)
        over = pl.col("row").is_in(own[count:].implode())
        frame = _drop(frame, over, f"over the quota of {source} ({quota:g})")
    return frame


def _by_count(frame: pl.DataFrame, config: FilterConfig, tops: pl.DataFrame | None) -> pl.DataFrame:
    standing = _standing(frame)["row"]
    if config.top:
        return _keep_only(frame, standing.head(config.top), f"not in the top {config.top}")
    if config.fraction:
        count = max(1, round(config.fraction * len(standing)))
        return _keep_only(frame, standing.head(count), f"not in the best {config.fraction:g}")
    if config.round_robin and tops is not None:
        taken = take_turns(tops, set(standing.to_list()), config.round_robin)
        rows = pl.Series(taken, dtype=frame["row"].dtype)
        return _keep_only(frame, rows, f"not among {config.round_robin} taken in turn")
    return frame


def take_turns(tops: pl.DataFrame, allowed: set[int], count: int) -> list[int]:
    """Up to `count` rows: in each round every query takes its best allowed row not yet taken.

    `tops` has query_row, row, rank. Queries go in order of query_row. Fewer rows come back where
    the lists run out.
    """
    # Groups are taken in order, so that the same table always gives the same rows.
    ordered = tops.sort("query_row", "rank", "row")
    lists = [
        iter(group["row"].to_list())
        for _, group in ordered.group_by("query_row", maintain_order=True)
    ]
    taken: dict[int, None] = {}
    while lists and len(taken) < count:
        still = []
        for queue in lists:
            row = next((row for row in queue if row in allowed and row not in taken), None)
            if row is not None and len(taken) < count:
                taken[row] = None
                still.append(queue)
        lists = still
    return list(taken)


def _by_tokens(frame: pl.DataFrame, budget: int | None) -> pl.DataFrame:
    if budget is None:
        return frame
    standing = _standing(frame)
    within = standing.filter(pl.col("tokens").cast(pl.Int64).cum_sum() <= budget)["row"]
    return _keep_only(frame, within, f"over the budget of {budget} tokens")


def decided(run: RunDirectory, query: str, rules: FilterConfig) -> pl.DataFrame:
    """The decision on every training row of a run, from no more columns than the rules name.

    Raises UsageError as `decide`.
    """
    has_tops = rules.round_robin and run.influence_entry(query).tops
    tops = run.tops(query).collect() if has_tops else None
    work = partial(decide, config=rules, tops=tops)
    return from_examples(run, query, work, rules.by, rules.where, NEEDED)


def filter(
    run: RunDirectory,
    query: str | None = None,
    name: str = "curated",
    rules: FilterConfig | None = None,
    *,
    overwrite: bool = False,
) -> pl.DataFrame:
    """Decide on every training row of a run, record it as selection `name`, return the decisions.

    Raises:
        UsageError: the rules do not fit the run, or nothing is left.
        CurateError: the run has a selection of this name made by other rules, and not `overwrite`.
    """
    rules = rules or FilterConfig()
    query = default_query(run, query)
    config = {"query": query, **rules.model_dump()}
    there = run.manifest.selections.get(name)
    if there is not None and not overwrite and there.config.get("filter") != config:
        raise CurateError(f"the run has another selection {name!r}; --overwrite replaces it")
    decisions = decided(run, query, rules)
    if not decisions["kept"].any():
        reasons = decisions["rule"].value_counts(sort=True).head(3).rows()
        seen = "; ".join(f"{count} rows {rule}" for rule, count in reasons)
        raise UsageError(f"the rules leave no row ({seen}); loosen them")
    entry = SelectionEntry(
        query=query,
        train_set=run.influence_entry(query).train_set,
        rows=decisions.height,
        kept=int(decisions["kept"].sum()),
        config={"filter": config},
    )
    return record(run, name, entry, decisions)


def record(
    run: RunDirectory, name: str, entry: SelectionEntry, decisions: pl.DataFrame
) -> pl.DataFrame:
    """Write the decisions and list them in the manifest as selection `name`."""
    path = run.selection_directory(name) / "decisions.parquet"
    file = run.write_table(path, decisions, (0, decisions.height))
    run.add_selection(name, entry.model_copy(update={"files": (file,)}))
    return decisions
