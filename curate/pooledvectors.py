"""One vector for each row and step over all checkpoints: Σ_k √η_k · sketch_k.

Hashes of different checkpoints are independent, so an inner product of two such sums estimates the
sum over checkpoints of the inner products.

Letters: N rows, U slots (τ, or 1 for totals), V vectors, M sketch dimension.
"""

from __future__ import annotations

from contextlib import closing
from types import ModuleType
from typing import Literal

import numpy as np
import numpy.typing as npt

from curate.blocks import block_rows, open_rows, spans
from curate.errors import CurateError
from curate.rundir import RunDirectory
from curate.workers import in_order

Kind = Literal["steps", "totals"]
Floats = npt.NDArray[np.float32]
Numbers = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]
_PAIRS = 1 << 18
"""Products that a kernel makes at once; what it is told of each takes some hundred bytes."""


class PooledVectors:
    """Σ_k √η_k · sketch_k of one set; vector number v is slot v mod U of row v // U.

    Raises:
        CurateError: sketches are missing, or not of the run's dimension.
    """

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
        """float32 (V, M)."""
        out = np.zeros((len(numbers), self.dim), dtype=np.float32)
        rows, slots = np.divmod(numbers, self.slots)
        for root, source in zip(self.roots, self.sources, strict=True):
            values, scale = source.vectors(rows, slots)
            out += values[:, 0] * (root * scale)
        return out

    def products(
        self, numbers: Numbers, which: Numbers, queries: Doubles, kernels: ModuleType | None = None
    ) -> Doubles:
        """Inner products of some vectors, each with one of `queries` (Q, M), in float64.

        Args:
            which: the query of each, in ascending order.
            kernels: `sdi.compiled.search`, which reads the sketches where they lie.
        """
        out = np.empty(len(numbers))
        most = _PAIRS if kernels is not None else block_rows(1, self.dim)
        for start, stop in spans(0, len(numbers), most):
            some, own = numbers[start:stop], which[start:stop]
            if kernels is not None:
                out[start:stop] = self._settled(some, own, queries, kernels)
            else:
                every = np.unique(some)  # what several queries ask for is read once
                vectors = self.take(every)
                for query in np.unique(own):
                    mine = vectors[np.searchsorted(every, some[own == query])].astype(np.float64)
                    out[start:stop][own == query] = mine @ queries[query]
        return out

    def _settled(
        self, numbers: Numbers, which: Numbers, queries: Doubles, kernels: ModuleType
    ) -> Doubles:
        """`products` by a kernel."""
        from sdi import team  # with torch, which other readers of rows do without

        rows, slots = np.divmod(numbers, self.slots)
        places = np.array([source.places(rows, slots) for source in self.sources])
        values, scales = (np.ascontiguousarray(places[:, i]) for i in range(2))
        roots = np.array(self.roots, dtype=np.float32)
        queries = np.ascontiguousarray(queries, dtype=np.float64)
        which = np.ascontiguousarray(which, dtype=np.int64)
        vector, out = np.empty(self.dim, dtype=np.float32), np.empty(len(numbers))
        arrays = (values, scales, roots, queries, which, vector, out)
        job = 0, len(numbers), self.dim, len(roots), *(array.ctypes.data for array in arrays)
        team.run(kernels.settled, job, 1)
        return out

    def norms(self) -> Floats:
        """Norms of all vectors, (N · U,): four bytes each, and never less than they are."""

        def work(start: int, stop: int) -> Floats:
            squares = np.square(self.rows_of(start, stop), dtype=np.float64)
            norms = np.sqrt(squares.sum(axis=2)).ravel()
            with np.errstate(over="ignore"):
                above = np.nextafter(norms.astype(np.float32), np.float32(np.inf))
            return np.where(norms > 0, above, np.float32(0))

        blocks = spans(0, self.rows, block_rows(self.slots, self.dim))
        with closing(in_order(work, blocks)) as results:
            return np.concatenate([norms for _, norms in results])
