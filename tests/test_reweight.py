"""Weights: mean one, in the order of the scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curate.errors import UsageError
from curate.filter import FilterConfig, filter
from curate.reweight import ReweightConfig, reweight, reweight_frame, weights
from curate.scores import score_run
from tests.sketchedrun import make

METHODS = ("softmax", "rank", "linear", "clip")
SCORES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30).map(np.array)


@given(scores=SCORES, method=st.sampled_from(METHODS), down=st.booleans())
def test_mean_one_and_monotone(scores: np.ndarray, method: str, down: bool) -> None:
    """For any scores: weights are not negative, average one, and never contradict the order."""
    found = weights(scores, ReweightConfig(method=method, descending=not down))  # type: ignore[arg-type]
    assert found.mean() == pytest.approx(1.0)
    assert (found >= 0).all()
    ordered = found[np.argsort(-scores if down else scores, kind="stable")]
    assert (np.diff(ordered) >= -1e-9).all()


def test_formulas() -> None:
    """Each method's weights on three scores, before scaling, are what its docstring says."""
    scores = np.array([1.0, 2.0, 4.0])
    z = (scores - scores.mean()) / scores.std()
    expected = {
        "softmax": np.exp(z / 0.5),
        "rank": np.array([0.5, 1.0, 1.5]),
        "linear": 0.5 + (scores - 1) / 3,
        "clip": np.clip(1 + z / 0.5, 0.5, 1.5),
    }
    for method, raw in expected.items():
        config = ReweightConfig(method=method, temperature=0.5, low=0.5, high=1.5)  # type: ignore[arg-type]
        np.testing.assert_allclose(weights(scores, config), raw / raw.mean())


def test_extreme_temperature_stays_finite() -> None:
    """A cold softmax puts all weight on the best row instead of overflowing."""
    found = weights(np.array([0.0, 1.0, 2.0]), ReweightConfig(temperature=1e-4))
    np.testing.assert_allclose(found, [0, 0, 3])


def test_dropped_rows_weigh_nothing() -> None:
    """Only kept rows are weighed; dropped rows, scored or not, get 0."""
    frame = pl.DataFrame({"row": [0, 1, 2], "kept": [True, False, True], "score": [1.0, None, 2.0]})
    found = reweight_frame(frame, ReweightConfig(method="rank", low=1, high=3))
    assert found["weight"].to_list() == [0.5, 0.0, 1.5]


def test_refusals() -> None:
    """A missing score, bounds in the wrong order and an empty selection are refused."""
    with pytest.raises(UsageError, match="1 of 2 kept rows have no finite score"):
        weights(np.array([1.0, np.nan]), ReweightConfig())
    with pytest.raises(UsageError, match="above high"):
        weights(np.array([1.0, 2.0]), ReweightConfig(low=3, high=2))
    with pytest.raises(UsageError, match="keeps no row"):
        reweight_frame(pl.DataFrame({"kept": [False], "score": [1.0]}), ReweightConfig())


def test_by_another_score_of_a_run(tmp_path: Path) -> None:
    """A formula weighs the kept rows; a column that is not there is told from all that are."""
    run = make(tmp_path / "run").run
    score_run(run, "test")
    filter(run, "test", rules=FilterConfig(top=6))
    found = reweight(run, config=ReweightConfig(by="early - LATE", method="rank"))
    kept = found.filter("kept")
    table = run.influence("test").collect().join(kept, on="row", how="right")
    expected = (table["early"] - table["late"]).rank()
    assert kept["weight"].rank().to_list() == expected.to_list()
    assert found.filter(~pl.col("kept"))["weight"].sum() == 0
    with pytest.raises(UsageError, match="total"):
        reweight(run, config=ReweightConfig(by="totl"))
