"""Exported datasets: read by `datasets` with features intact, and trained on with their weights."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import polars as pl
import pytest
import torch

from curate.errors import CurateError, UsageError
from curate.examples import DataSpec, load_examples
from curate.export import _may_write, _replace, annotated, card, export, write_dataset
from curate.filter import FilterConfig
from curate.filter import filter as select
from curate.manifest import InfluenceEntry, Manifest, SelectionEntry
from curate.query import sql
from curate.rank import rank
from curate.reweight import ReweightConfig, reweight
from curate.rundir import RunDirectory

FEATURES = datasets.Features(
    {
        "text": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["no", "yes"]),
        "input_ids": datasets.List(datasets.Value("int32")),
        "meta": {"who": datasets.Value("string"), "tags": datasets.List(datasets.Value("string"))},
    }
)


@pytest.fixture
def source() -> datasets.Dataset:
    rows = [
        {"text": f"t{n}", "label": n % 2, "input_ids": list(range(n + 1)),
         "meta": {"who": "w", "tags": ["x"] * (n % 3)}}
        for n in range(6)
    ]  # fmt: skip
    return datasets.Dataset.from_list(rows, features=FEATURES)


@pytest.fixture
def decisions() -> pl.DataFrame:
    """Rows 0..4 of a run that left source row 1 out; rows 1 and 3 are dropped."""
    return pl.DataFrame(
        {
            "row": [0, 1, 2, 3, 4],
            "source_row": [0, 2, 3, 4, 5],
            "id": list("abcde"),
            "source": ["s", "s", "s", "r", "r"],
            "kept": [True, False, True, False, True],
            "rule": ["kept", "not in the top 3", "kept", "not in the top 3", "kept"],
            "score": [3.0, 0.0, 2.0, -1.0, 1.0],
            "score_se": [0.1, None, None, 0.1, 0.1],
            "rank": [1, 4, 2, 5, 3],
            "weight": [1.5, 0.0, 1.0, 0.0, 0.5],
            "late": [0.5, 0.4, 0.3, 0.2, 0.1],
        }
    )


@pytest.fixture
def exported(source: datasets.Dataset, decisions: pl.DataFrame, tmp_path: Path) -> Path:
    directory = tmp_path / "out"
    directory.mkdir()
    data = annotated(source, decisions)
    write_dataset(data, directory)
    (directory / "provenance").mkdir()
    decisions.write_parquet(directory / "provenance" / "decisions.parquet")
    entry = SelectionEntry(query="q", rows=5, kept=3, config={"filter": {"top": 3, "by": "total"}})
    text = card(Manifest(created="now"), entry, decisions, data, "curated", "out", "train.jsonl")
    (directory / "README.md").write_text(text)
    return directory


def load(directory: Path) -> datasets.Dataset:
    cache = directory.parent / "cache"
    return datasets.load_dataset(str(directory), split="train", cache_dir=str(cache))


def test_load_dataset_keeps_features_and_rows(exported: Path) -> None:
    """`load_dataset(DIR)` gives the kept rows in order, with class labels, lists and nested columns
    as they were, and the new columns beside them; the provenance is not taken for data.
    """
    data = load(exported)
    assert {name: data.features[name] for name in FEATURES} == dict(FEATURES)
    assert data["text"][:] == ["t0", "t3", "t5"]
    assert data["weight"][:] == [1.5, 1.0, 0.5]
    assert data["sdi_id"][:] == ["a", "c", "e"]
    assert data["sdi_score_se"][:] == [0.1, None, 0.1]
    assert data["sdi_late"][:] == [0.5, 0.3, 0.1]
    assert data.features["sdi_rank"] == datasets.Value("int64")
    assert data[1]["meta"] == {"who": "w", "tags": []}


def test_trainer_shaped_loop_uses_the_weights(exported: Path) -> None:
    """A loop with a collator, per-row losses times `weight` and an optimizer step runs on it."""
    data = load(exported).with_format("torch", columns=["label", "weight"])
    model = torch.nn.Linear(1, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = 0.0
    for batch in torch.utils.data.DataLoader(data, batch_size=2):
        logits = model(batch["label"].float()[:, None])
        losses = torch.nn.functional.cross_entropy(logits, batch["label"], reduction="none")
        (losses * batch["weight"]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        seen += float(batch["weight"].sum())
    assert seen == pytest.approx(len(data))


def test_card_counts_add_up(exported: Path) -> None:
    """The card names the rules, what was kept of each source, and every decision's count."""
    text = (exported / "README.md").read_text()
    assert "3 of 5 rows" in text
    assert "| r | 2 | 1 | 16.7% |" in text
    assert "| not in the top 3 | 2 |" in text
    assert "| filter: top | `3` |" in text


