"""Search: exact against brute force, with and without an index, tied and untied."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from curate import bands, descent, index, multiply
from curate.blocks import Block
from curate.cli import main
from curate.errors import UsageError
from curate.pooledvectors import PooledVectors
from curate.rundir import RunDirectory
from curate.status import status
from tests.sketchedrun import WEIGHTS, Made, make


def combined(made: Made, name: str) -> np.ndarray:
    """Σ_k η_k ⟨·, ·⟩ as one inner product: (N, τ, K·M) float64."""
    return np.concatenate([np.sqrt(w) * made.values[name, c] for c, w in WEIGHTS.items()], axis=2)


def pooled(made: Made, name: str, kind: str = "values") -> np.ndarray:
    """Σ_k √η_k · sketch_k."""
    return sum(np.sqrt(w) * getattr(made, kind)[name, c] for c, w in WEIGHTS.items())


@pytest.mark.parametrize("tied", [True, False])
def test_index_is_exact(tmp_path: Path, tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bands find what the plain product finds, which is brute force's M_{s,t}."""
    monkeypatch.setattr(bands, "BAND_BYTES", 40 * 64 * 4)
    made = make(tmp_path / "run", rows=90, tied=tied)
    index.build_index(made.run)
    train, query = pooled(made, "train"), pooled(made, "test")
    for row in range(3):
        scores = np.einsum("ntm,m->nt", train, query[row, 1])
        if not tied:
            scores[:, [0, 2, 3]] = -np.inf
        order = np.argsort(-scores, axis=None, kind="stable")[:10]
        for use in (True, False):
            found = index.neighbours(made.run, row=row, step=2, query="test", use_index=use)
            got = found["row"].to_numpy() * 4 + found["step"].to_numpy() - 1
            assert got.tolist() == order.tolist()
            np.testing.assert_allclose(found["score"], scores.ravel()[order], rtol=1e-5)
            assert found["id"][0] == f"train{found['row'][0]}"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize(("queries", "integers"), [(3, False), (12, False), (12, True)])
