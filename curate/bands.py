"""Bands: vectors as int8 with a scale each, sorted by norm, a FAISS index for each stretch of them.

A search goes down the bands until Cauchy-Schwarz says that no later vector can enter. A band holds
v = scale · (code + r) as its codes, with ‖r‖ ≤ `rest`, so that a product with the codes bounds the
true one from both sides; at one checkpoint the codes are the stored sketches and r is rounding.
The first bands are small, since gradient norms fall fastest at the top and what they hold settles
how far down the search goes.

For one query at a time FAISS scans them (`QT_8bit_direct_signed`), until there was so much to read
that a kernel pays which reads the first bits of vectors first (see `bitplanes`). Wherever M is a
multiple of 16 FAISS multiplies bytes and rounds the query to bytes first, without a word; so a
query is given in whole numbers up to `LARGEST`, whose products are exact, and what that leaves of
it widens the bounds. Many queries at once are one product with the codes, which takes a tenth as
long for each in integers and two thirds in float32 (see `multiply`).

Letters: V vectors, Q queries, M sketch dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from curate import atomic
from curate.bitplanes import AGAIN, ENDS, Planes, fits, write_planes
from curate.errors import CurateError
from curate.multiply import LARGEST, Operand, tiles_for
from sdi import team

Floats = npt.NDArray[np.float32]
Numbers = npt.NDArray[np.int64]
Dots = npt.NDArray[np.floating]
Hits = tuple[Numbers, Numbers, Dots]
FIRST = 1024
LEAST = 4096
MOST_BANDS = 128
BAND_BYTES = 64 << 20
"""A band is held in memory while it is built, in float32."""
KEPT_BANDS = 64
PAYS = 4 << 30
"""Bytes that FAISS reads in the time that loading a kernel takes, 0.4 s."""
_OPENED = 16
"""Bands whose planes are opened at once."""
_TOGETHER, _PRODUCTS = 1 << 20, 4 << 20
"""Bytes of codes that are multiplied at once where they are copied first, and of their products."""
_INDEX = ".faiss"
_GPU_MOST = 2048
"""How many neighbours FAISS finds on a GPU."""


@dataclass(frozen=True)
class Band:
    """One stretch of the sorted vectors.

    Attributes:
        norm: of the largest vector, and so a bound for all later ones.
        scale: the largest.
        rest: the largest ‖v/scale − code‖, but for what float32 rounds (`rounding`).
        start, count: where it lies in `numbers` and `scales`.
        slot: of an untied model, the step.
        lost: at each level of the bit planes, how much of a vector they leave, on average; empty
            where there are none.
    """

    name: str
    norm: float
    scale: float
    rest: float
    start: int
    count: int
    slot: int
    lost: list[float]


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

    Raises:
        CurateError: a norm is infinite.
    """
    bands: list[Band] = []
    numbers, scales = np.concatenate(order), []
    long = np.flatnonzero(np.isinf(norms))
    if len(long):
        raise CurateError(
            f"{len(long)} vectors, number {long[0]} the first, are longer than float32 can say; "
            "search them without an index"
        )
    for slot, members in enumerate(order):
        first = 0
        for size in sizes(len(members), take(members[:1]).shape[1]):
            own = members[first : first + size]
            start = bands[-1].start + bands[-1].count if bands else 0
            name = f"band-{len(bands):05d}"
            values = take(own)
            scale, rest = _write(directory / name, values)
            lost = write_planes(directory / name, values) if fits(values.shape[1]) else []
            norm = float(norms[own[0]])
            bands.append(Band(name, norm, float(scale.max()), rest, start, size, slot, lost))
            scales.append(scale)
            first += size
            if progress:
                progress(start + size, len(norms))
    whole = np.concatenate(scales) if scales else np.empty(0, dtype=np.float32)
    for name, array in (("numbers", numbers), ("scales", whole), ("norms", norms[numbers])):
        atomic.write_array(directory / f"{name}.npy", array)
    return [asdict(band) for band in bands]


