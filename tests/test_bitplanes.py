"""Bit planes: bounds that hold at every level, and searches that find the same through them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from curate import bands, bitplanes, index, pooledvectors
from curate.bitplanes import LEVELS, PLANES, STRIPES, Planes, Probe
from curate.errors import CurateError
from sdi import team
from tests.sketchedrun import make
from tests.test_blocks import source
from tests.test_descent import by_norm, went_down


@pytest.fixture
def kernels() -> ModuleType:
    found = team.kernels("search") if {"avx2"} <= team.features() else None
    if found is None:
        pytest.skip("this processor looks up no bytes in tables, or numba is not installed")
    return found


def vectors_of(kind: str, count: int, dim: int) -> np.ndarray:
    """float32 (V, M): as they come, of heavy tails, of few entries, of the query's direction."""
    random = np.random.default_rng(dim)
    values = random.normal(size=(count, dim))
    if kind == "heavy":
        values = random.standard_t(1.5, size=(count, dim))
    elif kind == "sparse":
        values *= random.random(size=(count, dim)) < 0.02
        values[:, 0] += 1e-3
    elif kind == "aligned":
        values = random.uniform(-1, 1, size=(count, 1)) * query_of(dim) + 1e-3 * values
    return np.asarray(values * random.lognormal(size=(count, 1)), dtype=np.float32)


def query_of(dim: int) -> np.ndarray:
    made = np.random.default_rng(7).normal(size=dim)
    return made / np.linalg.norm(made)


def pictured(path: Path, level: int, count: int) -> np.ndarray:
    """What g·x of each vector is at a level, from the files alone (V, M)."""
    bits, bounds = (np.load(path.with_suffix(end)) for end in (".planes.npy", ".bounds.npy"))
    kept = bits.transpose(0, 2, 4, 1, 3).reshape(PLANES, -1, STRIPES, bits.shape[3])
    signs = 2.0 * np.unpackbits(kept, axis=3, bitorder="little") - 1
    x = np.zeros(signs.shape[1:])
    for own in range(level):
        plane, stripe = divmod(own, STRIPES)
        x[:, stripe] += 2.0 ** (PLANES - 1 - plane) * signs[plane, :, stripe]
    found: np.ndarray = x.reshape(len(x), -1)[:count] * bounds[level - 1, 0, :count, None]
    return found


@pytest.mark.parametrize("kind", ["normal", "heavy", "sparse", "aligned"])
@pytest.mark.parametrize(("count", "dim"), [(1, 32), (100, 64), (70, 1024)])
def test_rests_are_what_a_level_leaves(kind: str, count: int, dim: int, tmp_path: Path) -> None:
    """‖v − g·x‖ never exceeds the rest, and is no less than it says but for rounding."""
    values = vectors_of(kind, count, dim)
    lost = bitplanes.write_planes(tmp_path / "band", values)
    bounds = np.load(tmp_path / "band.bounds.npy")
    norms = np.linalg.norm(values.astype(np.float64), axis=1)
    for level in range(1, LEVELS + 1):
        left = np.linalg.norm(values - pictured(tmp_path / "band", level, count), axis=1)
        rests = bounds[level - 1, 1, :count]
        assert (rests >= left * (1 - 1e-12)).all()
        assert (rests <= left + 2e-6 * norms).all()
        assert lost[level - 1] == pytest.approx((left / norms).mean(), abs=1e-4)
    assert not bounds[:, :, count:].any()
    if kind == "normal" and count > 1:  # what Max (1960) found, and the levels go down to it
        assert lost[-1] == pytest.approx(0.107, abs=0.015)
        assert (np.diff(lost) < 0).all()


def bounded(path: Path, level: int, count: int, query: np.ndarray) -> np.ndarray:
    """What a band's bits say of products (V,) at most, from the files alone; at level 0 nothing."""
    if level == 0:
        return np.full(count, np.inf)
    rests = np.load(path.with_suffix(".bounds.npy"))[level - 1, 1, :count]
    found: np.ndarray = pictured(path, level, count) @ query + rests * np.linalg.norm(query)
    return found


def always(level: int, bands: int) -> np.ndarray:
    """What bits leave (B, L), by which the kernel finds that this level costs least."""
    lost = np.full((bands, LEVELS), 1e3)
    lost[:, level - 1 : level] = -1e3
    return lost


