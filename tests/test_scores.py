"""Scores: every column of the influence table against brute force in float64."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from curate import product, scores, scratch
from curate.errors import CurateError, UsageError
from curate.multiply import exact_integers
from curate.scores import score_run
from curate.windows import Windows
from tests import killedscoring
from tests.sketchedrun import WEIGHTS, Made, make

DEPTHS = (4, 4, 3, 2, 4, 1, 3)


def brute(made: Made, members: list[int], *, tied: bool, cosine: bool = False) -> dict[str, Any]:
    """All columns of the table of a group of queries, written out in float64."""
    run = made.run
    queries = {c: made.values["test", c][members] for c in WEIGHTS}
    steps, dim = queries["a"].shape[1:]
    depth = np.max([(made.norms["test", c] > 0).sum(axis=1) for c in WEIGHTS], axis=0)[members]
    early, late = Windows().masks(depth, steps)
    joint = np.sqrt(sum(w * made.norms["test", c][members] ** 2 for c, w in WEIGHTS.items()))
    left = made.total_norms if tied else made.norms
    rows = np.sqrt(sum(w * left["train", c] ** 2 for c, w in WEIGHTS.items()))
    rows = rows.reshape(run.manifest.sets["train"].rows, -1)
    if not cosine:
        joint, rows = np.ones_like(joint), np.ones_like(rows)
    joint = np.where(joint > 0, joint, np.inf)
    parts: dict[str, list[Any]] = {n: [] for n in ("s", "e", "l", "vt", "ve", "vl", "c", "vs")}
    masks = np.ones_like(early), early, late
    for name, eta in WEIGHTS.items():
        scaled = queries[name] / joint[:, :, None]
        vectors = [(scaled * mask[:, :, None]).mean(axis=0) for mask in masks]  # (τ, M)
        train = made.totals["train", name][:, None] if tied else made.values["train", name]
        train = train / rows[:, :, None]
        norm = left["train", name].reshape(len(train), -1) / rows
        steps_p = np.einsum("num,tm->nut", train, vectors[0])
        steps_p = steps_p[:, 0] if tied else np.diagonal(steps_p, axis1=1, axis2=2)
        windows = [v.sum(axis=0, keepdims=True) if tied else v for v in vectors]
        dots = [np.einsum("num,um->nu", train, v) for v in windows]

        def variance(i: int, j: int, windows: Any = windows, dots: Any = dots, norm: Any = norm,
                     eta: float = eta) -> Any:  # fmt: skip
            gram = (windows[i] * windows[j]).sum(axis=1)
            return eta**2 * (norm**2 * gram + dots[i] * dots[j]).sum(axis=1) / dim

        parts["s"].append(eta * steps_p)
        parts["e"].append(eta * dots[1].sum(axis=1))
        parts["l"].append(eta * dots[2].sum(axis=1))
        for key, pair in (("vt", (0, 0)), ("ve", (1, 1)), ("vl", (2, 2)), ("c", (1, 2))):
            parts[key].append(variance(*pair))
        square = (vectors[0] ** 2).sum(axis=1)
        parts["vs"].append(eta**2 * (norm**2 * square[None] + steps_p**2) / dim)
    s, e, late_sum, vt, ve, vl, cov, vs = (np.sum(parts[key], axis=0) for key in parts)
    a, b = (1 / w.std() if w.std() > 0 else 0.0 for w in (e, late_sum))
    size = np.abs(s)
    return {
        **{f"s{t + 1:02d}": s[:, t] for t in range(steps)},
        "total": s.sum(axis=1),
        "early": e,
        "late": late_sum,
        "contrast": b * (late_sum - late_sum.mean()) - a * (e - e.mean()),
        "total_se": np.sqrt(vt),
        "early_se": np.sqrt(ve),
        "late_se": np.sqrt(vl),
        "contrast_se": np.sqrt(a**2 * ve + b**2 * vl - 2 * a * b * cov),
        "energy": size.sum(axis=1),
        "peak": size.argmax(axis=1) + 1,
        "centre": size @ np.arange(1, steps + 1) / size.sum(axis=1),
        "energy_noise": np.sqrt(2 / np.pi) * np.sqrt(vs).sum(axis=1),
    }


def agree(frame: pl.DataFrame, expected: dict[str, Any]) -> None:
    """Every column of a table is what brute force gives."""
    assert frame["row"].to_list() == list(range(len(frame)))
    assert set(frame.columns) - {"row", "group"} == set(expected)
    for name, values in expected.items():
        got = frame[name].to_numpy()
        np.testing.assert_allclose(got, values, rtol=2e-4, atol=2e-5 * np.abs(values).max(),
                                   err_msg=name)  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["dot", "cosine"])
def test_every_column(tmp_path: Path, tied: bool, kind: Any) -> None:
    """Means over a set and over groups of unequal depth equal brute force, column by column."""
    made = make(tmp_path / "run", tied=tied, depths=DEPTHS)
    names = score_run(made.run, "test", group_by="topic", kind=kind)
    assert names == ["test", "test:x", "test:y", "test:max"]
    groups = {"test": range(7), "test:x": [0, 2, 3, 5, 6], "test:y": [1, 4]}
    for name, members in groups.items():
        expected = brute(made, list(members), tied=tied, cosine=kind == "cosine")
        agree(made.run.influence(name).collect(), expected)


def test_conservation_and_maximum(tmp_path: Path) -> None:
    """Steps add up to the total in every table, and the maximum is the better group's whole row."""
    run = make(tmp_path / "run").run
    names = score_run(run, "test", group_by="topic", top_k=0)
    tables = {name: run.influence(name).collect() for name in names}
    for table in tables.values():
        total = table.select(pl.sum_horizontal("s01", "s02", "s03", "s04"))["s01"].to_numpy()
        size = table["energy"].max()
        np.testing.assert_allclose(table["total"].to_numpy(), total, atol=1e-6 * size)
    best, x, y = (tables[f"test:{g}"] for g in ("max", "x", "y"))
    first = (x["total"] >= y["total"]).to_list()
    assert best["group"].to_list() == ["x" if better else "y" for better in first]
    assert best["late"].to_list() == [
        (x if better else y)["late"][n] for n, better in enumerate(first)
    ]


