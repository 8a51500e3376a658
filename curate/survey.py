"""The best training rows of each of many queries, in one pass that keeps no matrix.

Scores of single queries are a million rows times every query; nobody wants them all. A pass over
the training sketches makes in float32 what the rows of a block are ranked by and both windows, adds
up the mean and the spread of the windows, and keeps the rows that rank among each query's best so
far. Whoever wants all columns of those rows scores them again, exactly.

Letters: Q queries, k rows kept, τ steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch

from curate.columns import Moments
from curate.product import Product
from curate.queryvectors import QueryVectors
from curate.scratch import Progress
from curate.surveyplan import Hits, Keys, Masks, Ranking, Rows, not_finite, planned
from curate.workers import in_order


@dataclass(frozen=True)
class Found:
    """What a survey leaves: the best rows (Q, k), in no order that counts, and moments (2, Q)."""

    rows: Rows
    moments: Moments


def survey(
    product: Product,
    vectors: Sequence[QueryVectors],
    masks: Masks,
    ranking: Ranking,
    keep: int,
    progress: Progress | None = None,
    *,
    first: int = 0,
) -> Found:
    """Go over all training rows once.

    Args:
        vectors: by checkpoint, of single queries: each is a group of its own.
        masks: which steps of each query are early, and which late; (Q, τ) each.
        keep: k; all rows where there are no more.
        first: row of the first query in its set, for an error.

    Raises:
        CurateError: scores that are NaN or infinite, which nothing can be ranked by.
    """
    _check_queries(vectors, first)
    taken, bound = planned(product, vectors, masks, ranking)
    best = _Best(bound.shape[1], min(keep, product.rows))
    moments: list[Moments] = []

    def work(start: int, stop: int) -> tuple[Moments, Hits]:
        own, hits = taken.of(product, bound, best.threshold, start, stop)
        return own, best.of_block(hits, start, stop)

    def take(stop: int, own: Moments, hits: Hits) -> None:
        moments[:] = [Moments.together([*moments, own])]
        best.offer(*hits)
        if progress:
            progress(stop, product.rows)

    first_block, *blocks = product.blocks(bound, 0, product.rows)
    take(first_block[1], *work(*first_block))
    best.settle()  # the others have something to exceed
    with closing(in_order(work, blocks, threads=product.threads)) as results:
        for (_, stop), found in results:
            take(stop, *found)
    return Found(best.rows(), moments[0])


def _check_queries(vectors: Sequence[QueryVectors], first: int) -> None:
    """Refuse queries whose vectors are not finite at some checkpoint."""
    finite = [np.isfinite(one.values).all(axis=(0, 2, 3)) for one in vectors]
    bad = np.flatnonzero(~np.all(finite, axis=0))
    if len(bad):
        raise not_finite("query", bad + first)


class _Best:
    """The k best rows of each query so far; of equals the first.

    `threshold` (Q,) is what a later row has to exceed. Rows are offered in rising order, so a row
    that equals it comes too late.
    """

    def __init__(self, queries: int, keep: int) -> None:
        least = -torch.inf if keep else torch.inf
        self.threshold = torch.full((queries,), least, dtype=torch.float32, device="cpu")
        self._keep, self._queries = keep, queries
        self._parts: list[Hits] = []
        self._waiting = 0

    def offer(self, query: Rows, row: Rows, key: Keys) -> None:
        """Rows with the queries they may be among the best of."""
        if len(key):
            self._parts.append((query, row, key))
            self._waiting += len(key)
        if self._waiting > self._queries * (16 + self._keep // 4):
            self.settle()

    def of_block(self, hits: Hits, start: int, stop: int) -> Hits:
        """Those of a block's hits that could be of the k best; any thread may ask."""
        query, row, key = hits
        size = stop - start
        if len(key) <= self._queries * self._keep or not 0 < self._keep < size:
            return hits
        keys = np.full((self._queries, size), -np.inf, np.float32)
        keys[query, row - start] = key
        least = np.partition(keys, size - self._keep, axis=1)[:, size - self._keep]
        good = key >= least[query]
        return query[good], row[good], key[good]

    def settle(self) -> None:
        """Keep the best of what was offered; what comes later has to exceed them."""
        if not self._parts:
            return
        query, row, key = (np.concatenate(part) for part in zip(*self._parts, strict=True))
        order = np.lexsort((row, -key, query))
        query, row, key = query[order], row[order], key[order]
        place = np.arange(len(query)) - np.searchsorted(query, np.arange(self._queries))[query]
        best = place < self._keep
        last = np.flatnonzero(place == self._keep - 1)
        threshold = self.threshold.clone()
        threshold[torch.from_numpy(query[last])] = torch.from_numpy(key[last])
        self.threshold = threshold
        self._parts = [(query[best], row[best], key[best])]
        self._waiting = 0

    def rows(self) -> Rows:
        """The rows kept, (Q, k); (Q, 0) where none was offered."""
        self.settle()
        if not self._parts:
            return np.empty((self._queries, 0), dtype=np.int64)
        return self._parts[0][1].reshape(self._queries, self._keep)
