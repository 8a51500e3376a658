"""The best rows of single queries: what cannot be ranked, what is empty, and how much at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from polars.testing import assert_frame_equal

from curate import multiply, pairscores, product
from curate import survey as surveying
from curate.blocks import Block, SketchRows
from curate.errors import CurateError
from curate.queryvectors import Groups, QueryVectors
from curate.scores import Scoring, score_run
from curate.scoresettings import ScoreSettings, chosen_weights
from curate.survey import Found, survey
from curate.surveyplan import Ranking, Taken, _of_steps
from curate.windows import Windows
from sdi import team
from tests.sketchedrun import Made, make

QUERIES = 7


def scoring(made: Made, top_k: int = 3, **settings_of: Any) -> Scoring:
    """Scores of the generated run, about to be made."""
    settings = ScoreSettings(weights=chosen_weights(made.run.manifest, {}), **settings_of)
    return Scoring(made.run, "test", "test", settings, {"top_k": top_k, "top_by": "total"}, "cpu")


def surveyed(own: Scoring, vectors: list[QueryVectors], keep: int = 3) -> Found:
    return survey(own.product, vectors, own.side.masks, Ranking("total"), keep, first=100)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("tied", [True, False])
def test_rows_without_a_score_are_named(
    tmp_path: Path, tied: bool, bad: float, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training sketch that is not finite ends the scoring with the rows and what to do."""
    if compiled:
        monkeypatch.setattr(product, "_MANY", 0)
    made = make(tmp_path / "run", tied=tied)
    kind = "totals" if tied else "steps"
    path = made.run.sketches_directory("train", "b") / f"{kind}-00001.scale.npy"
    scale = np.load(path)
    scale[[3, 9]] = bad
    np.save(path, scale)
    own = scoring(made)
    with pytest.raises(CurateError, match=r"training rows 19, 25: .*curate doctor RUN"):
        surveyed(own, own.vectors(Groups.single(0, QUERIES)))


def test_queries_without_a_score_are_named(tmp_path: Path) -> None:
    """A query whose vectors are not finite is named itself, not every training row."""
    own = scoring(make(tmp_path / "run"))
    vectors = own.vectors(Groups.single(0, QUERIES))
    values = vectors[1].values.copy()
    values[0, 4, 1, 7] = np.nan
    with pytest.raises(CurateError, match=r"query rows 104: their scores are NaN"):
        surveyed(own, [vectors[0], replace(vectors[1], values=values)])


def test_no_rows_are_an_empty_table(tmp_path: Path) -> None:
    """Where no row is kept, the table of the best rows is empty and has its columns."""
    own = scoring(make(tmp_path / "run"), top_k=0)
    assert surveyed(own, own.vectors(Groups.single(0, QUERIES)), 0).rows.shape == (QUERIES, 0)
    empty = pairscores._tops(own, (0, QUERIES), (4,))
    assert empty.height == 0
    assert {"query_row", "row", "rank", "s01", "total", "contrast_se"} <= set(empty.columns)