def test_absent_steps_are_null(tmp_path: Path) -> None:
    """A step that no query has is NULL, not zero."""
    run = make(tmp_path / "run", depths=(2,) * 7).run
    score_run(run, "test")
    table = run.influence("test").collect()
    assert table["s03"].null_count() == table["s04"].null_count() == len(table)
    assert table["s02"].null_count() == table["total"].null_count() == 0
    assert table["peak"].max() <= 2  # type: ignore[operator]


@pytest.mark.parametrize("tied", [True, False])
def test_tops_and_pairs(tmp_path: Path, tied: bool) -> None:
    """The best rows of each query are those of the full table, which is brute force's."""
    made = make(tmp_path / "run", tied=tied, depths=DEPTHS)
    score_run(made.run, "test", top_k=5, pairs=True)
    tops, pairs = made.run.tops("test").collect(), made.run.pairs("test").collect()
    assert len(pairs) == 41 * 7
    for query in range(7):
        expected = brute(made, [query], tied=tied)
        own = pairs.filter(pl.col("query_row") == query).sort("row")
        np.testing.assert_allclose(own["total"].to_numpy(), expected["total"], rtol=1e-4, atol=1e-9)
        best = tops.filter(pl.col("query_row") == query)
        order = np.argsort(-expected["total"], kind="stable")[:5]
        assert best["row"].to_list() == order.tolist()
        assert best["rank"].to_list() == [1, 2, 3, 4, 5]
        np.testing.assert_allclose(
            best["contrast"].to_numpy(), expected["contrast"][order], rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["dot", "cosine"])
