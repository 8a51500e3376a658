"""The notebook runs, on a run that the default recipe made at tiny settings.

It needs the whole job: `curate.cookbook.load_recipe`, `curate.pipeline.run_recipe`, `curate.open`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from curate.cookbook import load_recipe
from curate.pipeline import Job, run_recipe

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "audit.ipynb"
TINY = (
    "model.args={context: 32, width: 16, heads: 2, depth: 3}",
    "generate.args.train={easy: 20, hard: 20, wrong: 20, boilerplate: 20}",
    "generate.args.query={easy: 4, hard: 4}",
    "generate.args.evaluation={easy: 4, hard: 4}",
    "train.args.steps=8",
    "train.args.save_at=[0.5, 1.0]",
    "sketch.dim=64",
    "retrain.args.steps=2",
    "retrain.args.seeds=2",
)


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default recipe's run directory, in seconds instead of minutes."""
    recipe, folder = load_recipe("arithmetic", TINY)
    path = tmp_path_factory.mktemp("runs") / "arithmetic"
    run_recipe(Job(recipe, folder, path))
    return path


def test_the_notebook_runs(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell of notebooks/audit.ipynb runs against a run of the default recipe."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("CURATE_RUN", str(tiny_run))
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parent.parent))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    shown = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs for cell in shown)


def test_the_notebook_stores_no_outputs() -> None:
    """The notebook in the repository holds no results, so that it cannot show stale ones."""
    nbformat = pytest.importorskip("nbformat")
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    assert all(not cell.get("outputs") for cell in cells)


def test_the_tiny_run_compares_three_arms(tiny_run: Path) -> None:
    """The recipe's own steps leave one measured retraining for each arm and seed."""
    from recipes.compare import ARMS, read_outcomes

    outcomes = read_outcomes(tiny_run / "retrain" / "results.jsonl")
    assert [(o.arm, o.seed) for o in outcomes] == [(arm, seed) for seed in range(2) for arm in ARMS]
