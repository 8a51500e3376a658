"""The best training rows of each of many queries, in one pass that keeps no matrix.

Scores of single queries are a million rows times every query; nobody wants them all. A pass over
the training sketches makes in float32 what the rows of a block are ranked by and both windows, adds
up the mean and the spread of the windows, and keeps the rows that rank among each query's best so
far. Whoever wants all columns of those rows scores them again, exactly.

The windows of a query are sums of its steps. Either the steps are multiplied and their products
added up, or the sums are, whichever are fewer columns: a step is one int8 digit, a sum needs three
(`curate.multiply`).

Letters: Q queries, B rows of a block, k rows kept, τ steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from curate.columns import Moments
from curate.errors import CurateError
from curate.product import Columns, Product
from curate.queryvectors import QueryVectors
from curate.scratch import Progress
from curate.workers import in_order

Rows = npt.NDArray[np.int64]
Vectors = npt.NDArray[np.float32]
Masks = tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]
NAMED = 10
"""How many rows an error names."""


@dataclass(frozen=True)
class Ranking:
    """What orders the rows of a query.

    Attributes:
        name: total, early, late, energy or step.
        step: of the last, its index from 0.
    """

    name: str
    step: int = 0

    @classmethod
    def of(cls, name: str, ranked: tuple[int, ...]) -> Ranking:
        """From a column's name and its place among the raw columns, as `ranked_by` has them."""
        return cls(name) if name in ("total", "early", "late", "energy") else cls("step", ranked[0])


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
    plan, bound = planned(product, vectors, masks, ranking)
    best = _Best(bound.shape[1], min(keep, product.rows))

    def work(start: int, stop: int) -> tuple[Moments, Rows, npt.NDArray[np.float32]]:
        windows, key = plan.read(product.columns(bound, start, stop))
        _check_scores(key, windows, start)
        hits = (key > best.threshold).nonzero(as_tuple=True)
        rows = torch.stack([hits[1], hits[0] + start]).numpy()
        return _moments(windows), rows, key[hits].numpy()

    blocks = product.blocks(bound, 0, product.rows)
    moments: list[Moments] = []
    with closing(in_order(work, blocks, threads=product.threads)) as results:
        for (_, stop), (own, rows, keys) in results:
            moments = [Moments.together([*moments, own])]
            best.offer(rows[0], rows[1], keys)
            if progress:
                progress(stop, product.rows)
    return Found(best.rows(), moments[0])


def _check_queries(vectors: Sequence[QueryVectors], first: int) -> None:
    """Refuse queries whose vectors are not finite at some checkpoint."""
    finite = [np.isfinite(one.values).all(axis=(0, 2, 3)) for one in vectors]
    bad = np.flatnonzero(~np.all(finite, axis=0))
    if len(bad):
        raise _not_finite("query", bad + first)


def _check_scores(key: Tensor, windows: Tensor, start: int) -> None:
    """Refuse scores (B, Q) and (2, B, Q) of rows from `start` that are not finite."""
    if (key.sum() + windows.sum()).isfinite():  # which none of them leaves so; much the sooner
        return
    finite = key.isfinite() & windows.isfinite().all(dim=0)
    if not finite.all():
        raise _not_finite("training", (~finite).any(dim=1).nonzero()[:, 0].numpy() + start)


def _not_finite(side: str, rows: Rows) -> CurateError:
    named = ", ".join(map(str, rows[:NAMED])) + (", …" if len(rows) > NAMED else "")
    return CurateError(
        f"{side} rows {named}: their scores are NaN or infinite, and cannot be ranked. Their "
        "sketches are damaged (check the run with `curate doctor RUN`), or so large that products "
        "overflow float32: then leave these rows out, and sketch and score again"
    )


