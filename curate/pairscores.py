"""Scores of single queries: the best training rows of each, and on request every pair.

Queries are taken in chunks whose vectors fit in memory; each chunk reads the training sketches
once and becomes one file, which is whole when it is there. So an interrupted run goes on with the
next chunk. The best rows are found by a survey of all of them, and then scored with all columns.

Letters: Q queries of the chunk, B rows of a block, k rows kept, τ steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
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
from curate.product import EXTRA, Product
from curate.queryvectors import Doubles, Groups, QueryVectors
from curate.survey import survey
from curate.surveyplan import Ranking
from curate.workers import in_order

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


def _tops(scoring: Scoring, span: tuple[int, int], ranked: tuple[int, ...]) -> pl.DataFrame:
    groups = Groups.single(*span)
    product, vectors = scoring.product, scoring.vectors(groups)
    early, late = (mask[slice(*span)] for mask in scoring.side.masks)
    ranking = Ranking.of(str(scoring.detail["top_by"]), ranked)
    keep = int(scoring.detail["top_k"])
    found = survey(product, vectors, (early, late), ranking, keep, first=span[0])
    rows, raw = found.rows, np.empty((*found.rows.shape, scoring.side.steps + len(EXTRA)))
    for query, own in enumerate(rows if rows.size else ()):
        own.sort()
        scores = _exact(product, [_single(one, query) for one in vectors], own)
        order = np.argsort(-_key(scores, ranked), kind="stable")  # ties by row
        own[:], raw[query] = own[order], scores[order]
    each = np.repeat(np.arange(len(rows)), rows.shape[1])
    standard = scoring.settings.contrast == "standardised"
    moments = found.moments
    frame = finish(
        raw.reshape(-1, raw.shape[2]),
        Moments(moments.count, moments.mean[:, each], moments.square[:, each])
        if standard
        else None,
        absent=scoring.side.absent(groups)[each],
        errors=scoring.settings.precondition is None,
    )
    ranks = np.tile(np.arange(1, rows.shape[1] + 1, dtype=np.int64), len(rows))
    return _keyed(frame, span[0] + each, rows.ravel(), ranks)


def _exact(product: Product, vectors: list[QueryVectors], rows: Rows) -> Doubles:
    """Scores (k, τ + 8) of one query's rows, as many at once as a block may have."""
    bound = product.bind(vectors)
    pieces = spans(0, len(rows), product.block(bound))
    return np.concatenate([product.score_rows(bound, rows[a:b])[:, 0] for a, b in pieces])


def _single(vectors: QueryVectors, query: int) -> QueryVectors:
    """One of several groups."""
    own = slice(query, query + 1)
    return QueryVectors(vectors.values[:, own], vectors.gram[:, own])


def _key(raw: Doubles, ranked: tuple[int, ...]) -> Doubles:
    """What orders rows of raw scores (B, τ + 8)."""
    chosen = raw[:, list(ranked)]
    key = np.abs(chosen) if len(ranked) > 1 else chosen
    return np.asarray(np.nansum(key, axis=1))


def _keyed(
    frame: pl.DataFrame, queries: Rows, rows: Rows, ranks: Rows | None = None
) -> pl.DataFrame:
    keys = [pl.Series("query_row", queries), pl.Series("row", rows.astype(np.int64))]
    if ranks is not None:
        keys.append(pl.Series("rank", ranks))
    return pl.DataFrame(keys).hstack(frame)


def _pairs(scoring: Scoring, span: tuple[int, int]) -> Iterator[pl.DataFrame]:
    groups = Groups.single(*span)
    absent = scoring.side.absent(groups)
    errors = scoring.settings.precondition is None
    product = scoring.product
    bound = product.bind(scoring.vectors(groups))
    queries = np.arange(*span)

    def work(start: int, stop: int) -> pl.DataFrame:
        raw = product.score(bound, start, stop).transpose(1, 0, 2)
        each = np.repeat(np.arange(len(queries)), stop - start)
        flat = raw.reshape(len(each), -1)
        frame = finish(flat, None, absent=absent[each], errors=errors)
        return _keyed(frame, queries[each], np.tile(np.arange(start, stop), len(queries)))

    blocks = product.blocks(bound, 0, product.rows)
    with closing(in_order(work, blocks, threads=product.threads)) as results:
        yield from (frame for _, frame in results)
