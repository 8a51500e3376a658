"""Bands: vectors as int8 with a scale each, sorted by norm, a FAISS index for each stretch of them.

A search goes down the bands until Cauchy-Schwarz says that no later vector can enter. A band holds
v = scale · (code + r) as its codes, with ‖r‖ ≤ `rest`, so that a product with the codes bounds the
true one from both sides; at one checkpoint the codes are the stored sketches and r is rounding.
The first bands are small, since gradient norms fall fastest at the top and what they hold settles
how far down the search goes.

FAISS scans them one query at a time (`QT_8bit_direct_signed`). Wherever M is a multiple of 16 it
multiplies bytes and rounds the query to bytes first, without a word; so a query is given in whole
numbers up to `LARGEST`, whose products are exact, and what that leaves of it widens the bounds.
Many queries at once are one product with the codes, which takes a tenth as long for each in
integers and two thirds in float32 (see `multiply`).

Letters: V vectors, Q queries, M sketch dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from curate import atomic
from curate.errors import CurateError
from curate.multiply import LARGEST, Operand

Floats = npt.NDArray[np.float32]
Numbers = npt.NDArray[np.int64]
FIRST = 1024
LEAST = 4096
MOST_BANDS = 128
BAND_BYTES = 64 << 20
"""A band is held in memory while it is built, in float32."""
KEPT_BANDS = 64
_TOGETHER, _PRODUCTS = 1 << 20, 16 << 20
"""Bytes of codes that are multiplied at once, and of their products at most."""
_OFFSET = 128
"""What FAISS adds to a code to store it."""
_GPU_MOST = 2048
"""How many neighbours FAISS finds on a GPU."""


@dataclass(frozen=True)
class Band:
    """One stretch of the sorted vectors.

    Attributes:
        norm: of the largest vector, and so a bound for all later ones.
        scale: the largest.
        rest: bound on ‖v/scale − code‖.
        start, count: where it lies in `numbers` and `scales`.
        slot: of an untied model, the step.
    """

    name: str
    norm: float
    scale: float
    rest: float
    start: int
    count: int
    slot: int


def sizes(vectors: int, dim: int) -> Iterator[int]:
    """How many vectors to put in each band."""
    most = max(1, min(BAND_BYTES // (4 * dim), max(LEAST, vectors // MOST_BANDS)))
    size, left = min(FIRST, most), vectors
    while left > 0:
        yield min(size, left)
        left -= size
        size = min(2 * size, most)


def write_bands(
    directory: Path,
    order: Sequence[Numbers],
    norms: Floats,
    take: Callable[[Numbers], Floats],
    progress: Callable[[int, int], object] | None = None,
) -> list[dict[str, Any]]:
    """Write the bands of vectors that are sorted by norm, and return what `Bands` reads them by.

    Args:
        order: vector numbers, largest norm first, for each slot that is searched by itself.
        norms: of all vectors.
        take: float32 (V, M) of some vectors.
    """
    bands: list[Band] = []
    numbers, scales = np.concatenate(order), []
    for slot, members in enumerate(order):
        first = 0
        for size in sizes(len(members), take(members[:1]).shape[1]):
            own = members[first : first + size]
            start = bands[-1].start + bands[-1].count if bands else 0
            name = f"band-{len(bands):05d}"
            scale, rest = _write(directory / name, take(own))
            norm = float(norms[own[0]])
            bands.append(Band(name, norm, float(scale.max()), rest, start, size, slot))
            scales.append(scale)
            first += size
            if progress:
                progress(start + size, len(norms))
    whole = np.concatenate(scales) if scales else np.empty(0, dtype=np.float32)
    for name, array in (("numbers", numbers), ("scales", whole), ("norms", norms[numbers])):
        _save(directory / f"{name}.npy", array)
    return [asdict(band) for band in bands]


def _write(path: Path, values: Floats) -> tuple[Floats, float]:
    """Write a band's index; returns the scales and the bound on what the codes leave."""
    from sdi.sketch.quantize import quantize

    faiss = load_faiss()
    codes, scale = quantize(values)
    exact = codes.astype(np.float32)
    rest = float(np.linalg.norm(values / scale[:, None] - exact, axis=1).max())
    kind = faiss.ScalarQuantizer.QT_8bit_direct_signed
    index = faiss.IndexScalarQuantizer(values.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
    index.train(exact)  # nothing to learn; says that it is trained
    index.add(exact)
    atomic.write_with(path.with_suffix(".faiss"), lambda to: faiss.write_index(index, str(to)))
    return scale, rest


def _save(path: Path, array: npt.NDArray[Any]) -> None:
    def save(to: Path) -> None:
        with to.open("wb") as stream:
            np.save(stream, array)

    atomic.write_with(path, save)


class Bands:
    """The bands of one index, kept open.

    Args:
        directory: where they lie.
        bands: as `write_bands` returned them.

    Raises:
        OSError: a file is not there.
    """

    def __init__(self, directory: Path, bands: Sequence[dict[str, Any]]) -> None:
        self._directory = directory
        self.bands = [Band(**band) for band in bands]
        # Plain arrays over the maps: a slice of a memmap costs several times as much.
        self.numbers, self.scales, self.norms = (
            np.asarray(np.load(directory / f"{name}.npy", mmap_mode="r"))
            for name in ("numbers", "scales", "norms")
        )
        self._faiss = load_faiss()
        self._open: dict[str, Any] = {}
        self.gpu = getattr(self._faiss, "get_num_gpus", int)() > 0
        for band in self.bands:
            self._path(band).stat()

    def scales_of(self, band: Band) -> Floats:
        """Scales of a band's vectors, (V,)."""
        return self.scales[band.start : band.start + band.count]

    def norms_of(self, band: Band) -> Floats:
        """Norms of a band's vectors, (V,)."""
        return self.norms[band.start : band.start + band.count]

    def nearest(self, band: Band, query: Floats, want: int) -> tuple[Floats, Numbers]:
        """The `want` codes with the largest product with `query` (M,): products and places.

        `query` is of whole numbers, `LARGEST` at most.
        """
        found = self._mapped(band) if want > _GPU_MOST else self._index(band)
        dots, places = found.search(query[None], want)
        return dots[0], places[0]

    def products(self, band: Band, queries: Operand) -> Iterator[tuple[int, Floats]]:
        """Products of a band's codes with queries, some codes at a time: the first's place, and
        (codes, Q).
        """
        index = self._index(band)
        stored = self._faiss.rev_swig_ptr(index.codes.data(), band.count * index.d)
        stored = stored.reshape(band.count, index.d)
        step = max(1, min(_TOGETHER // index.d, _PRODUCTS // (4 * queries.width)))
        buffer = np.empty((step, index.d), dtype=np.uint8)
        for start in range(0, band.count, step):
            part = stored[start : start + step]
            codes = np.subtract(part, _OFFSET, out=buffer[: len(part)]).view(np.int8)  # wraps
            yield start, queries.times(torch.from_numpy(codes), torch.float32).numpy()

    def _index(self, band: Band) -> Any:
        """A band's index: mapped, or on the first GPU, where it stays for the next search."""
        if not self.gpu:
            return self._mapped(band)
        path = self._path(band)
        return _on_gpu(path, path.stat().st_mtime_ns)

    def _mapped(self, band: Band) -> Any:
        if band.name not in self._open:
            flags = self._faiss.IO_FLAG_MMAP_IFC
            self._open[band.name] = self._faiss.read_index(str(self._path(band)), flags)
        return self._open[band.name]

    def _path(self, band: Band) -> Path:
        return (self._directory / band.name).with_suffix(".faiss")


def rounding(times: float | npt.NDArray[np.float64], dim: int) -> Any:
    """A bound on what float32, rounding so many times in a row, adds to a product of M codes with a
    vector of norm one.
    """
    return times * 2.0**-24 * 2 * LARGEST * np.sqrt(dim)


@lru_cache(maxsize=KEPT_BANDS)
def _on_gpu(path: Path, _changed: int) -> Any:
    """A band on the GPU, flat and in half precision, which holds the codes exactly."""
    faiss = load_faiss()
    index = faiss.read_index(str(path))
    flat = faiss.IndexFlatIP(index.d)
    flat.add(index.reconstruct_n(0, index.ntotal))
    options = faiss.GpuClonerOptions()
    options.useFloat16 = True
    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, flat, options)


def load_faiss() -> Any:
    """The module; imported where it is needed.

    Raises:
        CurateError: it is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise CurateError(
            "faiss is not installed; install sdi-curate[cpu] or sdi-curate[gpu], never both"
        ) from error
    return faiss
