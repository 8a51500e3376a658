"""Search over sketches: which (row, step) have the largest inner product with a given vector.

The vector of (row, step) is Σ_k √η_k · sketch_k; hashes of different checkpoints are independent,
so an inner product of two of them estimates M_{s,t} summed over the checkpoints. Two indexes are
made: `steps`, and of tied models `totals`, which answers with SDI_t.

Gradient norms have heavy tails, which is where graphs and cells lose the true neighbours. Here
vectors are sorted by norm into bands, each a flat FAISS index (fp16 from 10⁵ vectors on, float32
below). A search goes down the bands until Cauchy-Schwarz says that no later vector can enter, and
settles the candidates with the sketches themselves. It is exact up to fp16 ties, and where norms
are nearly equal it reads everything: `Found.scanned` says how much. Without an index, or without
FAISS, the same search is the plain product over the mapped shards. Where FAISS has a GPU the bands
that were searched stay on it, in half precision; candidates are settled on the CPU either way.

An index is a cache; it is used only while it matches the sketches it was built from. Building and
searching hold one band at a time. Untied models are searched at the query's own step only.

Letters: N rows, τ steps, U slots, V vectors, M sketch dimension.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import polars as pl

from curate import atomic
from curate.blocks import block_rows, open_rows, spans
from curate.errors import CurateError, UsageError
from curate.rundir import RunDirectory, folder
from curate.scratch import Progress

Kind = Literal["steps", "totals"]
Floats = npt.NDArray[np.float32]
Numbers = npt.NDArray[np.int64]
FLAT_BELOW = 100_000
BAND_BYTES = 64 << 20
KEPT_BANDS = 64
SLACK = 32
"""How many more candidates than asked are settled exactly, against rounding in fp16."""


class Vectors:
    """Σ_k √η_k · sketch_k of one set; vector number v is slot v mod U of row v // U."""

    def __init__(self, run: RunDirectory, set_name: str, kind: Kind) -> None:
        weights = {name: eta for name, eta in run.manifest.weights.items() if eta > 0}
        if not weights:
            raise CurateError(f"{run.path} has no checkpoint of positive weight; sketch it first")
        self.roots = [float(np.sqrt(eta)) for eta in weights.values()]
        self.sources = [open_rows(run, set_name, name, kind) for name in weights]
        self.rows, self.dim = self.sources[0].rows, self.sources[0].dim
        self.slots = max(source.slots for source in self.sources)

    def rows_of(self, start: int, stop: int) -> Floats:
        """float32 (rows, U, M)."""
        out = np.zeros((stop - start, self.slots, self.dim), dtype=np.float32)
        for root, source in zip(self.roots, self.sources, strict=True):
            block = source.read(start, stop)
            out[:, : source.slots] += block.values * (root * block.scale)[:, :, None]
        return out

    def take(self, numbers: Numbers) -> Floats:
        """float32 (V, M), gathered row by row from the maps."""
        out = np.empty((len(numbers), self.dim), dtype=np.float32)
        for place in np.argsort(numbers, kind="stable"):
            row, slot = divmod(int(numbers[place]), self.slots)
            out[place] = self.rows_of(row, row + 1)[0, slot]
        return out

    def norms(self) -> Floats:
        """Norms of all vectors, (N · U,): four bytes each."""
        parts = [
            np.linalg.norm(self.rows_of(a, b), axis=2).ravel().astype(np.float32)
            for a, b in spans(0, self.rows, block_rows(self.slots, self.dim))
        ]
        return np.concatenate(parts)


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
    overwrite: bool = False,
    flat_below: int = FLAT_BELOW,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Build the indexes of a set where they are missing or out of date; return what was recorded.

    Raises:
        CurateError: FAISS is not installed, or sketches are missing.
    """
    faiss = _faiss()
    with run.writing():
        digest = _digest(run, set_name)
        entry = run.manifest.indexes.get(set_name)
        if entry and entry["digest"] == digest and not overwrite:
            return entry
        home = run.index_directory / folder(set_name)
        made: dict[str, Any] = {"digest": digest, "set": set_name}
        kinds: tuple[Kind, ...] = ("steps", "totals") if run.manifest.tied else ("steps",)
        for kind in kinds:
            directory = home / f"{kind}-{digest}"
            shutil.rmtree(directory, ignore_errors=True)
            made[kind] = _build(faiss, run, set_name, kind, directory, flat_below, progress)
        run.update(lambda m: m.model_copy(update={"indexes": {**m.indexes, set_name: made}}))
        for old in home.iterdir():
            if not old.name.endswith(digest):
                shutil.rmtree(old)
    return made


def _build(
    faiss: Any,
    run: RunDirectory,
    set_name: str,
    kind: Kind,
    directory: Path,
    flat_below: int,
    progress: Progress | None,
) -> dict[str, Any]:
    vectors = Vectors(run, set_name, kind)
    norms = vectors.norms()
    codec = "flat" if len(norms) < flat_below else "SQfp16"
    lists = [np.arange(len(norms))]
    if not run.manifest.tied:
        lists = [np.arange(slot, len(norms), vectors.slots) for slot in range(vectors.slots)]
    bands: list[dict[str, Any]] = []
    size = max(1, BAND_BYTES // (4 * vectors.dim))
    for slot, members in enumerate(lists):
        order = members[np.argsort(-norms[members], kind="stable")]
        order = order[norms[order] > 0]
        for start, stop in spans(0, len(order), size):
            numbers = order[start:stop]
            name = f"band-{len(bands):05d}"
            top = float(norms[numbers[0]])
            _write_band(faiss, directory / name, vectors.take(numbers) / top, codec, numbers)
            bands.append({"name": name, "norm": top, "count": len(numbers), "slot": slot})
            if progress:
                progress(sum(band["count"] for band in bands), len(norms))
    return {
        "path": directory.relative_to(run.path).as_posix(),
        "codec": codec,
        "vectors": len(norms),
        "bands": bands,
    }


def _write_band(faiss: Any, path: Path, values: Floats, codec: str, numbers: Numbers) -> None:
    dim = values.shape[1]
    if codec == "flat":
        band = faiss.IndexFlatIP(dim)
    else:
        # Divided by the band's largest norm, so that small gradients stay within half precision.
        kind = faiss.ScalarQuantizer.QT_fp16
        band = faiss.IndexScalarQuantizer(dim, kind, faiss.METRIC_INNER_PRODUCT)
        band.train(values)
    band.add(values)
    atomic.write_with(path.with_suffix(".faiss"), lambda to: faiss.write_index(band, str(to)))

    def save(to: Path) -> None:
        with to.open("wb") as stream:
            np.save(stream, numbers)

    atomic.write_with(path.with_suffix(".npy"), save)


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
    """The k vectors of a set with the largest inner product with `query` (M,).

    Args:
        slot: of an untied model, the step to search.
        use_index: False for the plain product.
    """
    vectors = Vectors(run, set_name, kind)
    entry = run.manifest.indexes.get(set_name) if use_index else None
    if entry and kind in entry and entry["digest"] == _digest(run, set_name):
        found = _search_bands(run, vectors, entry[kind], query, k, slot)
        if found is not None:
            return found
    return _search_all(vectors, query, k, slot)


def _search_bands(
    run: RunDirectory,
    vectors: Vectors,
    entry: dict[str, Any],
    query: npt.NDArray[Any],
    k: int,
    slot: int | None,
) -> Found | None:
    """Down the bands until none can hold a better vector; None where the index cannot be read."""
    try:
        faiss = _faiss()
    except CurateError:
        return None
    norm = float(np.linalg.norm(query))
    target = (query / (norm or 1.0)).astype(np.float32)[None]
    numbers, scores = np.empty(0, dtype=np.int64), np.empty(0)
    seen = 0
    # Negative products need every band, since a bound from norms says nothing below zero.
    for band in entry["bands"]:
        if slot is not None and band["slot"] != slot:
            continue
        if len(scores) >= k and np.partition(scores, -k)[-k] >= band["norm"] * norm:
            break
        path = run.path / entry["path"] / band["name"]
        if not path.with_suffix(".faiss").exists() or not path.with_suffix(".npy").exists():
            return None
        index = _band(faiss, path.with_suffix(".faiss"))
        _, places = index.search(target, min(band["count"], k + SLACK))
        candidates = np.load(path.with_suffix(".npy"))[places[0]]
        seen += band["count"]
        exact = vectors.take(candidates).astype(np.float64) @ query
        numbers, scores = _best(
            np.concatenate([numbers, candidates]), np.concatenate([scores, exact]), k
        )
    of = sum(band["count"] for band in entry["bands"] if slot in (None, band["slot"]))
    return Found(numbers, scores, seen / max(1, of))


def _search_all(vectors: Vectors, query: npt.NDArray[Any], k: int, slot: int | None) -> Found:
    """The plain product over all rows, one block in memory at a time."""
    numbers, scores = np.empty(0, dtype=np.int64), np.empty(0)
    for start, stop in spans(0, vectors.rows, block_rows(vectors.slots, vectors.dim)):
        block = vectors.rows_of(start, stop).reshape(-1, vectors.dim)
        own = np.arange(start * vectors.slots, stop * vectors.slots)
        here = block.any(axis=1) & ((own % vectors.slots == slot) if slot is not None else True)
        numbers, scores = _best(
            np.concatenate([numbers, own[here]]),
            np.concatenate([scores, block[here].astype(np.float64) @ query]),
            k,
        )
    return Found(numbers, scores, 1.0)


def _best(
    numbers: Numbers, scores: npt.NDArray[np.float64], k: int
) -> tuple[Numbers, npt.NDArray[np.float64]]:
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
    slots = Vectors(run, set_name, of).slots
    own = query in (None, set_name)
    slot = None if tied else step - 1
    found = search(
        run,
        vector,
        k + (slots if own else 0),
        set_name=set_name,
        kind=of,
        slot=slot,
        use_index=use_index,
    )
    keep = np.flatnonzero((found.numbers // slots != row) | (not own))[:k]
    data: dict[str, Any] = {"row": found.numbers[keep] // slots}
    if of == "steps":
        data["step"] = (found.numbers[keep] % slots + 1).astype(np.int32)
    frame = pl.DataFrame({**data, "score": found.scores[keep]}).with_row_index("rank", 1)
    return _with_text(run, set_name, frame.with_columns(pl.col("rank").cast(pl.Int64)))


def _vector(run: RunDirectory, set_name: str, row: int, step: int) -> npt.NDArray[np.float64]:
    vectors = Vectors(run, set_name, "steps")
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
    said = json.dumps([1, manifest.weights, shards], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()[:12]


def _band(faiss: Any, path: Path) -> Any:
    """A band's index: mapped, or on the first GPU, where it stays for the next search."""
    if getattr(faiss, "get_num_gpus", int)() == 0:
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    return _on_gpu(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=KEPT_BANDS)
def _on_gpu(path: Path, _changed: int) -> Any:
    """A band on the GPU, flat and in half precision: its scalar quantizer is the CPU's alone."""
    faiss = _faiss()
    index = faiss.read_index(str(path))
    if not isinstance(index, faiss.IndexFlat):
        flat = faiss.IndexFlatIP(index.d)
        flat.add(index.reconstruct_n(0, index.ntotal))
        index = flat
    options = faiss.GpuClonerOptions()
    options.useFloat16 = True
    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index, options)


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise CurateError(
            "faiss is not installed; install sdi-curate[cpu] or sdi-curate[gpu], never both"
        ) from error
    return faiss
