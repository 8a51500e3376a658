"""Search over sketches: which (row, step) have the largest inner product with a given vector.

The vector of (row, step) is Σ_k √η_k · sketch_k; hashes of different checkpoints are independent,
so an inner product of two of them estimates M_{s,t} summed over the checkpoints. Two indexes are
made: `steps`, and of tied models `totals`, which answers with SDI_t.

Gradient norms have heavy tails, which is where graphs and cells lose the true neighbours. Here
vectors are sorted by norm into `bands`. A search goes down the bands until Cauchy-Schwarz says that
no later vector can enter, keeps whatever could be among the best by the bounds that a band gives,
and settles those with the sketches themselves. So it is exact, up to ties, and where norms are
nearly equal it reads everything: `Found.scanned` says how much. Without an index, or without FAISS,
the same search is the plain product over the mapped shards. Where FAISS has a GPU the bands that
were searched stay on it; candidates are settled on the CPU either way.

An index is a cache; it is used only while it matches the sketches it was built from. Building and
searching hold one band at a time. Untied models are searched at the query's own step only.

Letters: N rows, τ steps, U slots, V vectors, Q queries, M sketch dimension.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch

from curate.bands import Band, Bands, load_faiss, rounding, write_bands
from curate.blocks import block_rows, spans
from curate.errors import CurateError, UsageError
from curate.multiply import LARGEST, Operand, exact_integers
from curate.pooledvectors import Kind, Numbers, PooledVectors
from curate.rundir import RunDirectory, folder
from curate.scratch import Progress

Doubles = npt.NDArray[np.float64]
SLACK = 32
"""How many more candidates than twice those asked for are looked at first."""
TOGETHER = 6
"""From so many queries on an integer product of a band is faster than as many FAISS scans."""


@dataclass(frozen=True)
class Found:
    """Vector numbers and inner products, best first; the share of vectors that was looked at."""

    numbers: Numbers
    scores: npt.NDArray[np.float64]
    scanned: float


def build_index(
    run: RunDirectory,
    set_name: str = "train",
    *,
    kinds: Sequence[Kind] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Build the indexes of a set where they are missing or out of date; return what was recorded.

    Args:
        kinds: which; by default the steps, and of a tied model the totals.

    Raises:
        CurateError: FAISS is not installed, or sketches are missing.
    """
    load_faiss()
    with run.writing():
        digest = _digest(run, set_name)
        made_of: Sequence[Kind] = ("steps", "totals") if run.manifest.tied else ("steps",)
        wanted = made_of if kinds is None else kinds
        entry = run.manifest.indexes.get(set_name)
        fresh = bool(entry and entry["digest"] == digest)
        if entry and fresh and not overwrite and set(wanted) <= set(entry):
            return entry
        home = run.index_directory / folder(set_name)
        made: dict[str, Any] = {**(entry or {})} if fresh else {"digest": digest, "set": set_name}
        for kind in wanted:
            directory = home / f"{kind}-{digest}"
            shutil.rmtree(directory, ignore_errors=True)
            made[kind] = _build(run, set_name, kind, directory, progress)
        run.update(lambda m: m.model_copy(update={"indexes": {**m.indexes, set_name: made}}))
        for old in home.iterdir():
            if not old.name.endswith(digest):
                shutil.rmtree(old)
    return made


def _build(
    run: RunDirectory, set_name: str, kind: Kind, directory: Path, progress: Progress | None
) -> dict[str, Any]:
    vectors = PooledVectors(run, set_name, kind)
    norms = vectors.norms()
    lists = [np.arange(len(norms))]
    if not run.manifest.tied:
        lists = [np.arange(slot, len(norms), vectors.slots) for slot in range(vectors.slots)]
    order = [members[np.argsort(-norms[members], kind="stable")] for members in lists]
    order = [members[norms[members] > 0] for members in order]
    bands = write_bands(directory, order, norms, vectors.take, progress)
    path = directory.relative_to(run.path).as_posix()
    return {"path": path, "vectors": len(norms), "bands": bands}


