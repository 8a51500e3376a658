"""The notebook's view of a run: profile, noise bands, charts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

import curate
from curate.scores import score_run
from tests.sketchedrun import WEIGHTS, Made, make


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """A scored run."""
    made = make(tmp_path / "run")
    score_run(made.run, "test", group_by="topic", top_k=2)
    return made


def test_profile(made: Made) -> None:
    """Means, energy, shares and noise by source equal brute force in float64."""
    run = curate.open(made.run.path)
    table = run.influence("test")
    frame = run.profile("test").filter(pl.col("source") == "b").sort("step")
    own = table.filter(pl.col("source") == "b").select("s01", "s02", "s03", "s04").to_numpy()
    mean = own.mean(axis=0, dtype=np.float64)
    np.testing.assert_allclose(frame["mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(frame["energy"], np.abs(own).sum(axis=0), rtol=1e-5)
    np.testing.assert_allclose(frame["signed_share"], mean / mean.sum(), rtol=1e-4)
    variance = np.zeros(4)
    for name, eta in WEIGHTS.items():
        vector = made.totals["train", name][1::2].mean(axis=0)
        query = made.values["test", name].mean(axis=0)
        square = (vector @ vector) * (query**2).sum(axis=1)
        variance += eta**2 * (square + (query @ vector) ** 2) / 64
    np.testing.assert_allclose(frame["mean_se"], np.sqrt(variance), rtol=1e-4)


@pytest.mark.parametrize("query", ["test", "test:x", "test:max"])
def test_charts(made: Made, query: str) -> None:
    """Every chart is valid Vega-Lite and holds its own data, whatever the query."""
    plot = curate.open(made.run.path).plot
    trajectories = plot.trajectories(query).to_dict()
    assert trajectories["layer"][2]["encoding"]["color"]["field"] == "source"
    bars = plot.contrast(query, by="topic" if query == "test" else "source").to_dict()
    assert sum(row["count"] for row in bars["data"]["values"]) == 41
    assert len(plot.energy(query).to_dict()["data"]["values"]) == 4


def test_run_object(made: Made) -> None:
    """The run shows its tables, its neighbours and a summary of itself."""
    run = curate.open(made.run.path)
    assert run.queries == ["test", "test:max", "test:x", "test:y"]
    assert dict(run.examples.group_by("set").len().iter_rows()) == {"train": 41, "test": 7}
    assert len(run.tops("test")) == 14
    assert len(run.neighbours(row=1, step=2, k=3)) == 3
    assert "train: 41" in repr(run)


def test_import_is_light() -> None:
    """Importing curate imports neither torch nor polars."""
    code = "import sys, curate; print([m for m in ('torch', 'polars') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
