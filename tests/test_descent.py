"""Bounds: candidates hold what belongs to the best by whatever rounding hides."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from curate import bands, descent, multiply
from curate.bitplanes import Probe
from sdi.sketch.quantize import quantize


def hidden_by(rounded: str) -> tuple[np.ndarray, np.ndarray]:
    """Query (1, M) and vectors (1000, M) whose rounded products nearly tie: which is the best
    shows only in what rounding leaves, of the query, of the vectors, or of sums in float32.
    """
    random = np.random.default_rng(0)
    if rounded == "sums":  # codes swapped between entries of the query that float32 holds as equal
        query = np.repeat(random.normal(size=128) * 30, 2) * (1 + 1e-9 * random.normal(size=256))
        codes = np.rint(random.normal(size=(128, 2)) * 30)
        codes[0] = 127, 0
        swapped = random.random(size=(1000, 128, 1)) < 0.5
        vectors = np.where(swapped, codes[:, ::-1], codes).reshape(1000, 256)
        return query[None], vectors.astype(np.float32)
    share = random.permutation(np.linspace(-1, 1, 1000))[:, None]
    query = random.normal(size=64) * 30
    query[0], query[1] = 0, 127
    vectors = np.rint(random.normal(size=(1, 64)) * 30)
    if rounded == "query":
        left = query - np.rint(query)
        across = left - np.rint(query) * (left @ np.rint(query)) / (np.rint(query) ** 2).sum()
        vectors = np.rint(60 * query / 127 + 67 * share * across / np.abs(across).max())
    else:
        query = np.rint(query)
        vectors = vectors + 0.45 * share * np.sign(query)
        vectors[:, 2] += np.where(share[:, 0] < 0.9, 1, -1) * np.sign(query[2])
    vectors[:, 0] = 127  # the scale is one; the query has nothing there
    return query[None], vectors.astype(np.float32)


def went_down(
    path: Path,
    vectors: np.ndarray,
    order: np.ndarray,
    query: np.ndarray,
    queries: int = 1,
    many: bool = True,
    k: int = 1,
) -> tuple[bands.Bands, descent.Descent, np.ndarray]:
    """The bands of vectors, so many times the same query that has been down them for the k best,
    and how many vectors each saw.
    """
    exact = np.linalg.norm(vectors.astype(np.float64), axis=1).astype(np.float32)
    norms = np.nextafter(exact, np.float32(np.inf))
    entries = bands.write_bands(path, [order], norms, lambda numbers: vectors[numbers])
    kept = bands.Bands(path, entries, vectors.shape[1], many=many)
    search = descent.Descent(kept, np.repeat(query[None], queries, axis=0), k)
    return kept, search, search.down(0, len(entries))


def by_norm(vectors: np.ndarray) -> np.ndarray:
    return np.argsort(-np.linalg.norm(vectors.astype(np.float64), axis=1), kind="stable")


@pytest.mark.parametrize("rounded", ["query", "vectors", "sums"])
@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("queries", [1, 12])
def test_bounds_hold_what_rounding_hides(
    tmp_path: Path, rounded: str, queries: int, many: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FAISS sees whole numbers only, and sums in float32 are rounded; candidates hold the best by
    what they do not see.
    """
    query, vectors = hidden_by(rounded)
    monkeypatch.setattr(bands, "BAND_BYTES", 300 * 4 * vectors.shape[1])
    kept, search, saw = went_down(tmp_path, vectors, by_norm(vectors), query[0], queries, many)
    assert len(kept.bands) == 4 and (saw > 300).all()
    products = vectors.astype(np.float64) @ query[0]
    seen, _ = kept.nearest(kept.bands[0], np.rint(query[0]).astype(np.float32), 300)
    assert np.ptp(seen) < np.ptp(products)
    assert all(products.argmax() in own.numbers for own in search.candidates)


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("queries", [1, 12])
def test_bounds_hold_what_float32_rounds(
    tmp_path: Path, queries: int, many: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vector is its code times its scale but for the last digit of each entry, which decides here
    what is the best; neither the query nor the codes leave anything else.
    """
    monkeypatch.setattr(bands, "BAND_BYTES", 300 * 4 * 64)
    random = np.random.default_rng(0)
    query = np.ones((1, 64))
    query[0, 0] = 0
    codes = random.integers(20, 100, (20_000, 64)).astype(np.float32)
    codes[:, 0] = 127
    vectors = codes * (1 / codes[:, 1:].sum(axis=1)).astype(np.float32)[:, None]
    kept_codes, scales = quantize(vectors)
    nothing_left = (vectors / scales[:, None] == kept_codes).all(axis=1)
    codes, vectors, scales = (each[nothing_left][:1000] for each in (codes, vectors, scales))
    kept, search, saw = went_down(tmp_path, vectors, by_norm(vectors), query[0], queries, many)
    assert len(kept.bands) == 4 and (saw > 300).all()
    exact = vectors.astype(np.float64) @ query[0]
    told = (codes.astype(np.float64) @ query[0]) * scales
    assert exact.argmax() != told.argmax()
    assert all(exact.argmax() in own.numbers for own in search.candidates)


def opposed(unit: np.ndarray, whole: np.ndarray, size: float) -> np.ndarray:
    """Two vectors (2, M) that lie along and against what rounding leaves of a query: the first,
    longer one has the larger product with the rounded query, by more than its own bound, and the
    smaller one with the query.
    """
    random = np.random.default_rng(0)
    left = unit - size * whole
    across = left - unit * (left @ unit)
    signs = np.repeat([-1.0, 1.0], 2000)[:, None]
    both = 120 * signs * across / np.abs(across).max() + random.uniform(-1, 1, (4000, len(unit)))
    both = np.clip(np.rint(both + random.uniform(10, 30, (4000, 1)) * unit), -127, 127)
    both[:, np.abs(across).argmin()] = 127  # the scale is one
    against, along = both[:2000], both[2000:]
    told = both[:2000] @ (size * whole), both[2000:] @ (size * whole)
    more = told[0][:, None] - told[1]
    own = np.linalg.norm(left) * np.linalg.norm(against, axis=1)[:, None]
    wanted = (against @ unit)[:, None] < along @ unit
    wanted &= np.linalg.norm(against, axis=1)[:, None] > np.linalg.norm(along, axis=1)
    wanted &= (more > 1.2 * own) & (told[0][:, None] > 2 * own)
    first, second = np.argwhere(wanted)[0]
    return np.stack([against[first], along[second]])


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("queries", [1, 12])
def test_bounds_are_of_both_sides(
    tmp_path: Path, queries: int, many: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What may enter is held against the least that is known with the most that it may be."""
    monkeypatch.setattr(bands, "BAND_BYTES", 4 * 64)
    unit = np.random.default_rng(1).normal(size=64)
    unit /= np.linalg.norm(unit)
    size = np.abs(unit).max() / multiply.LARGEST
    whole = np.rint(unit / size)
    if many and queries == 1:
        probe = Probe(unit)
        whole, size = probe._whole, probe._step
    vectors = opposed(unit, whole, size).astype(np.float32)
    _, search, saw = went_down(tmp_path, vectors, np.arange(2), unit, queries, many)
    assert (saw == 2).all()
    assert all(1 in own.numbers for own in search.candidates)


def test_candidates_keep_the_largest_bounds() -> None:
    """Which a search goes on with: as many as are sought, or as there may be."""
    known = descent.Candidates(4)
    assert known.largest(3).tolist() == [-np.inf] * 3
    known = known.with_more(np.arange(3), np.array([2.0, 0, 1]), np.full(3, 9.0))
    assert known.largest(10).tolist() == [-np.inf, 0, 1, 2] and known.least == -np.inf
    known = known.with_more(np.arange(3, 6), np.array([5.0, 3, -1]), np.full(3, 9.0))
    assert known.largest(10).tolist() == [1, 2, 3, 5] and known.least == 1
    assert known.largest(2).tolist() == [3, 5]
