"""Queries on their way down the bands of an index, and what each of them may still find.

Bands lie by norm, so that Cauchy-Schwarz tells when no later vector can enter. In each band a
product with the codes bounds the true one from both sides; whatever could be among the k best by
these bounds stays a candidate, for the sketches themselves to settle.

Letters: V vectors, Q queries, M sketch dimension.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from curate.bands import Band, Bands, Numbers, rounding
from curate.multiply import LARGEST, Operand, in_digits

Doubles = npt.NDArray[np.float64]
SLACK = 32
"""How many more are asked of a band than twice those that the band before had to give."""
TOGETHER, WIDENED = 6, 8
"""From so many queries on a product of a band is faster than as many FAISS scans, in integers or,
where the processor has no fast ones, in float32."""


class Candidates:
    """Vectors that may be among the k best of a query, with bounds on their inner products.

    `least` bounds the k-th best from below; what is below it is dropped. `entered` of those that
    were added last were not.
    """

    def __init__(self, k: int) -> None:
        self.k, self.least, self.entered = k, -np.inf, k
        self.numbers: Numbers = np.empty(0, dtype=np.int64)
        self._low: Doubles = np.empty(0)
        self._high: Doubles = np.empty(0)

    def with_more(self, numbers: Numbers, low: Doubles, high: Doubles) -> Candidates:
        """These and others."""
        out = Candidates(self.k)
        low, high = np.concatenate([self._low, low]), np.concatenate([self._high, high])
        if len(low) >= self.k:
            out.least = max(self.least, float(np.partition(low, -self.k)[-self.k]))
        keep = high >= out.least
        out.entered = int(np.count_nonzero(keep[len(self.numbers) :]))
        out.numbers = np.concatenate([self.numbers, numbers])[keep]
        out._low, out._high = low[keep], high[keep]
        return out


class Descent:
    """Several queries on their way down the bands.

    A query of norm one is s·w + δ with w in whole numbers, which is what FAISS is asked for; by
    Cauchy-Schwarz δ moves a product by no more than its norm times the vector's.
    """

    def __init__(self, bands: Bands, queries: Doubles, k: int) -> None:
        self._bands = bands
        self.norms = np.linalg.norm(queries, axis=1)
        units = queries / np.where(self.norms > 0, self.norms, 1.0)[:, None]
        dim = queries.shape[1]
        self.candidates = [Candidates(k) for _ in queries]
        device = torch.device("cpu")
        digits = in_digits(device, dim)
        self._together = TOGETHER if digits else WIDENED
        # A program may have allowed torch to round the operands of float32 products.
        holds = digits or torch.get_float32_matmul_precision() == "highest"
        multiplies = len(queries) >= self._together and holds and not bands.gpu
        self._operand = Operand.of(units, device) if multiplies else None
        largest = np.abs(units).max(axis=1)
        # FAISS and products in float32 round each sum. Digits add up exactly; they leave so much of
        # a query's entries, and become float32 in fewer than eight roundings.
        times = 8 + largest * np.sqrt(dim) if digits else np.full(len(queries), dim + 2.0)
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
        if self._operand is None or len(active) < self._together:
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
        want = min(band.count, max(1, 2 * before.entered + SLACK))
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