class _Sums:
    """Products with the windows' own vectors, and with the key's where it is none of their sums.

    Args:
        whole: the windows together are the total.
    """

    def __init__(self, ranking: Ranking, *, whole: bool) -> None:
        self._ranking = ranking
        self._own = ranking.name == "step" or (ranking.name == "total" and not whole)

    def chosen(self, values: Vectors) -> Vectors:
        """What of a checkpoint's vectors (1, G, τ + 2, M) is multiplied."""
        steps, windows = values[:, :, :-2], values[:, :, -2:]
        if not self._own:
            return windows
        step = self._ranking.step
        own = steps.sum(axis=2) if self._ranking.name == "total" else steps[:, :, step]
        return np.concatenate([windows, own[:, :, None]], axis=2)

    def read(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """The windows (2, B, Q) and the key (B, Q) from products (B, 2 or 3, Q)."""
        windows, name = columns[:, :2].movedim(1, 0), self._ranking.name
        if self._own:
            return windows, columns[:, 2]
        return windows, windows.sum(dim=0) if name == "total" else windows[int(name == "late")]


class _Steps:
    """Products with the vectors of all steps, from which windows and key are added up."""

    def __init__(self, ranking: Ranking, masks: Masks) -> None:
        self._ranking, self._shares = ranking, [_shares(mask) for mask in masks]

    def chosen(self, values: Vectors) -> Vectors:
        """What of a checkpoint's vectors (U, G, C, M) is multiplied."""
        return values[:, :, :-2]

    def read(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """The windows (2, B, Q) and the key (B, Q) from products (B, τ, Q)."""
        windows, name = _windows(columns, self._shares), self._ranking.name
        if name in ("early", "late"):
            return windows, windows[int(name == "late")]
        if name == "step":
            return windows, columns[:, self._ranking.step]
        return windows, (columns.abs() if name == "energy" else columns).sum(dim=1)


def planned(
    product: Product, vectors: Sequence[QueryVectors], masks: Masks, ranking: Ranking
) -> tuple[_Sums | _Steps, Columns]:
    """The cheaper way, with what it multiplies; arguments as for `survey`."""
    plans: list[_Sums | _Steps] = [_Steps(ranking, masks)]
    if len(vectors[0].values) == 1 and ranking.name != "energy":  # else each slot has its step only
        plans.append(_Sums(ranking, whole=all(_covered(one.values[0], masks) for one in vectors)))
    bound = [product.bind_columns([plan.chosen(one.values) for one in vectors]) for plan in plans]
    return min(zip(plans, bound, strict=True), key=lambda pair: pair[1].width)


def _covered(values: Vectors, masks: Masks) -> bool:
    """Whether every step that has a vector, in (Q, τ + 2, M), is in just one window, of (Q, τ)."""
    early, late = masks
    return not values[:, :-2][early == late].any()


def _shares(mask: npt.NDArray[np.bool_]) -> list[tuple[int, Tensor | None]]:
    """Steps that a window takes of any query, from (Q, τ); with (Q,) where not of every one."""
    return [
        (step, None if own.all() else torch.from_numpy(own.astype(np.float32)))
        for step, own in enumerate(mask.T)
        if own.any()
    ]


def _windows(steps: Tensor, shares: list[list[tuple[int, Tensor | None]]]) -> Tensor:
    """Early and late, (2, B, Q), from steps (B, τ, Q) and what each window takes of them."""
    out = torch.zeros(2, steps.shape[0], steps.shape[2])
    for window, taken in zip(out, shares, strict=True):
        for step, share in taken:
            if share is None:
                window += steps[:, step]
            else:
                window.addcmul_(steps[:, step], share)
    return out


def _moments(windows: Tensor) -> Moments:
    double = windows.double()
    mean = double.mean(dim=1)
    square = (double - mean[:, None]).square_().sum(dim=1)
    return Moments(windows.shape[1], mean.numpy(), square.numpy())


class _Best:
    """The k best rows of each query so far; of equals the first.

    `threshold` (Q,) is what a later row has to exceed. Rows are offered in rising order, so a row
    that equals it comes too late.
    """

    def __init__(self, queries: int, keep: int) -> None:
        self.threshold = torch.full((queries,), -torch.inf)
        self._keep, self._queries = keep, queries
        self._parts: list[tuple[Rows, Rows, npt.NDArray[np.float32]]] = []
        self._waiting = 0

    def offer(self, query: Rows, row: Rows, key: npt.NDArray[np.float32]) -> None:
        """Rows with the queries they may be among the best of."""
        if len(key):
            self._parts.append((query, row, key))
            self._waiting += len(key)
        if self._waiting > self._queries * (16 + self._keep // 4):
            self._settle()

    def _settle(self) -> None:
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
        self._settle()
        if not self._parts:
            return np.empty((self._queries, 0), dtype=np.int64)
        return self._parts[0][1].reshape(self._queries, self._keep)
