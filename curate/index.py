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

An index is a cache; it is used only while it matches the sketches it was built from. Building holds
one band at a time; a search holds what could enter. Untied models are searched at the query's own
step only.

Letters: N rows, τ steps, U slots, V vectors, Q queries, M sketch dimension.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from curate.bands import Bands, load_faiss, write_bands
from curate.blocks import block_rows, spans
from curate.descent import Descent
from curate.errors import CurateError, UsageError
from curate.manifest import index_digest
from curate.pooledvectors import Kind, Numbers, PooledVectors
from curate.rundir import RunDirectory, folder
from curate.scratch import Progress

Doubles = npt.NDArray[np.float64]


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
        digest = index_digest(run.manifest, set_name)
        made_of: Sequence[Kind] = ("steps", "totals") if run.manifest.tied else ("steps",)
        wanted = made_of if kinds is None else kinds
        entry = run.manifest.indexes.get(set_name)
        fresh = bool(entry and entry["digest"] == digest)
        if entry and not overwrite and all(_opens(run, set_name, kind) for kind in wanted):
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

    Attributes:
        bands: the index; None where there is none to use, and `without` says why.

    Args:
        use_index: False for the plain product.
        many: whether hundreds of searches follow, for which a kernel is loaded at once; otherwise
            it is when FAISS has read as much as loading it takes.
    """

    def __init__(
        self,
        run: RunDirectory,
        set_name: str = "train",
        kind: Kind = "steps",
        *,
        use_index: bool = True,
        many: bool = False,
    ) -> None:
        self.vectors = PooledVectors(run, set_name, kind)
        self.bands, self.without = None, "told to use no index"
        if use_index:
            try:
                self.bands = _bands(run, set_name, kind, self.vectors.dim, many=many)
            except CurateError as error:
                self.without = str(error)

    def search(self, queries: npt.NDArray[Any], k: int, *, slot: int | None = None) -> list[Found]:
        """For each of `queries` (Q, M) the k vectors with the largest inner product.

        Args:
            slot: of an untied model, the step to search.

        Raises:
            UsageError: queries of another dimension, or that are not finite; k below 1.
        """
        _refuse_none(k)
        exact = np.asarray(queries, dtype=np.float64)
        if exact.ndim != 2 or exact.shape[1] != self.vectors.dim:
            raise UsageError(f"queries are {exact.shape}; expected (Q, {self.vectors.dim})")
        bad = np.flatnonzero(~np.isfinite(exact).all(axis=1))
        if len(bad):
            raise UsageError(f"queries {bad[:10].tolist()} hold NaN or infinity; expected numbers")
        if self.bands is None:
            return _search_all(self.vectors, exact, k, slot)
        descent = Descent(self.bands, exact, k)
        seen, of, first = np.zeros(len(exact)), 0, 0
        for own, group in groupby(self.bands.bands, key=lambda band: band.slot):
            bands = list(group)  # one after another, by norm
            if slot in (None, own):
                seen += descent.down(first, first + len(bands))
                of += sum(band.count for band in bands)
            first += len(bands)
        known = descent.candidates
        counts = np.array([len(own.numbers) for own in known], dtype=np.int64)
        products = self.vectors.products(
            np.concatenate([np.empty(0, dtype=np.int64), *(own.numbers for own in known)]),
            np.repeat(np.arange(len(known)), counts),
            exact,
            self.bands.screens(),
        )
        scores = np.split(products, np.cumsum(counts))[:-1]
        parts = zip(known, scores, seen, strict=True)
        return [
            Found(*_best(own.numbers, score, k), count / max(1, of)) for own, score, count in parts
        ]


def _refuse_none(k: int) -> None:
    if k < 1:
        raise UsageError(f"k is {k}; expected at least 1")


def _bands(run: RunDirectory, set_name: str, kind: Kind, dim: int, *, many: bool = False) -> Bands:
    """The index of a set.

    Raises:
        CurateError: there is none, it is out of date, or cannot be read.
    """
    entry = run.manifest.indexes.get(set_name)
    if not entry or kind not in entry:
        raise CurateError(f"no index of the {kind} of {set_name!r} (`curate index` makes one)")
    if entry["digest"] != index_digest(run.manifest, set_name):
        raise CurateError(f"the index of {set_name!r} is out of date (`curate index` renews it)")
    try:
        return Bands(run.path / entry[kind]["path"], entry[kind]["bands"], dim, many=many)
    except (OSError, ValueError, EOFError) as error:  # of NumPy, where a file was cut short
        raise CurateError(
            f"the index of {set_name!r} cannot be read ({error}; `curate index` makes it again)"
        ) from error


def _opens(run: RunDirectory, set_name: str, kind: Kind) -> bool:
    """Whether there is an index of what the sketches are now, and its files are whole."""
    return Searcher(run, set_name, kind).bands is not None


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
    log: Callable[[str], object] | None = None,
) -> pl.DataFrame:
    """The k (row, step) with the largest M_{s,t} with one row at one step.

    Args:
        query: the set that `row` is of; by default the indexed set, and the row itself is left out.
        of: ``steps``, or ``totals`` for the k rows with the largest SDI_t (tied models).
        log: is told how much of the set was looked at.

    Returns:
        rank, row, step (unless `of` is totals), score, then id, source and text where there are
        such columns.

    Raises:
        UsageError: no such set, row or step; k below 1.
    """
    _refuse_none(k)
    tied = run.manifest.tied
    if of == "totals" and not tied:
        raise UsageError("an untied model has no totals; search its steps")
    vector = _vector(run, query or set_name, row, step)
    searcher = Searcher(run, set_name, of, use_index=use_index)
    slots = searcher.vectors.slots
    own = query in (None, set_name)
    more = k + (slots if own else 0)
    found = searcher.search(vector[None], more, slot=None if tied else step - 1)[0]
    if log:
        how = "by the index" if searcher.bands else searcher.without
        log(
            f"{how}: looked at {found.scanned:.1%} of the vectors of {searcher.vectors.rows:,} rows"
        )
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
