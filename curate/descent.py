"""Queries on their way down the bands of an index, and what each of them may still find.

Bands lie by norm, so that Cauchy-Schwarz tells when no later vector can enter. In each band a
product with the codes bounds the true one from both sides; whatever could be among the k best by
these bounds stays a candidate, for the sketches themselves to settle.

Letters: V vectors, Q queries, M sketch dimension.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch

from curate.bands import Band, Bands, Dots, Numbers, rounding
from curate.bitplanes import Probe
from curate.multiply import LARGEST, Operand, in_digits

Doubles = npt.NDArray[np.float64]
SLACK = 32
"""How many more are asked of a band than twice those that the band before had to give."""
SHARED = 8
"""Bands that are multiplied at once, at most."""
_ROUNDED = 2.0**-18
"""More than float32 rounds off what is held against a need, of the product of both norms."""
TOGETHER, WIDENED = 6, 8
"""From so many queries on a product of a band is faster than as many FAISS scans, in integers or,
where the processor has no fast ones, in float32."""


class Candidates:
    """Vectors that may be among the k best of a query of norm one, with bounds on their products.

    `least` bounds the k-th best from below; what is below it is dropped. `entered` of those that
    were added last were not.
    """

    def __init__(self, k: int) -> None:
        self.k, self.least, self.entered = k, -np.inf, k
        self.numbers: Numbers = np.empty(0, dtype=np.int64)
        self._low: Doubles = np.empty(0)
        self._high: Doubles = np.empty(0)

    def largest(self, most: int) -> Doubles:
        """The k largest lower bounds, the smallest first, after -∞ where there are fewer.

        Args:
            most: more than vectors there are; no more bounds are given than so many.
        """
        out = np.full(min(self.k, most), -np.inf)
        known = min(len(out), len(self._low))
        if known:
            out[-known:] = np.sort(np.partition(self._low, -known)[-known:])
        return out

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
        largest = np.abs(queries).max(axis=1)
        scaled = queries / np.where(largest > 0, largest, 1.0)[:, None]  # squares stay finite
        self._there = largest > 0
        self._units = units = (
            scaled / np.where(self._there, np.linalg.norm(scaled, axis=1), 1.0)[:, None]
        )
        self._probes: dict[int, Probe] = {}
        dim = queries.shape[1]
        self.candidates = [Candidates(k) for _ in queries]
        device = torch.device("cpu")
        digits = in_digits(device, dim)
        self._together = TOGETHER if digits else WIDENED
        # A program may have allowed torch to round the operands of float32 products.
        holds = digits or torch.get_float32_matmul_precision() == "highest"
        multiplies = len(queries) >= self._together and holds and not bands.gpu
        # FAISS and products in float32 round each sum; whole numbers add up exactly, and then it is
        # vectors, what is left of them, and products that were rounded once.
        self._scanned, self._exact = rounding(dim, dim), rounding(3, dim)
        self._multiplied = self._exact if digits else rounding(dim + 2, dim)
        largest = np.abs(units).max(axis=1)
        self._sizes = np.where(largest > 0, largest, 1.0) / LARGEST
        self._whole = np.rint(units / self._sizes[:, None])
        self._left = np.linalg.norm(units - self._sizes[:, None] * self._whole, axis=1)
        self._operand = Operand.of(self._whole, device) if multiplies else None

    def down(self, first: int, last: int) -> Numbers:
        """Take what could enter from bands that lie by norm; how many vectors each query saw."""
        seen = np.zeros(len(self.candidates), dtype=np.int64)
        many = 1
        while first < last:
            queries = range(len(self.candidates))
            active = np.array([query for query in queries if self._could(first, query)], np.int64)
            if self._operand is None or len(active) < self._together:
                for query in active:
                    seen[query] += self._alone(first, last, int(query))
                break
            end = self._end(first, min(last, first + many), active)
            bands = self._bands.bands[first:end]
            self._multiply(bands, active, self._operand.some(torch.from_numpy(active)))
            seen[active] += sum(band.count for band in bands)
            first, many = end, min(2 * many, SHARED)
        return seen

    def _multiply(self, bands: Sequence[Band], active: Numbers, operand: Operand) -> None:
        """Take what the products of all codes of bands say could enter."""
        left, sizes = self._left[active], self._sizes[active]
        least = np.array([self.candidates[query].least for query in active])
        rest = max(band.rest for band in bands) + self._multiplied
        found = []
        for band in bands:
            needs = least - (left + _ROUNDED) * band.norm
            floats = (each.astype(np.float32) for each in (sizes, (1 + left) * rest, needs))
            found.append(self._bands.reached(band, operand, *floats))
        which, places, dots = (np.concatenate(parts) for parts in zip(*found, strict=True))
        order = np.argsort(which, kind="stable")
        ends = np.searchsorted(which[order], np.arange(1, len(active)))
        for own in filter(len, np.split(order, ends)):
            query = int(active[which[own[0]]])
            self._take_rounded(query, places[own], dots[own], rest, self._left[query])

    def _could(self, number: int, query: int) -> bool:
        """Whether a vector of a band could still enter.

        Below zero a bound from norms says nothing, so such a search reads every band.
        """
        most = self._bands.norm[number] if self._there[query] else 0.0
        return not self.candidates[query].least >= most

    def _end(self, first: int, last: int, queries: Iterable[int]) -> int:
        """Where the bands end, of some, that could have something for any of the queries."""
        end = first + 1
        while end < last and any(self._could(end, query) for query in queries):
            end += 1
        return end

    def _alone(self, first: int, last: int, query: int) -> int:
        """Take what could enter for one query; how many vectors it saw."""
        seen = 0
        while first < last and self._could(first, query):
            kernels = self._bands.screens()
            if kernels is None:
                self._scan(self._bands.bands[first], query)
                bands, saw = 1, self._bands.bands[first].count
            else:
                bands, saw = self._screen(kernels, first, last, query)
            first, seen = first + bands, seen + saw
        return seen

    def _screen(self, kernels: ModuleType, first: int, last: int, query: int) -> tuple[int, int]:
        """Take what the bits of bands leave, by exact products with their codes; how many bands and
        vectors that went through.
        """
        if query not in self._probes:
            self._probes[query] = Probe(self._units[query])
        bands, before, some = self._bands, self.candidates[query], slice(first, last)
        start = bands.bands[first].start
        found = self._probes[query].screen(
            kernels,
            bands.told(first, last),
            bands.rest[some] + self._exact,
            bands.lost[some],
            bands.scales[start:],
            bands.norms[start:],
            before.largest(len(bands.norms) + 1),
        )
        numbers = bands.numbers[start + found.places]
        self.candidates[query] = before.with_more(numbers, found.low, found.high)
        return found.bands, found.seen

    def _scan(self, band: Band, query: int) -> None:
        """Ask FAISS for more and more of a band, until those that are left cannot enter."""
        before, left, size = self.candidates[query], self._left[query], self._sizes[query]
        whole = self._whole[query].astype(np.float32)
        rest = band.rest + self._scanned
        want = min(band.count, max(1, 2 * before.entered + SLACK))
        while True:
            found, places = self._bands.nearest(band, whole, want)
            self.candidates[query] = before
            self._take_rounded(query, band.start + places, size * found, rest, left)
            if len(places) == band.count:
                return
            most = max(size * found[-1] + rest * (1 + left), 0.0) * band.scale + left * band.norm
            if most < self.candidates[query].least:
                return
            want = min(band.count, 4 * want)

    def _take_rounded(
        self, query: int, places: Numbers, dots: Dots, rest: float, left: float
    ) -> None:
        """Take vectors by the products of their codes, `rest` more or less, with a query that was
        rounded to whole numbers, which left `left` of it.
        """
        scales = self._bands.scales[places].astype(np.float64)
        margin = rest * (1 + left) + left * (self._bands.norms[places] / scales)
        low, high = (dots - margin) * scales, (dots + margin) * scales
        numbers = self._bands.numbers[places]
        self.candidates[query] = self.candidates[query].with_more(numbers, low, high)