@pytest.mark.parametrize("integers", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_best_rows_are_read_by_blocks(
    tmp_path: Path, tied: bool, integers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many rows are kept, no more are read at once than a block may have, and the table is
    the same.
    """
    if integers and not multiply.exact_integers():
        pytest.skip("this processor has no fast exact int8 products")
    monkeypatch.setattr(multiply, "exact_integers", lambda: integers)
    once, often = (make(tmp_path / name / "run", tied=tied).run for name in "ab")
    taken: list[int] = []
    take = SketchRows.take

    def counted(self: SketchRows, rows: Any, slots: Any = None) -> Block:
        taken.append(len(rows))
        return take(self, rows, slots)

    monkeypatch.setattr(SketchRows, "take", counted)
    score_run(once, "test", top_k=20)
    assert max(taken) == 20
    taken.clear()
    monkeypatch.setattr(product, "_MOST", 6)
    monkeypatch.setattr(product, "_LEAST", 1)
    score_run(often, "test", top_k=20)
    assert max(taken) == 6
    expected, found = (run.tops("test").collect() for run in (once, often))
    near = 1e-7 if integers else 1e-6  # float32 adds up otherwise in other blocks
    assert_frame_equal(found, expected, rel_tol=1e-6, abs_tol=near)


@pytest.mark.parametrize("settings", [{}, {"kind": "cosine"}, {"precondition": 0.1}], ids=str)
@pytest.mark.parametrize("by", ["total", "early", "late", "step"])
@pytest.mark.parametrize(
    ("windows", "whole"),
    [
        (Windows(), True),
        (Windows((0, 0.3), (0.6, 1)), False),
        (Windows((1, 6), (5, 9), "step"), False),
    ],
    ids=["halves", "gap", "overlap"],
)
def test_sums_find_what_steps_find(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    windows: Windows,
    whole: bool,
    by: str,
    settings: dict[str, Any],
) -> None:
    """The windows' own vectors, which are chosen, give the rows and the moments of all steps."""
    made = make(tmp_path / "run", steps=10, depths=(10, 3, 7, 9, 1, 10, 5))
    own = scoring(made, windows=windows, **settings)
    vectors, ranking = own.vectors(Groups.single(0, QUERIES)), Ranking(by, 4)
    given = (own.product, vectors, own.side.masks, ranking)
    _, bound = surveying.planned(*given)
    assert bound.shape == (3 if by == "step" or (by == "total" and not whole) else 2, QUERIES)
    summed = survey(*given, 5)
    taken, chosen = _of_steps([one.values for one in vectors], own.side.masks, ranking)
    steps = own.product.bind_columns(chosen)
    monkeypatch.setattr(surveying, "planned", lambda *_: (taken, steps))
    other = survey(*given, 5)
    np.testing.assert_array_equal(np.sort(summed.rows), np.sort(other.rows))
    for name in ("mean", "square"):
        one, two = (getattr(found.moments, name) for found in (summed, other))
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6 * np.abs(two).max())


def test_few_steps_are_multiplied_themselves(tmp_path: Path) -> None:
    """Where sums would be more columns, or a slot has one step only, the steps are chosen."""
    for name, settings in {"few": {"steps": 2}, "untied": {"steps": 12, "tied": False}}.items():
        own = scoring(make(tmp_path / name / "run", **settings))
        vectors = own.vectors(Groups.single(0, QUERIES))
        _, bound = surveying.planned(own.product, vectors, own.side.masks, Ranking("step"))
        assert bound.shape == (settings["steps"], QUERIES)


@pytest.mark.parametrize("settings", [{}, {"kind": "cosine"}], ids=str)
@pytest.mark.parametrize("by", ["total", "early", "late", "energy", "step"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("windows", [Windows(), Windows((0, 0.3), (0.6, 1))], ids=["halves", "gap"])
def test_compiled_surveys_find_what_torch_finds(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    windows: Windows,
    tied: bool,
    by: str,
    settings: dict[str, Any],
) -> None:
    """The kernels keep the same rows and moments, block by block, whatever ranks the rows."""
    if team.kernels("scores") is None:
        pytest.skip("numba is not installed")
    monkeypatch.setattr(product, "_MOST", 6)
    monkeypatch.setattr(product, "_LEAST", 1)
    made = make(tmp_path / "run", tied=tied, steps=10, depths=(10, 3, 7, 9, 1, 10, 5))
    own = scoring(made, windows=windows, **settings)
    vectors, ranking = own.vectors(Groups.single(0, QUERIES)), Ranking(by, 4)
    given = (own.product, vectors, own.side.masks, ranking, 5)
    expected = survey(*given)
    called: list[int] = []
    compiled = Taken._compiled

    def noted(self: Any, *given: Any) -> Any:
        called.append(given[-1] - given[-2])
        return compiled(self, *given)

    monkeypatch.setattr(Taken, "_compiled", noted)
    monkeypatch.setattr(product, "_MANY", 0)
    found = survey(*given)
    assert sum(called) == own.product.rows
    np.testing.assert_array_equal(np.sort(found.rows), np.sort(expected.rows))
    for name in ("mean", "square"):
        one, two = (getattr(each.moments, name) for each in (found, expected))
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6 * np.abs(two).max())


@pytest.mark.parametrize("keep", [1, 3, 50])
def test_a_block_offers_no_more_than_could_be_best(keep: int) -> None:
    """Of a block's hits the best of each query are left, equals included, and none of these is
    lost; so no more come from the first block than from later ones.
    """
    random = np.random.default_rng(keep)
    keys = random.integers(0, 9, (40, 6)).astype(np.float32)
    row, query = (axis.ravel() for axis in np.indices(keys.shape))
    hits = (query, row + 100, keys.ravel())
    best = surveying._Best(6, keep)
    left = best.of_block(hits, 100, 140)
    for one in range(6):
        wanted = np.sort(keys[:, one])[::-1][:keep]
        offered = np.sort(left[2][left[0] == one])[::-1]
        np.testing.assert_array_equal(offered[: len(wanted)], wanted)
        assert (offered >= wanted[-1]).all()
    best.offer(*left)
    other = surveying._Best(6, keep)
    other.offer(*hits)
    if keep <= 40:
        np.testing.assert_array_equal(best.rows(), other.rows())