class Searcher:
    """Searches of one set, with its sketches and its index kept open in between.

    Args:
        use_index: False for the plain product.
    """

    def __init__(
        self,
        run: RunDirectory,
        set_name: str = "train",
        kind: Kind = "steps",
        *,
        use_index: bool = True,
    ) -> None:
        self.vectors = PooledVectors(run, set_name, kind)
        self.bands = _bands(run, set_name, kind) if use_index else None

    def search(self, queries: npt.NDArray[Any], k: int, *, slot: int | None = None) -> list[Found]:
        """For each of `queries` (Q, M) the k vectors with the largest inner product.

        Args:
            slot: of an untied model, the step to search.
        """
        exact = np.asarray(queries, dtype=np.float64)
        if self.bands is None:
            return _search_all(self.vectors, exact, k, slot)
        descent = _Descent(self.bands, exact, k)
        bands = [band for band in self.bands.bands if slot in (None, band.slot)]
        seen, done = np.zeros(len(exact)), None
        for band in bands:  # those of a slot one after another, by norm
            if band.slot == done:
                continue
            active = descent.active(band)
            if not len(active):
                done = band.slot
                continue
            descent.look(band, active)
            seen[active] += band.count
        of = max(1, sum(band.count for band in bands))
        best = self._settled(exact, descent.candidates, k)
        return [Found(*own, count / of) for own, count in zip(best, seen, strict=True)]

    def _settled(
        self, queries: Doubles, candidates: Sequence[_Candidates], k: int
    ) -> Iterator[tuple[Numbers, Doubles]]:
        """The k best of each query's candidates, by the sketches themselves.

        What several queries have among their candidates is read once.
        """
        most, start = block_rows(1, self.vectors.dim), 0
        ends = np.cumsum([0, *(len(own.numbers) for own in candidates)])
        while start < len(queries):
            stop = int(np.searchsorted(ends, ends[start] + most, side="right")) - 1
            stop = max(start + 1, stop)
            every = np.unique(np.concatenate([own.numbers for own in candidates[start:stop]]))
            vectors = self.vectors.take(every)
            for query, own in zip(queries[start:stop], candidates[start:stop], strict=True):
                mine = vectors[np.searchsorted(every, own.numbers)].astype(np.float64)
                yield _best(own.numbers, mine @ query, k)
            start = stop


def _bands(run: RunDirectory, set_name: str, kind: Kind) -> Bands | None:
    """The index of a set; None where there is none, it is out of date, or cannot be read."""
    entry = run.manifest.indexes.get(set_name)
    if not entry or kind not in entry or entry["digest"] != _digest(run, set_name):
        return None
    try:
        return Bands(run.path / entry[kind]["path"], entry[kind]["bands"])
    except (CurateError, OSError):
        return None


class _Candidates:
    """Vectors that may be among the k best of a query, with bounds on their inner products.

    `least` bounds the k-th best from below; what is below it is dropped.
    """

    def __init__(self, k: int) -> None:
        self.k, self.least = k, -np.inf
        self.numbers: Numbers = np.empty(0, dtype=np.int64)
        self._low: Doubles = np.empty(0)
        self._high: Doubles = np.empty(0)

    def with_more(self, numbers: Numbers, low: Doubles, high: Doubles) -> _Candidates:
        """These and others."""
        out = _Candidates(self.k)
        low, high = np.concatenate([self._low, low]), np.concatenate([self._high, high])
        if len(low) >= self.k:
            out.least = max(self.least, float(np.partition(low, -self.k)[-self.k]))
        keep = high >= out.least
        out.numbers = np.concatenate([self.numbers, numbers])[keep]
        out._low, out._high = low[keep], high[keep]
        return out