def _write(path: Path, values: Floats) -> tuple[Floats, float]:
    """Write a band's index; returns the scales and the bound on what the codes leave."""
    from sdi.sketch.quantize import quantize

    faiss = load_faiss()
    codes, scale = quantize(values)
    scale = np.where(scale > 0, scale, np.finfo(np.float32).tiny)  # 0 where it is too small to say
    exact = codes.astype(np.float32)
    rest = float(np.linalg.norm(values / scale[:, None] - exact, axis=1).max())
    kind = faiss.ScalarQuantizer.QT_8bit_direct_signed
    index = faiss.IndexScalarQuantizer(values.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
    index.train(exact)  # nothing to learn; says that it is trained
    index.add(exact)
    atomic.write_with(path.with_suffix(_INDEX), lambda to: faiss.write_index(index, str(to)))
    return scale, rest


class Bands:
    """The bands of one index, kept open.

    Attributes:
        norm, rest, lost: those of all bands, (B,) and (B, L).

    Args:
        directory: where they lie.
        bands: as `write_bands` returned them.
        dim: M.
        many: whether so many searches follow that loading a kernel pays at once.

    Raises:
        OSError: a file is not there.
        CurateError: one is not of these bands.
    """

    def __init__(
        self, directory: Path, bands: Sequence[dict[str, Any]], dim: int, *, many: bool = False
    ) -> None:
        self._directory, self._dim = directory, dim
        self.bands = [Band(**band) for band in bands]
        # Plain arrays over the maps: a slice of a memmap costs several times as much.
        self.numbers, self.scales, self.norms = (
            np.asarray(np.load(directory / f"{name}.npy", mmap_mode="r"))
            for name in ("numbers", "scales", "norms")
        )
        self._faiss = load_faiss()
        count = sum(band.count for band in self.bands)
        kinds = {"numbers": np.int64, "scales": np.float32, "norms": np.float32}
        for name, kind in kinds.items():  # a kernel reads them by their addresses
            found = getattr(self, name)
            if (found.shape, found.dtype) != ((count,), kind):
                raise CurateError(
                    f"{directory / name}.npy holds {found.dtype} {found.shape}, expected "
                    f"{np.dtype(kind)} ({count},); {AGAIN}"
                )
        self.norm, self.rest = (
            np.array([getattr(band, name) for band in self.bands]) for name in ("norm", "rest")
        )
        self.lost = np.array([band.lost for band in self.bands])
        self._open: dict[str, Any] = {}
        self._planes: list[Planes | None] = [None] * len(self.bands)
        self._opening = Lock()
        self._told = np.zeros((len(self.bands), 5), dtype=np.int64)
        self._read = PAYS if many else 0
        self.gpu = getattr(self._faiss, "get_num_gpus", int)() > 0
        for band in self.bands:
            for end in (_INDEX, *(ENDS if band.lost else ())):
                self._path(band, end).stat()

    def screens(self) -> ModuleType | None:
        """The kernel that goes through bit planes, where there are any, once there was enough to
        read to load it for.
        """
        if self._read < PAYS or self.gpu or not self.lost.size or "avx2" not in team.features():
            return None
        return team.kernels("search")

    def nearest(self, band: Band, query: Floats, want: int) -> tuple[Floats, Numbers]:
        """The `want` codes with the largest product with `query` (M,): products and places.

        `query` is of whole numbers, `LARGEST` at most.
        """
        found = self._mapped(band) if want > _GPU_MOST else self._index(band)
        dots, places = found.search(query[None], want)
        self._read += band.count * found.d
        return dots[0], places[0]

    def told(self, first: int, last: int) -> Numbers:
        """What a kernel is told of the bit planes of some bands, (bands, 5); of those that are not
        open zeros. The first one is opened where it is not, and some of the next.
        """
        with self._opening:
            if not self._told[first].any():
                for number in range(first, min(last, first + _OPENED)):
                    if self._planes[number] is None:  # or a kernel may be reading in it
                        band = self.bands[number]
                        made = Planes(self._path(band), self._codes(band), self._mapped(band))
                        self._planes[number], self._told[number] = made, made.told
            return self._told[first:last].copy()

    def reached(
        self, band: Band, queries: Operand, sizes: Floats, far: Floats, needs: Floats
    ) -> Hits:
        """The codes of a band and the queries, in whole numbers, whose product p is so large that
        (p · size + far) · scale reaches what the query needs.

        Args:
            sizes, far, needs: (Q,).

        Returns:
            The query of each, the code's place in `numbers`, and p · size.
        """
        kernels = self.screens() if queries.digits == 1 else None
        stored, scales = self._codes(band), self.scales[band.start : band.start + band.count]
        self._read += stored.size
        tiled = kernels is not None and tiles_for(stored.shape[1]) is not None
        step = max(1, _PRODUCTS // (4 * queries.width))
        if not tiled:  # as many as a cache holds when they were copied
            step = max(1, min(step, _TOGETHER // stored.shape[1]))
        found = []
        for start in range(0, band.count, step):
            rows = torch.from_numpy(stored[start : start + step])
            own = scales[start : start + step]
            if kernels is None:
                dots = queries.times(rows, torch.float32).numpy() * sizes
                places, which = np.nonzero((dots + far) * own[:, None] >= needs)
                hits = which, places, dots[places, which]
            else:
                products = queries.products(rows, tiled=tiled)
                hits = _reached(kernels, products, own, sizes, far, needs)
            found.append((hits[0], band.start + start + hits[1], hits[2]))
        which, places, dots = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return which, places, dots

    def _codes(self, band: Band) -> npt.NDArray[np.uint8]:
        """As FAISS stores them, (V, M)."""
        index = self._mapped(band)
        found = self._faiss.rev_swig_ptr(index.codes.data(), band.count * index.d)
        codes: npt.NDArray[np.uint8] = found.reshape(band.count, index.d)
        return codes

    def _index(self, band: Band) -> Any:
        """A band's index: mapped, or on the first GPU, where it stays for the next search."""
        if not self.gpu:
            return self._mapped(band)
        path = self._path(band)
        return _on_gpu(path, path.stat().st_mtime_ns)

    def _mapped(self, band: Band) -> Any:
        if band.name not in self._open:
            flags = self._faiss.IO_FLAG_MMAP_IFC
            path = self._path(band)
            read = self._faiss.read_index(str(path), flags)
            if (read.ntotal, read.d) != (band.count, self._dim):
                raise CurateError(
                    f"{path} holds {read.ntotal} vectors of {read.d}, expected {band.count} of "
                    f"{self._dim}; {AGAIN}"
                )
            return self._open.setdefault(band.name, read)
        return self._open[band.name]

    def _path(self, band: Band, end: str = _INDEX) -> Path:
        return (self._directory / band.name).with_suffix(end)


def _reached(
    kernels: ModuleType, products: Tensor, scales: Floats, sizes: Floats, far: Floats, needs: Floats
) -> Hits:
    """`Bands.reached` of int32 products (V, Q or more)."""
    queries, rows = len(sizes), len(scales)
    assert products.dtype == torch.int32 and products.shape[1] >= queries, products.shape
    hits, found = np.empty(rows * queries, dtype=np.int32), np.zeros(1, dtype=np.int64)
    scales = np.ascontiguousarray(scales)
    job = (
        0, rows, queries, products.stride(0), products.data_ptr(),
        *(array.ctypes.data for array in (scales, sizes, far, needs, hits, found)),
    )  # fmt: skip
    team.run(kernels.reached, job, 1)
    places, which = np.divmod(hits[: found[0]].astype(np.int64), queries)
    return which, places, products.numpy()[places, which] * sizes[which]


def rounding(times: int, dim: int) -> float:
    """A bound on what float32, rounding so many times in a row, adds to a product of M codes with a
    vector of norm one.
    """
    return times * 2.0**-24 * 2 * LARGEST * math.sqrt(dim)


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
