"""The query side of a score: what each training sketch is multiplied with.

A score is linear in the query's step vectors, so that the mean over a group of queries is the
product with the mean of their vectors, exactly. For each checkpoint a group has the vectors of its
steps and of its two windows, every member with the windows of its own depth.

*Tied* models have one slot of τ + 2 vectors (steps, early, late), multiplied with the training
totals. *Untied* models have τ slots of 3 (the step itself, its part of early, of late), each
multiplied with the training step of the same number.

`kind="cosine"` divides each member's step vector by its norm over all checkpoints,
√(Σ_k η_k ‖φ_t‖²), before anything is added up; so total, early and late stay sums of steps, and
the mean over a group stays the mean of its members' scores.

Letters: Q queries, G groups, τ steps, U slots, C vectors a slot, M sketch dimension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from curate.blocks import SketchRows, block_rows, open_rows, spans
from curate.windows import Windows

if TYPE_CHECKING:
    from curate.rundir import RunDirectory

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Groups:
    """Which queries make up which group.

    Attributes:
        names: G labels.
        codes: (Q,) the group of each query, or -1.
        overall: the first group is all queries, and `codes` count from 1.
        first: number of the query that `codes` starts with.
    """

    names: tuple[str, ...]
    codes: npt.NDArray[np.int64]
    overall: bool = False
    first: int = 0

    def weights(self, start: int, stop: int) -> Doubles:
        """Share of each query in each group's mean, (stop - start, G)."""
        sizes = np.bincount(self.codes[self.codes >= 0], minlength=len(self.names)).astype(float)
        codes = self.codes[start - self.first : stop - self.first]
        out = np.zeros((len(codes), len(self.names)))
        inside = np.flatnonzero(codes >= 0)
        out[inside, codes[inside]] = 1.0 / sizes[codes[inside]]
        if self.overall:
            out[:, 0] = 1.0 / len(self.codes)
        return out

    @classmethod
    def single(cls, start: int, stop: int) -> Groups:
        """Each query of a range as a group of its own."""
        names = tuple(str(row) for row in range(start, stop))
        return cls(names, np.arange(stop - start), first=start)


@dataclass(frozen=True)
class QueryVectors:
    """All groups at one checkpoint.

    Attributes:
        values: float32 (U, G, C, M).
        gram: float64 (U, G, C + 2): squared norms of the C vectors, then that of the sum of the
            slot's steps, then the inner product of early with late.
    """

    values: npt.NDArray[np.float32]
    gram: Doubles

    @classmethod
    def of(cls, values: Doubles) -> QueryVectors:
        """Vectors with the inner products that standard errors need."""
        early, late = values[:, :, -2], values[:, :, -1]
        total = values[:, :, :-2].sum(axis=2)
        squares = np.einsum("ugcm,ugcm->ugc", values, values)
        extra = [np.einsum("ugm,ugm->ug", total, total), np.einsum("ugm,ugm->ug", early, late)]
        return cls(values.astype(np.float32), np.concatenate([squares, np.stack(extra, 2)], 2))