class _Descent:
    """Several queries on their way down the bands.

    A query of norm one is s·w + δ with w in whole numbers, which is what FAISS is asked for; by
    Cauchy-Schwarz δ moves a product by no more than its norm times the vector's.
    """

    def __init__(self, bands: Bands, queries: Doubles, k: int) -> None:
        self._bands = bands
        self.norms = np.linalg.norm(queries, axis=1)
        units = queries / np.where(self.norms > 0, self.norms, 1.0)[:, None]
        dim = queries.shape[1]
        self.candidates = [_Candidates(k) for _ in queries]
        self._together = len(queries) >= TOGETHER and exact_integers() and not bands.gpu
        self._operand = Operand.of(units, torch.device("cpu")) if self._together else None
        largest = np.abs(units).max(axis=1)
        # FAISS may add up in float32. Digits add up exactly; they leave so much of a query's
        # entries, and become float32 in fewer than eight roundings.
        digits = self._operand is not None and self._operand.scale is not None
        times = 8 + largest * np.sqrt(dim) if digits else np.full(len(queries), float(dim))
        self._scanned, self._multiplied = rounding(dim, dim), rounding(times, dim)
        self._sizes = np.where(largest > 0, largest, 1.0) / LARGEST
        self._whole = np.rint(units / self._sizes[:, None])
        self._left = np.linalg.norm(units - self._sizes[:, None] * self._whole, axis=1)

    def active(self, band: Band) -> Numbers:
        """The queries for which a vector of the band could still enter."""
        # Below zero a bound from norms says nothing, so such a search reads every band.
        least = np.array([own.least for own in self.candidates])
        return np.flatnonzero(~(least >= band.norm * self.norms))

    def look(self, band: Band, active: Numbers) -> None:
        """Take what could enter from a band."""
        if self._operand is None or len(active) < TOGETHER:
            for query in active:
                self._scan(band, int(query))
        else:
            self._multiply(band, active, self._operand.some(torch.from_numpy(active)))

    def _multiply(self, band: Band, active: Numbers, operand: Operand) -> None:
        """Take what the products of all of a band's codes say could enter."""
        margin = (band.rest + self._multiplied[active]).astype(np.float32)
        least = np.array([self._least(query) for query in active], dtype=np.float32)
        found = []
        for start, products in self._bands.products(band, operand):
            scales = self._bands.scales_of(band)[start : start + len(products), None]
            places, which = np.nonzero((products + margin) * scales >= least)
            found.append((which, start + places, products[places, which]))
        which, places, dots = (np.concatenate(parts) for parts in zip(*found, strict=True))
        order = np.argsort(which, kind="stable")
        ends = np.searchsorted(which[order], np.arange(1, len(active)))
        for number, own in enumerate(np.split(order, ends)):
            query = int(active[number])
            self._take(band, query, dots[own], places[own], float(margin[number]))

    def _scan(self, band: Band, query: int) -> None:
        """Ask FAISS for more and more of a band, until those that are left cannot enter."""
        before, left = self.candidates[query], self._left[query]
        whole, size = self._whole[query].astype(np.float32), self._sizes[query]
        margin = band.rest * (1 + left) + self._scanned
        want = min(band.count, 2 * before.k + SLACK)
        while True:
            found, places = self._bands.nearest(band, whole, want)
            dots, own = size * found, self._bands.norms_of(band)[places]
            lengths = own / self._bands.scales_of(band)[places]
            self.candidates[query] = before
            self._take(band, query, dots, places, margin + left * lengths)
            if len(places) == band.count:
                return
            most = max(dots[-1] + margin, 0.0) * band.scale + left * band.norm
            if most < self._least(query):
                return
            want = min(band.count, 4 * want)

    def _least(self, query: int) -> float:
        """What the product of a vector with a query of norm one needs at least."""
        return self.candidates[query].least / (float(self.norms[query]) or 1.0)

    def _take(
        self, band: Band, query: int, dots: Doubles, places: Numbers, margin: float | Doubles
    ) -> None:
        """Take vectors of a band, whose products with codes are `dots`, `margin` more or less."""
        scales = self._bands.scales_of(band)[places] * self.norms[query]
        numbers = self._bands.numbers[band.start + places]
        low, high = (dots - margin) * scales, (dots + margin) * scales
        self.candidates[query] = self.candidates[query].with_more(numbers, low, high)


def search(
    run: RunDirectory,
    query: npt.NDArray[Any],
    k: int,
    *,
    set_name: str = "train",
    kind: Kind = "steps",
    slot: int | None = None,
    use_index: bool = True,
) -> Found:
    """One search for `query` (M,); see `Searcher`, which is faster for several."""
    searcher = Searcher(run, set_name, kind, use_index=use_index)
    return searcher.search(np.asarray(query)[None], k, slot=slot)[0]