def test_columns_are_chosen_and_checked(source: datasets.Dataset, decisions: pl.DataFrame) -> None:
    """Only the columns asked for are kept; a misspelt one and a clash of names are refused."""
    assert "meta" not in annotated(source, decisions, ["text"]).column_names
    with pytest.raises(UsageError, match="did you mean 'text'"):
        annotated(source, decisions, ["txt"])
    clash = source.rename_column("text", "weight")
    with pytest.raises(UsageError, match="already has weight"):
        annotated(clash, decisions)


def test_nothing_is_overwritten_unasked(exported: Path, tmp_path: Path) -> None:
    """A directory with content is replaced on request only, and only if an export made it."""
    with pytest.raises(CurateError, match="--overwrite"):
        _may_write(exported, overwrite=False)
    _may_write(exported, overwrite=True)
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("keep")
    with pytest.raises(CurateError, match="not written by an export"):
        _may_write(foreign, overwrite=True)
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    _replace(fresh, exported)
    assert not any(exported.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run with five training rows of six (one is empty) and an influence table made by hand."""
    lines = [{"text": f"row {n}" if n != 1 else "", "label": n % 2} for n in range(6)]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = RunDirectory.create(tmp_path / "run")
    run.add_set(load_examples(DataSpec(path=str(path)), run.stage("train"), name="train"))
    table = pl.DataFrame(
        {
            "row": range(5),
            "s01": [1.0, 2.0, 3.0, 4.0, 5.0],
            "s02": [1.0, 1.0, None, 1.0, 1.0],
            "total": [2.0, 3.0, 3.0, 5.0, 6.0],
            "total_se": [0.1] * 5,
        }
    )
    file = run.write_table(run.influence_directory("q") / "part-0.parquet", table, (0, 5))
    run.add_influence("q", InfluenceEntry(set="q", parts=(file,), complete=True))
    return run


def test_run_from_filter_to_export(run: RunDirectory, tmp_path: Path) -> None:
    """On a run directory: filter, reweight and export keep the right source rows, although a row of
    the source never became an example, and every row's decision and reason travel along.
    """
    select(run, "q", "best", FilterConfig(top=2))
    reweight(run, "best", ReweightConfig(method="rank", low=1, high=3))
    target = export(run, "best", tmp_path / "out")
    data = load(target)
    assert data["text"][:] == ["row 4", "row 5"]
    assert data["weight"][:] == [0.5, 1.5]
    decided = pl.read_parquet(target / "provenance" / "decisions.parquet")
    assert decided.height == 5
    assert pl.read_parquet(target / "provenance" / "dropped.parquet").height == 1
    with pytest.raises(CurateError, match="another selection"):
        select(run, "q", "best", FilterConfig(top=3))
    with pytest.raises(CurateError, match="--overwrite"):
        export(run, "best", target)
    assert export(run, "best", target, overwrite=True) == target
    assert run.verify() > 0


def test_run_answers_sql(run: RunDirectory) -> None:
    """The run's tables join in SQL; absent steps are absent from the long view, not zero."""
    select(run, "q", "best", FilterConfig(top=2))
    found = sql(
        run,
        "SELECT e.text, i.total, d.kept FROM influence i JOIN examples e USING (row) "
        "JOIN decisions d USING (row) WHERE e.set = 'train' AND i.query = 'q' ORDER BY i.row",
    )
    assert found["text"].to_list() == ["row 0", "row 2", "row 3", "row 4", "row 5"]
    assert found["kept"].to_list() == [False, False, False, True, True]
    long = sql(run, "SELECT step, count(*) AS n FROM influence_long GROUP BY step ORDER BY step")
    assert long.rows() == [(1, 5), (2, 4)]
    assert sql(run, "SELECT reason FROM dropped").height == 1
    assert rank(run, by="s01 - s02", top=1)["row"].to_list() == [4]