@pytest.mark.parametrize("kind", ["normal", "heavy", "sparse", "aligned"])
@pytest.mark.parametrize(
    ("counts", "dim"),
    [((1,), 32), ((4500, 70), 96), ((100, 64), 64), ((70, 5), 1024), ((33,), 8224)],
)
def test_what_passes(
    kind: str, counts: tuple[int, ...], dim: int, tmp_path: Path, kernels: ModuleType
) -> None:
    """At every level all vectors pass whose product with the query is large enough, only those
    whose bounds are, and with bounds by exact products of their codes; the largest numbers
    included.
    """
    query = query_of(dim)
    probe = Probe(query)
    whole = probe._whole.astype(np.int64)
    assert np.linalg.norm(query - whole * probe._step) <= probe._left < 1e-3
    held, values, codes = [], [], []
    for number, count in enumerate(counts):
        values.append(vectors_of(kind, count, dim))
        codes.append(np.random.default_rng(number).integers(0, 256, (count, dim)).astype(np.uint8))
        codes[-1][0] = np.where(whole > 0, 255, 0)
        bitplanes.write_planes(tmp_path / f"band-{number}", values[-1])
        held.append(Planes(tmp_path / f"band-{number}", codes[-1], None))
    told = np.array([planes.told for planes in held])
    exact = np.concatenate(values).astype(np.float64) @ query
    longest = max(np.linalg.norm(own.astype(np.float64), axis=1).max() for own in values)
    norms = (longest * np.linspace(1.5, 1.1, len(exact))).astype(np.float32)  # falling, as in bands
    pieces = [np.arange(count) // kernels.PIECE * kernels.PIECE for count in counts]
    starts = np.repeat(np.cumsum([0, *counts[:-1]]), counts)
    most = norms[starts + np.concatenate(pieces)].astype(np.float64)
    mixed = np.random.default_rng(1).uniform(0.5, 1, len(exact))
    mixed[0] = 1
    dots = (np.concatenate(codes).astype(np.int64) - 128) @ whole
    coarse = np.rint(query / probe._size) * probe._size
    rests = np.linspace(0, 0.5, len(counts))
    for level in range(LEVELS + 1):
        bounds = np.concatenate(
            [
                bounded(tmp_path / f"band-{number}", level, count, coarse)
                for number, count in enumerate(counts)
            ]
        )
        for share in (0.2, 0.7, 0.99):
            least = float(np.quantile(np.abs(exact), share))
            useful = max(1.0, float(np.quantile(dots, 1 - share)) * probe._step)
            scales = (mixed * least / useful).astype(np.float32)
            best = np.full(len(exact) + 1, least)
            lost = always(level, len(counts))
            found = probe.screen(kernels, told, rests, lost, scales, norms, best)
            assert (found.bands, found.seen) == (len(counts), len(exact)) and best[0] == least
            products = dots * probe._step * scales.astype(np.float64)
            off = np.repeat(rests, counts) * (1 + probe._left) * scales
            off = off + probe._left * norms.astype(np.float64)
            np.testing.assert_allclose(found.low, (products - off)[found.places], rtol=1e-9)
            np.testing.assert_allclose(found.high, (products + off)[found.places], rtol=1e-9)
            assert np.sort(best)[len(best) - len(found.low) :] == pytest.approx(
                np.sort(np.maximum(found.low, least))
            )
            need, slack = least - probe._short * most, 3e-5 * most
            wanted = products + off >= least
            assert wanted.any()
            passed = np.zeros(len(exact), dtype=bool)
            passed[found.places] = True
            assert passed[wanted & (exact >= least)].all()
            assert passed[wanted & (bounds >= need + slack)].all()
            assert (wanted & (bounds >= need - 3 * slack))[found.places].all()


def test_a_search_ends_within_a_band(
    tmp_path: Path, kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longest vectors of a band are gone through first, and none of those that are too short
    by what was found among these.
    """
    size = kernels.PIECE
    for name in ("FIRST", "LEAST"):
        monkeypatch.setattr(bands, name, 4 * size)
    vectors = np.random.default_rng(0).normal(size=(3 * size, 32)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1)[:, None]
    vectors *= np.repeat([1, 100, 90], size)[:, None]
    kept, search, saw = went_down(tmp_path, vectors, by_norm(vectors), query_of(32), k=10)
    assert len(kept.bands) == 1 and saw == [2 * size]
    best = np.argsort(-vectors @ query_of(32))[:10]
    assert set(best) <= set(search.candidates[0].numbers)


@pytest.mark.parametrize("level", [0, 1, 3, 8, LEVELS])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("opened", "room", "pairs"), [(1, 0, 100), (3, 1 << 16, 7), (100, 0, 1 << 18)]
)
def test_searches_find_the_same(
    level: int,
    tied: bool,
    opened: int,
    room: int,
    pairs: int,
    tmp_path: Path,
    kernels: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever level is read, and however many bands are open, finds there is room for and products
    are made at once, a search finds what the plain product finds.
    """
    monkeypatch.setattr(bands, "BAND_BYTES", 40 * 64 * 4)
    monkeypatch.setattr(bands, "_OPENED", opened)
    monkeypatch.setattr(bitplanes, "_ROOM", room)
    monkeypatch.setattr(pooledvectors, "_PAIRS", pairs)
    calls: list[int] = []
    screen = Probe.screen

    def seen(*given: Any) -> Any:
        found = screen(*given)
        calls.append(found.bands)
        return found

    monkeypatch.setattr(Probe, "screen", seen)
    monkeypatch.setattr(bands.Bands, "nearest", None)
    made = make(tmp_path / "run", rows=90, tied=tied)
    index.build_index(made.run)
    queries = np.random.default_rng(0).normal(size=(4, 64))
    queries[1:3] = index.PooledVectors(made.run, "train", "steps").rows_of(3, 5)[:, 3]
    queries[3] = 0
    slot = None if tied else 2
    for k in (1, 10, 70):
        searcher = index.Searcher(made.run, many=True)
        assert searcher.bands is not None
        searcher.bands.lost = always(level, len(searcher.bands.bands))
        with_planes = searcher.search(queries, k, slot=slot)
        plain = index.Searcher(made.run, use_index=False).search(queries, k, slot=slot)
        for one, other in zip(with_planes, plain, strict=True):
            assert one.numbers.tolist() == other.numbers.tolist()
            np.testing.assert_allclose(one.scores, other.scores, rtol=1e-6)
    ended_early = len(calls) > 12  # 4 queries for 3 numbers of rows
    assert ended_early or (opened, tied) == (3, False)  # which has three bands of a step


def test_products_are_those_of_rounded_vectors(tmp_path: Path, kernels: ModuleType) -> None:
    """The kernel adds checkpoints up as NumPy does, to the last digit of each entry."""
    made = make(tmp_path / "run")
    vectors = index.PooledVectors(made.run, "train", "steps")
    some_lack_slots = (3, 1, 2), (0, 3, 0)
    vectors.sources = [source(depths, dim=72) for depths in some_lack_slots]
    vectors.rows, vectors.slots, vectors.dim = 12, 3, vectors.sources[0].dim
    random = np.random.default_rng(0)
    queries = random.normal(size=(3, vectors.dim))
    for count in (0, 1, 100):
        numbers = random.integers(0, 36, count)
        which = random.integers(0, 3, count)
        taken = vectors.take(numbers).astype(np.float64)
        size = np.abs(taken * queries[which]).sum(axis=1)
        found = vectors.products(numbers, which, queries, kernels)
        assert (np.abs(found - (taken * queries[which]).sum(axis=1)) <= 1e-14 * size).all()


def test_tiny_vectors_are_read_whole(tmp_path: Path, kernels: ModuleType) -> None:
    """Where float32 has no digits left for what bits tell."""
    values = vectors_of("normal", 70, 64) * np.float32(1e-38)
    bitplanes.write_planes(tmp_path / "band", values)
    codes = np.full((70, 64), 255, dtype=np.uint8)
    told = np.array([Planes(tmp_path / "band", codes, None).told])
    norms = np.full(70, 1e-36, dtype=np.float32)
    best = np.full(100, 1e-37)
    found = Probe(query_of(64)).screen(
        kernels, told, np.full(1, 1e3), always(1, 1), np.full(70, 1e-38, np.float32), norms, best
    )
    assert len(found.places) == 70


def test_bands_that_are_open_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread's kernel may be reading in them."""
    monkeypatch.setattr(bands, "BAND_BYTES", 40 * 64 * 4)
    made = make(tmp_path / "run", rows=90)
    index.build_index(made.run)
    kept = index.Searcher(made.run).bands
    assert kept is not None and len(kept.bands) > 4
    told = kept.told(2, 4)
    before = kept._planes[2:4]
    assert None not in before and kept._planes[0] is None
    after = kept.told(0, 4)
    assert kept._planes[2:4] == before and (after[2:] == told).all() and after.all()


@pytest.mark.parametrize("name", ["numbers", "scales", "norms"])
def test_files_of_other_vectors(tmp_path: Path, name: str) -> None:
    """Are no index: a kernel would read beyond them, or other numbers."""
    made = make(tmp_path / "run", rows=90)
    index.build_index(made.run)
    opened = index.Searcher(made.run).bands
    assert opened is not None
    path = opened._directory / f"{name}.npy"
    whole = np.load(path)
    for other in (whole[:-1], whole.astype(np.float16)):
        np.save(path, other)
        searcher = index.Searcher(made.run)
        assert searcher.bands is None and f"{name}.npy holds" in searcher.without
    index.build_index(made.run)
    np.testing.assert_array_equal(np.load(path), whole)
    index.build_index(made.run)
    opened = index.Searcher(made.run).bands
    assert opened is not None
    bounds = opened._path(opened.bands[0], bitplanes.ENDS[1])
    np.save(bounds, np.load(bounds).astype(np.float16))
    with pytest.raises(CurateError, match=r"bit planes of .*float16"):
        opened.told(0, 1)


def test_vectors_at_the_ends_of_float32(tmp_path: Path) -> None:
    """Whose norm is infinite are refused when an index is made; none is too small for one."""
    values = np.random.default_rng(0).normal(size=(30, 64)).astype(np.float32)
    norms = np.full(30, np.inf, dtype=np.float32)
    with pytest.raises(CurateError, match="30 vectors, number 0 the first, are longer than"):
        bands.write_bands(tmp_path, [np.arange(30)], norms, lambda numbers: values[numbers])
    values *= np.float32(1e-45)
    _, search, _ = went_down(tmp_path, values, by_norm(values), query_of(64), k=3)
    best = np.argsort(-values.astype(np.float64) @ query_of(64))[:3]
    assert set(best) <= set(search.candidates[0].numbers)


def test_levels_cost_least(kernels: ModuleType) -> None:
    """Short vectors are told by few bits, long ones need more or all, and of hopeless ones none."""
    lost = np.linspace(0.9, 0.1, LEVELS)
    found = [kernels.level(lost, 1 / norm, 1024, 32) for norm in (1.01, 2.0, 4.0, 50.0)]
    assert 0 < found[0] < found[1] < found[2] and found[3] == 0


def test_an_index_of_any_dimension(tmp_path: Path) -> None:
    """Where a stripe would be no whole bytes there are no planes, and FAISS scans."""
    vectors = np.random.default_rng(0).normal(size=(200, 40)).astype(np.float32)
    kept, search, saw = went_down(tmp_path, vectors, by_norm(vectors), query_of(40))
    assert [band.lost for band in kept.bands] == [[]]
    assert not list(tmp_path.glob("*planes*"))
    assert saw == [200]
    assert (vectors @ query_of(40)).argmax() in search.candidates[0].numbers


def test_planes_that_are_not_there(tmp_path: Path) -> None:
    """An index that lacks them is none; of another size they are refused, not read."""
    made = make(tmp_path / "run", rows=90)
    index.build_index(made.run)
    searcher = index.Searcher(made.run, many=True)
    assert searcher.bands is not None
    planes = searcher.bands._path(searcher.bands.bands[0], bitplanes.ENDS[0])
    bits = np.load(planes)
    np.save(planes, bits[:, :, :-1])
    if searcher.bands.screens() is not None:
        with pytest.raises(CurateError, match="bit planes of"):
            searcher.search(np.ones((1, 64)), 5)
    planes.write_bytes(planes.read_bytes()[:100])
    if searcher.bands.screens() is not None:
        with pytest.raises(CurateError, match="no bit planes"):
            searcher.search(np.ones((1, 64)), 5)
    planes.unlink()
    assert index.Searcher(made.run, many=True).bands is None


def test_a_few_searches_load_no_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not before FAISS has read as much as loading it takes."""
    made = make(tmp_path / "run", rows=90)
    index.build_index(made.run)
    searcher = index.Searcher(made.run)
    assert searcher.bands is not None and searcher.bands.screens() is None
    searcher.search(np.ones((3, 64)), 5)
    assert searcher.bands.screens() is None
    loaded: list[str] = []
    monkeypatch.setattr(bands, "PAYS", 64)
    monkeypatch.setattr(team, "kernels", loaded.append)
    assert searcher.bands.screens() is None
    assert loaded == (["search"] if "avx2" in team.features() else [])


def test_smaller_registers(tmp_path: Path, kernels: ModuleType) -> None:
    """What processors without AVX-512 are given finds the same."""
    from sdi.compiled.lookups import REGISTER  # not without numba

    if REGISTER == 32:
        pytest.skip("they are what all the other tests ran on")
    features = "sse sse2 sse3 ssse3 sse4.1 sse4.2 avx avx2 fma bmi bmi2 popcnt f16c lzcnt cx16"
    told = {
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": ",".join(f"+{each}" for each in features.split()),
        "NUMBA_CACHE_DIR": str(tmp_path),
    }
    test = f"{__file__}::test_what_passes"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test]
    done = subprocess.run(
        command, env=os.environ | told, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "20 passed" in done.stdout, done.stdout + done.stderr