@pytest.mark.parametrize("by", ["total", "early", "late", "energy", "s02"])
def test_tops_by_any_column(tmp_path: Path, tied: bool, kind: Any, by: str) -> None:
    """Whatever ranks them, the best rows and their columns are those of brute force."""
    made = make(tmp_path / "run", tied=tied, depths=DEPTHS)
    score_run(made.run, "test", top_k=6, top_by=by, kind=kind)
    tops = made.run.tops("test").collect()
    for query in range(7):
        expected = brute(made, [query], tied=tied, cosine=kind == "cosine")
        best = tops.filter(pl.col("query_row") == query)
        order = np.argsort(-expected[by], kind="stable")[:6]
        if np.abs(expected[by]).max() > 0:  # a step that the query lacks ranks nothing
            assert best["row"].to_list() == order.tolist()
        for name in ("s01", "total", "late", "total_se", "energy", "energy_noise"):
            values = expected[name][best["row"].to_numpy()]
            size = np.abs(expected[name]).max()
            np.testing.assert_allclose(best[name], values, rtol=2e-4, atol=2e-5 * size)


@pytest.mark.parametrize("tied", [True, False])
def test_blocks_and_threads_change_nothing(
    tmp_path: Path, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows scored a few at a time in three threads have the scores of one block in one thread."""
    once, often = (make(tmp_path / name / "run", tied=tied, depths=DEPTHS) for name in "ab")
    score_run(once.run, "test", group_by="topic", top_k=4)
    monkeypatch.setattr(product, "_MOST", 3)
    monkeypatch.setattr(product, "_LEAST", 1)
    monkeypatch.setattr(product.Product, "threads", 3)
    names = score_run(often.run, "test", group_by="topic", top_k=4)
    near = 1e-7 if exact_integers() else 1e-6  # products in float32 depend on their number
    for name in names:
        expected, found = (made.run.influence(name).collect() for made in (once, often))
        assert_frame_equal(found, expected, rel_tol=1e-6, abs_tol=near)
    expected, found = (made.run.tops("test").collect() for made in (once, often))
    assert found["row"].to_list() == expected["row"].to_list()
    assert_frame_equal(found, expected, rel_tol=1e-6, abs_tol=near)


@pytest.mark.parametrize("tied", [True, False])
def test_precondition(tmp_path: Path, tied: bool) -> None:
    """Preconditioned scores are gᵀ(C + λI)⁻¹φ_t per checkpoint, conserved, without an error."""
    made = make(tmp_path / "run", tied=tied)
    score_run(made.run, "test", precondition=0.1, top_k=0)
    table = made.run.influence("test").collect()
    expected = np.zeros((41, 4))
    for name, eta in WEIGHTS.items():
        for step in range(4):
            train = made.totals["train", name] if tied else made.values["train", name][:, step]
            moment = train.T @ train / len(train)
            moment += 0.1 * np.trace(moment) / 64 * np.eye(64)
            query = made.values["test", name][:, step].mean(axis=0)
            expected[:, step] += eta * train @ np.linalg.solve(moment, query)
    got = table.select("s01", "s02", "s03", "s04").to_numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(table["total"], expected.sum(axis=1), rtol=1e-3, atol=1e-4)
    assert table["total_se"].null_count() == table["contrast_se"].null_count() == len(table)


def test_idempotent_refused_and_replaced(tmp_path: Path) -> None:
    """The same again changes nothing; other settings are refused, and replace on request."""
    run = make(tmp_path / "run").run
    score_run(run, "test", top_k=3)
    before = run.manifest
    score_run(run, "test", top_k=3)
    assert run.manifest == before
    with pytest.raises(CurateError, match=r"other settings.*--overwrite"):
        score_run(run, "test", top_k=3, kind="cosine")
    score_run(run, "test", top_k=3, kind="cosine", overwrite=True)
    assert run.influence_entry("test").kind == "cosine"
    files = list((run.path / "influence").rglob("*.parquet"))
    assert len(files) == 1
    assert not (run.path / "scratch" / "test").exists()
    run.verify()


def test_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables finished a few rows at a time are those finished at once, the best group included."""
    whole, blocks = make(tmp_path / "whole").run, make(tmp_path / "blocks").run
    names = score_run(whole, "test", group_by="topic")
    monkeypatch.setattr(scratch, "PART_ROWS", 16)
    monkeypatch.setattr(scratch, "TABLE_ROWS", 5)
    monkeypatch.setattr(scores, "TABLE_ROWS", 5)
    assert score_run(blocks, "test", group_by="topic") == names
    for name in names:
        expected, found = (run.influence(name).collect() for run in (whole, blocks))
        assert_frame_equal(found, expected, rel_tol=1e-5, abs_tol=1e-6)


def test_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after the first part and run again, the tables are those of an unbroken run."""
    monkeypatch.setattr(scratch, "PART_ROWS", 16)
    whole, broken = make(tmp_path / "whole").run, make(tmp_path / "broken").run
    score_run(whole, "test", group_by="topic")

    def stop(done: int, of: int) -> None:
        if done > 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_run(broken, "test", group_by="topic", progress=stop)
    assert not broken.manifest.influence
    seen: list[int] = []
    score_run(broken, "test", group_by="topic", progress=lambda done, _: seen.append(done))
    assert seen == [32, 41]
    for name, entry in whole.manifest.influence.items():
        assert [f.sha256 for f in entry.parts] == [
            f.sha256 for f in broken.influence_entry(name).parts
        ]
        assert [f.rows for f in entry.parts] == [(0, 16), (16, 32), (32, 41)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_by": "nothing"}, "no column 'nothing'"),
        ({"weights": {"c": 1.0}}, "checkpoint 'c'; the run has a, b"),
        ({"weights": {"a": 0, "b": 0}}, "weight 0"),
        ({"precondition": 0.1, "kind": "cosine"}, "no cosine"),
        ({"windows": {"erly": [0, 1]}}, "unknown key 'erly'"),
        ({"windows": {"early": [0.5, 0.5]}}, "expected fractions"),
        ({"top_by": "s09"}, "s01 to s04"),
    ],
)
def test_bad_settings(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    """A setting that makes no sense gives one clear line and leaves no table."""
    run = make(tmp_path / "run").run
    with pytest.raises(UsageError, match=message):
        score_run(run, "test", **options)
    assert not run.manifest.influence


def test_memory_does_not_grow(tmp_path: Path) -> None:
    """Four times the rows take no more anonymous memory at the peak."""
    import tracemalloc

    peaks = []
    for rows in (6000, 24000):
        run = make(tmp_path / f"run{rows}" / "run", rows=rows, shard_rows=2000).run
        tracemalloc.start()
        score_run(run, "test", top_k=3)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # Tables of a part, norms and ids take a few dozen bytes a row; vectors would take 64 and more.
    assert peaks[1] - peaks[0] < 18000 * 4 * 64


def test_killed_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed with SIGKILL at random and around random renames, scoring ends as if undisturbed."""
    whole, broken = make(tmp_path / "whole" / "run"), make(tmp_path / "broken" / "run")
    monkeypatch.setattr(scratch, "PART_ROWS", 16)
    killedscoring.score(tmp_path / "whole")
    command = [sys.executable, "-m", "tests.killedscoring", str(tmp_path / "broken")]
    root = Path(__file__).parent.parent
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) >= 8
    tables = list(whole.run.manifest.influence)
    assert tables == list(broken.run.manifest.influence)
    assert "test:max" in tables
    for name in tables:
        assert broken.run.influence(name).collect().equals(whole.run.influence(name).collect())
    assert broken.run.tops("test").collect().equals(whole.run.tops("test").collect())
    assert broken.run.verify() == whole.run.verify()
    assert not list(broken.run.path.rglob("*.partial"))
    assert not list((broken.run.path / "scratch").iterdir())
