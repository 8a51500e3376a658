"""Scores of single queries: the best training rows of each, and on request every pair.

Queries are taken in chunks whose vectors fit in memory; each chunk reads the training sketches
once and becomes one file, which is whole when it is there. So an interrupted run goes on with the
next chunk.

Letters: Q queries of the chunk, B rows of a block, k rows kept, τ steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import polars as pl

from curate.blocks import spans
from curate.columns import Moments, finish, step_columns
from curate.errors import UsageError
from curate.influencetable import write_parquet
from curate.manifest import File
from curate.product import EXTRA
from curate.queryvectors import Doubles, Groups

if TYPE_CHECKING:
    from curate.scores import Scoring

Rows = npt.NDArray[np.int64]


def write_tops(scoring: Scoring) -> tuple[File, ...]:
    """The `top_k` rows of each query; file `part-…` holds the queries of one chunk."""
    files = []
    ranked = ranked_by(str(scoring.detail["top_by"]), scoring.side.steps)
    for path, span in _chunks(scoring, "tops"):
        if not path.exists():
            write_parquet(scoring.run, path, [_tops(scoring, span, ranked)], span)
        files.append(scoring.run.file(path, span))
    return tuple(files)


def write_pairs(scoring: Scoring) -> tuple[File, ...]:
    """Every (query, row), sorted by blocks of rows, with contrast as late − early."""
    files = []
    for path, span in _chunks(scoring, "pairs"):
        if not path.exists():
            write_parquet(scoring.run, path, _pairs(scoring, span), span)
        files.append(scoring.run.file(path, span))
    return tuple(files)


def _chunks(scoring: Scoring, table: str) -> Iterator[tuple[Path, tuple[int, int]]]:
    directory = scoring.run.influence_directory(scoring.name, table)
    for number, span in enumerate(spans(0, scoring.side.rows, scoring.group_limit())):
        yield directory / f"part-{scoring.digest}-{number:05d}.parquet", span


def ranked_by(name: str, steps: int) -> tuple[int, ...]:
    """Raw columns whose sum ranks the rows; all steps, by size, for the energy.

    Raises:
        UsageError: there is no such column.
    """
    names = [*step_columns(steps), *EXTRA]
    if name == "energy":
        return tuple(range(steps))
    if name not in {*names[:steps], "total", "early", "late"}:
        raise UsageError(
            f"top_by is {name!r}; expected total, early, late, energy or a step from {names[0]} "
            f"to {names[steps - 1]}"
        )
    return (names.index(name),)


def _blocks(scoring: Scoring, groups: Groups) -> Iterator[tuple[int, Doubles]]:
    """(first row, scores (B, Q, τ + 8)) over the training set."""
    bound = scoring.product.bind(scoring.vectors(groups))
    for start, stop in spans(0, scoring.product.rows, scoring.product.block(bound)):
        yield start, scoring.product.score(bound, start, stop)


def _tops(scoring: Scoring, span: tuple[int, int], ranked: tuple[int, ...]) -> pl.DataFrame:
    groups = Groups.single(*span)
    keep = min(int(scoring.detail["top_k"]), scoring.product.rows)
    best: tuple[Doubles, Rows, Doubles] | None = None
    moments: list[Moments] = []
    for start, raw in _blocks(scoring, groups):
        moments = [Moments.together([*moments, Moments.of(raw)])]
        best = _merge(best, start, raw.transpose(1, 0, 2), ranked, keep)
    if best is None:
        return pl.DataFrame()
    standard = scoring.settings.contrast == "standardised"
    absent = scoring.side.absent(groups)
    errors = scoring.settings.precondition is None
    frames = []
    for query in range(len(groups.names)):
        own = Moments(moments[0].count, moments[0].mean[:, query], moments[0].square[:, query])
        frame = finish(
            best[2][query], own if standard else None, absent=absent[query], errors=errors
        )
        ranks = np.arange(1, len(frame) + 1, dtype=np.int64)
        frames.append(_keyed(frame, span[0] + query, best[1][query], ranks))
    return pl.concat(frames)


def _merge(
    best: tuple[Doubles, Rows, Doubles] | None,
    start: int,
    raw: Doubles,
    ranked: tuple[int, ...],
    keep: int,
) -> tuple[Doubles, Rows, Doubles]:
    """The best `keep` of what was there and of a block (Q, B, τ + 8); ties by row."""
    chosen = raw[..., list(ranked)]
    key = np.nansum(np.abs(chosen), axis=-1) if len(ranked) > 1 else np.nan_to_num(chosen[..., 0])
    rows = np.broadcast_to(np.arange(start, start + raw.shape[1]), key.shape)
    if best is not None:
        key = np.concatenate([best[0], key], axis=1)
        rows = np.concatenate([best[1], rows], axis=1)
        raw = np.concatenate([best[2], raw], axis=1)
    # Rows come in rising order, so that a stable sort settles ties by row.
    order = np.argsort(-key, axis=1, kind="stable")[:, :keep]
    return (
        np.take_along_axis(key, order, axis=1),
        np.take_along_axis(rows, order, axis=1),
        np.take_along_axis(raw, order[..., None], axis=1),
    )


def _keyed(frame: pl.DataFrame, query: int, rows: Rows, ranks: Rows | None = None) -> pl.DataFrame:
    keys = [
        pl.Series("query_row", np.full(len(frame), query, dtype=np.int64)),
        pl.Series("row", rows.astype(np.int64)),
    ]
    if ranks is not None:
        keys.append(pl.Series("rank", ranks))
    return pl.DataFrame(keys).hstack(frame)


def _pairs(scoring: Scoring, span: tuple[int, int]) -> Iterator[pl.DataFrame]:
    groups = Groups.single(*span)
    absent = scoring.side.absent(groups)
    errors = scoring.settings.precondition is None
    for start, raw in _blocks(scoring, groups):
        rows = np.arange(start, start + len(raw))
        yield pl.concat(
            _keyed(
                finish(raw[:, query], None, absent=absent[query], errors=errors),
                span[0] + query,
                rows,
            )
            for query in range(len(groups.names))
        )