def _search_all(vectors: PooledVectors, queries: Doubles, k: int, slot: int | None) -> list[Found]:
    """The plain product over all rows, one block in memory at a time."""
    best = [(np.empty(0, dtype=np.int64), np.empty(0)) for _ in queries]
    for start, stop in spans(0, vectors.rows, block_rows(vectors.slots, vectors.dim)):
        block = vectors.rows_of(start, stop).reshape(-1, vectors.dim)
        own = np.arange(start * vectors.slots, stop * vectors.slots)
        here = block.any(axis=1) & ((own % vectors.slots == slot) if slot is not None else True)
        scores = block[here].astype(np.float64) @ queries.T
        for number, (numbers, known) in enumerate(best):
            more = np.concatenate([known, scores[:, number]])
            best[number] = _best(np.concatenate([numbers, own[here]]), more, k)
    return [Found(numbers, scores, 1.0) for numbers, scores in best]


def _best(numbers: Numbers, scores: Doubles, k: int) -> tuple[Numbers, Doubles]:
    """The k largest, ties by number."""
    order = np.lexsort((numbers, -scores))[:k]
    return numbers[order], scores[order]


def neighbours(
    run: RunDirectory,
    *,
    row: int,
    step: int,
    k: int = 10,
    query: str | None = None,
    set_name: str = "train",
    of: Kind = "steps",
    use_index: bool = True,
) -> pl.DataFrame:
    """The k (row, step) with the largest M_{s,t} with one row at one step.

    Args:
        query: the set that `row` is of; by default the indexed set, and the row itself is left out.
        of: ``steps``, or ``totals`` for the k rows with the largest SDI_t (tied models).

    Returns:
        rank, row, step (unless `of` is totals), score, then id, source and text where there are
        such columns.

    Raises:
        UsageError: no such set, row or step.
    """
    if k < 1:
        raise UsageError(f"k is {k}; expected at least 1")
    tied = run.manifest.tied
    if of == "totals" and not tied:
        raise UsageError("an untied model has no totals; search its steps")
    vector = _vector(run, query or set_name, row, step)
    searcher = Searcher(run, set_name, of, use_index=use_index)
    slots = searcher.vectors.slots
    own = query in (None, set_name)
    more = k + (slots if own else 0)
    found = searcher.search(vector[None], more, slot=None if tied else step - 1)[0]
    keep = np.flatnonzero((found.numbers // slots != row) | (not own))[:k]
    data: dict[str, Any] = {"row": found.numbers[keep] // slots}
    if of == "steps":
        data["step"] = (found.numbers[keep] % slots + 1).astype(np.int32)
    frame = pl.DataFrame({**data, "score": found.scores[keep]}).with_row_index("rank", 1)
    return _with_text(run, set_name, frame.with_columns(pl.col("rank").cast(pl.Int64)))


def _vector(run: RunDirectory, set_name: str, row: int, step: int) -> npt.NDArray[np.float64]:
    vectors = PooledVectors(run, set_name, "steps")
    if not 0 <= row < vectors.rows:
        raise UsageError(f"row is {row}; set {set_name!r} has rows 0 to {vectors.rows - 1}")
    if not 1 <= step <= vectors.slots:
        raise UsageError(f"step is {step}; the loop has steps 1 to {vectors.slots}")
    found: npt.NDArray[np.float64] = np.asarray(
        vectors.rows_of(row, row + 1)[0, step - 1], dtype=np.float64
    )
    if not found.any():
        raise UsageError(f"row {row} of set {set_name!r} has no step {step}, or no gradient there")
    return found


def _with_text(run: RunDirectory, set_name: str, frame: pl.DataFrame) -> pl.DataFrame:
    table = run.examples(set_name)
    names = table.collect_schema().names()
    wanted = [name for name in ("id", "source", "text") if name in names]
    rows = table.filter(pl.col("row").is_in(frame["row"].to_list())).select("row", *wanted)
    return frame.join(rows.collect(), on="row", how="left", maintain_order="left")


def _digest(run: RunDirectory, set_name: str) -> str:
    """Of the sketches and the weights that an index is built from."""
    manifest = run.manifest
    shards = sorted(
        [shard.checkpoint, shard.kind, shard.number, sorted(shard.files.items())]
        for shard in manifest.shards
        if shard.set == set_name and shard.kind != "rows"
    )
    said = json.dumps([3, manifest.weights, shards], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()[:12]