def test_many_queries_at_once(
    tmp_path: Path,
    tied: bool,
    queries: int,
    integers: bool,
    many: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Scanned one by one or multiplied together, with kernels or without, from small bands or with
    none: the same rows, which are brute force's; so too for opposite vectors, zero, and more rows
    than there are.
    """
    if integers and not multiply.exact_integers():
        pytest.skip("this processor has no fast exact int8 products")
    monkeypatch.setattr(multiply, "exact_integers", lambda: integers)
    multiplied, look = [], descent.Descent._multiply
    monkeypatch.setattr(
        descent.Descent, "_multiply", lambda *given: (multiplied.append(given), look(*given))
    )
    monkeypatch.setattr(bands, "BAND_BYTES", 40 * 64 * 4)
    monkeypatch.setattr(descent, "SLACK", 0)  # so that a scan has to ask for more
    made = make(tmp_path / "run", rows=90, tied=tied)
    index.build_index(made.run)
    train = pooled(made, "train")
    vectors = np.random.default_rng(0).normal(size=(queries, 64))
    vectors[1], vectors[2] = -train[3, 3], train[3, 3]
    slot = None if tied else 2
    scores = np.einsum("ntm,qm->qnt", train, vectors)
    if slot is not None:
        scores[:, :, [0, 1, 3]] = -np.inf
    for k in (1, 10, 70, 1000):
        searcher = index.Searcher(made.run, many=many)
        assert searcher.bands is not None and len(searcher.bands.bands) > 2
        there = min(k, 90 if slot is not None else 360)
        plain = index.Searcher(made.run, use_index=False).search(vectors, k, slot=slot)
        for own, found, same in zip(scores, searcher.search(vectors, k, slot=slot), plain,
                                    strict=True):  # fmt: skip
            order = np.argsort(-own, axis=None, kind="stable")[:there]
            assert found.numbers.tolist() == same.numbers.tolist() == order.tolist()
            np.testing.assert_allclose(found.scores, own.ravel()[order], rtol=1e-4, atol=1e-7)
    assert bool(multiplied) == (queries == 12)
    assert len(searcher.search(np.zeros((1, 64)), 5)[0].numbers) == 5
    whole, plain = (
        index.Searcher(made.run, use_index=use).search(vectors, 9) for use in (True, False)
    )
    for one, other in zip(whole, plain, strict=True):  # of an untied model, every step
        assert one.numbers.tolist() == other.numbers.tolist()


def test_products_that_torch_may_round_are_left_to_faiss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a program lets torch multiply float32 in fewer digits, the bounds would not hold."""
    made = make(tmp_path / "run", rows=90)
    index.build_index(made.run)
    monkeypatch.setattr(multiply, "exact_integers", lambda: False)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    monkeypatch.setattr(descent.Descent, "_multiply", None)
    found = index.Searcher(made.run).search(pooled(made, "test")[:, 0].repeat(2, axis=0), 3)
    assert all(len(own.numbers) == 3 for own in found)


def test_norms_are_bounds(tmp_path: Path) -> None:
    """No vector is longer than its norm says, however small it is."""
    made = make(tmp_path / "run", rows=20)
    vectors = PooledVectors(made.run, "train", "steps")
    small = [Block(b.values, b.scale * 1e-25, b.norm) for b in vectors.sources[0]._plain]
    vectors.sources[0]._plain = small
    vectors.sources, vectors.roots = vectors.sources[:1], [1.0]
    exact = np.linalg.norm(vectors.rows_of(0, 20).astype(np.float64), axis=2).ravel()
    norms = vectors.norms()
    assert (norms >= exact).all() and (norms <= exact * (1 + 1e-6)).all() and (norms > 0).any()


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("size", [1e-300, 1e-160, 1.0, 1e160, 1e300])
def test_queries_of_any_size(tmp_path: Path, size: float, many: bool) -> None:
    """Neither a norm's square nor a product is too large or too small to tell vectors apart."""
    made = make(tmp_path / "run", rows=90)
    index.build_index(made.run)
    queries = np.random.default_rng(0).normal(size=(9, 64))
    searcher = index.Searcher(made.run, many=many)
    for some in (queries, queries[:2]):
        expected = searcher.search(some, 7)
        for one, other in zip(searcher.search(some * size, 7), expected, strict=True):
            assert one.numbers.tolist() == other.numbers.tolist()


@pytest.fixture(params=product([False, True], repeat=2))
def searcher(request: pytest.FixtureRequest, tmp_path: Path) -> index.Searcher:
    """Without an index or with one, for a few searches or many."""
    use, many = request.param
    made = make(tmp_path / "run")
    index.build_index(made.run)
    return index.Searcher(made.run, use_index=use, many=many)


def test_queries_of_another_dimension(searcher: index.Searcher) -> None:
    """Are refused before anything is read, as those that are no numbers."""
    for queries in (np.ones((1, 128)), np.ones((2, 32)), np.ones(64)):
        with pytest.raises(UsageError, match=r"expected \(Q, 64\)"):
            searcher.search(queries, 5)
    for bad in (np.nan, np.inf):
        with pytest.raises(UsageError, match=r"queries \[1\] hold NaN or infinity"):
            searcher.search(np.array([[1.0] * 64, [bad] * 64]), 5)


def test_none_or_nothing_sought(searcher: index.Searcher) -> None:
    """No queries find nothing; of a query at least one is sought."""
    assert searcher.search(np.empty((0, 64)), 5) == []
    for k in (0, -1):
        with pytest.raises(UsageError, match=f"k is {k}; expected at least 1"):
            searcher.search(np.ones((1, 64)), k)


def test_says_how_much_was_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On standard error, and whether an index served; not where it is told to be quiet."""
    make(tmp_path / "run", rows=90)
    command = ["neighbours", str(tmp_path / "run"), "--row", "1", "--step", "2", "--json"]
    assert main(command) == 0
    without = capsys.readouterr()
    said = "no index of the steps of 'train' (`curate index` makes one): looked at 100.0% of the"
    assert said + " vectors of 90 rows" in without.err
    assert main(["index", str(tmp_path / "run"), "-q"]) == 0
    assert main(command) == 0
    served = capsys.readouterr()
    assert "by the index: looked at 100.0% of the vectors of 90 rows" in served.err
    assert served.out == without.out
    run = RunDirectory.open(tmp_path / "run")
    numbers = run.path / run.manifest.indexes["train"]["steps"]["path"] / "numbers.npy"
    numbers.write_bytes(numbers.read_bytes()[:100])
    assert main(command) == 0
    assert "the index of 'train' cannot be read" in capsys.readouterr().err
    assert main(["index", str(tmp_path / "run"), "-q"]) == 0
    assert main(command) == 0
    assert "by the index" in capsys.readouterr().err
    assert main([*command, "-q"]) == 0
    assert capsys.readouterr().err == ""


def test_totals_answer_with_influence(tmp_path: Path) -> None:
    """The index of totals gives the rows with the largest SDI_t."""
    made = make(tmp_path / "run")
    index.build_index(made.run)
    scores = pooled(made, "train", "totals") @ pooled(made, "test")[2, 3]
    found = index.neighbours(made.run, row=2, step=4, k=5, query="test", of="totals")
    assert found["row"].to_list() == np.argsort(-scores)[:5].tolist()


@pytest.mark.parametrize("many", [False, True])
def test_bound_skips_bands(tmp_path: Path, many: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With norms of heavy tails a search ends before the last band, and says how much it read."""
    monkeypatch.setattr(bands, "BAND_BYTES", 20 * 64 * 4)
    monkeypatch.setattr(bands, "_OPENED", 1000)  # all, so that it ends by norms alone
    made = make(tmp_path / "run", rows=200)
    index.build_index(made.run)
    query = pooled(made, "train")[:, 3]
    target = query[np.linalg.norm(query, axis=1).argmax()]
    found = index.Searcher(made.run, many=many).search(target[None], 1)[0]
    assert 0 < found.scanned < 0.5


def test_own_row_is_left_out_and_rebuild(tmp_path: Path) -> None:
    """A row is no neighbour of itself; an index that is up to date is left, a stale one unused."""
    made = make(tmp_path / "run")
    first = index.build_index(made.run)
    assert index.build_index(made.run) == first
    found = index.neighbours(made.run, row=5, step=3, k=8)
    assert len(found) == 8
    assert 5 not in found["row"].to_list()
    entries = [e.model_copy(update={"weight": 1.0}) for e in made.run.manifest.checkpoints]
    states = [dict(status(made.run.path).select("what", "state").iter_rows())["index"]]
    made.run.note(checkpoints=tuple(entries))
    states.append(dict(status(made.run.path).select("what", "state").iter_rows())["index"])
    assert states == ["built", "out of date, curate index makes it anew"]
    again = index.build_index(made.run)
    assert again["digest"] != first["digest"]
    assert not (made.run.path / first["steps"]["path"]).exists()


@pytest.mark.parametrize(
    ("row", "step", "message"), [(99, 1, "rows 0 to 40"), (0, 9, "steps 1 to 4")]
)
def test_bad_place(tmp_path: Path, row: int, step: int, message: str) -> None:
    """A row or a step that is not there gives one clear line."""
    run = make(tmp_path / "run").run
    with pytest.raises(UsageError, match=message):
        index.neighbours(run, row=row, step=step)


def test_bands_stay_on_a_gpu_where_faiss_has_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a GPU (a stand-in for one) a band is brought there once, and finds the same."""
    faiss = pytest.importorskip("faiss")
    brought: list[int] = []

    def bring(_resources: object, device: int, band: object, options: SimpleNamespace) -> object:
        assert isinstance(band, faiss.IndexFlat) and options.useFloat16 and device == 0
        brought.append(band.ntotal)
        return band

    made = make(tmp_path / "run", rows=90)
    index.build_index(made.run)
    expected = index.neighbours(made.run, row=1, step=2, query="test")
    stands_in = {
        "get_num_gpus": lambda: 1,
        "GpuClonerOptions": SimpleNamespace,
        "StandardGpuResources": object,
        "index_cpu_to_gpu": bring,
    }
    for name, value in stands_in.items():
        monkeypatch.setattr(faiss, name, value, raising=False)
    bands._on_gpu.cache_clear()
    for _ in range(2):
        found = index.neighbours(made.run, row=1, step=2, query="test")
        assert found["row"].to_list() == expected["row"].to_list()
    assert brought == [360]
    bands._on_gpu.cache_clear()