class QuerySide:
    """The step sketches of a query set at all checkpoints.

    Args:
        weights: η_k by checkpoint.
    """

    def __init__(
        self,
        run: RunDirectory,
        set_name: str,
        weights: Mapping[str, float],
        windows: Windows,
        *,
        cosine: bool,
        tied: bool,
    ) -> None:
        self.weights = dict(weights)
        self.sources = {name: open_rows(run, set_name, name, "steps") for name in weights}
        self.rows = next(iter(self.sources.values())).rows
        self.steps = max(source.slots for source in self.sources.values())
        self.tied = tied
        joint, last = self._norms()
        self.depths = last
        self.masks = windows.masks(last, self.steps)
        with np.errstate(divide="ignore"):
            self._scale = np.where(joint > 0, 1.0 / joint, 0.0) if cosine else np.ones_like(joint)

    @property
    def columns(self) -> int:
        """U · C, how many vectors a group has."""
        return self.steps + 2 if self.tied else 3 * self.steps

    def _norms(self) -> tuple[Doubles, npt.NDArray[np.int64]]:
        """Norms over all checkpoints (Q, τ), and each query's depth (Q,)."""
        squares = np.zeros((self.rows, self.steps))
        depths = np.zeros(self.rows, dtype=np.int64)
        numbers = np.arange(1, self.steps + 1)
        for name, source in self.sources.items():
            norm = _widen(source.norms().astype(np.float64), self.steps)
            squares += self.weights[name] * norm**2
            depths = np.maximum(depths, ((norm > 0) * numbers).max(axis=1))
        return np.sqrt(squares), depths

    def absent(self, groups: Groups) -> npt.NDArray[np.bool_]:
        """Steps that no member of a group has, (G, τ)."""
        first = groups.first
        has = np.arange(1, self.steps + 1) <= self.depths[:, None]
        last = first + len(groups.codes)
        weights = groups.weights(first, last)
        return np.asarray(weights.T @ has[first:last].astype(float) == 0)

    def vectors(self, groups: Groups) -> list[Doubles]:
        """The groups' vectors, an array (U, G, C, M) for each checkpoint."""
        return [self._at(source, groups) for source in self.sources.values()]

    def _at(self, source: SketchRows, groups: Groups) -> Doubles:
        count, first = len(groups.names), groups.first
        steps = np.zeros((count, self.steps, source.dim))
        slots = 1 if self.tied else self.steps
        window = np.zeros((2, count, slots, source.dim))
        for start, stop in spans(
            first, first + len(groups.codes), block_rows(2 * self.steps, source.dim)
        ):
            share = groups.weights(start, stop).T.astype(np.float32)
            block = self._read(source, start, stop)
            steps += _mix(share, block)
            for out, mask in zip(window, self.masks, strict=True):
                masked = block * mask[start:stop, :, None]
                out += _mix(share, masked.sum(axis=1, keepdims=True) if self.tied else masked)
        if self.tied:
            return np.concatenate([steps, window[0], window[1]], axis=1)[None]
        return np.stack([steps, window[0], window[1]], axis=2).transpose(1, 0, 2, 3)

    def _read(self, source: SketchRows, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Queries start..stop, scaled, float32 (rows, τ, M)."""
        block = source.read(start, stop)
        factor = block.scale * self._scale[start:stop, : source.slots].astype(np.float32)
        values = block.values.astype(np.float32)
        values *= factor[:, :, None]
        missing = self.steps - source.slots
        return np.pad(values, ((0, 0), (0, missing), (0, 0))) if missing else values


def group_rows(labels: Sequence[object] | None, rows: int) -> Groups:
    """All queries as the first group and, with labels, one group for each of them."""
    if labels is None:
        return Groups(("",), np.full(rows, -1, dtype=np.int64), overall=True)
    named = ["(none)" if label is None else str(label) for label in labels]
    names = sorted(set(named))
    place = {name: number for number, name in enumerate(names, start=1)}
    codes = np.array([place[name] for name in named], dtype=np.int64)
    return Groups(("", *names), codes, overall=True)


def part_of(groups: Groups, start: int, stop: int) -> Groups:
    """Groups start..stop only, for passes that cannot hold all their vectors at once."""
    inside = (groups.codes >= start) & (groups.codes < stop)
    codes = np.where(inside, groups.codes - start, -1)
    overall = groups.overall and start == 0
    return replace(groups, names=groups.names[start:stop], codes=codes, overall=overall)


def _mix(share: npt.NDArray[np.float32], block: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """(G, rows) times (rows, U, M) → (G, U, M)."""
    rows, slots, dim = block.shape
    return (share @ block.reshape(rows, slots * dim)).reshape(-1, slots, dim)


def _widen(array: Doubles, steps: int) -> Doubles:
    return np.pad(array, ((0, 0), (0, steps - array.shape[1])))
