"""The run directory: whole or absent, trusted only where listed, never mixed."""

from __future__ import annotations

import errno
import json
import multiprocessing
from pathlib import Path

import polars as pl
import pytest

from curate import atomic
from curate.errors import CheckFailed, CurateError
from curate.manifest import (
    CheckpointEntry,
    InfluenceEntry,
    LoopEntry,
    Manifest,
    ModelEntry,
    SketchEntry,
)
from curate.rundir import RunDirectory, folder
from tests.loopedrun import add_texts, write_texts

MODEL = ModelEntry(fingerprint="abc", parameters=10)
LOOP = LoopEntry(body=("body",), steps=("1", "2"))
SKETCH = SketchEntry(version=1, seed=0, dim=64, options={"loss": "causal_lm_loss"})


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """An empty run."""
    return RunDirectory.create(tmp_path / "run", recipe_hash="r")


def test_create_and_open(run: RunDirectory) -> None:
    """A run reads back as it was made, and is not made twice."""
    again = RunDirectory.open(run.path)
    assert again.manifest == run.manifest
    assert again.manifest.recipe_hash == "r"
    assert "python" in again.manifest.versions
    with pytest.raises(CurateError, match="already holds a run"):
        RunDirectory.create(run.path)
    assert RunDirectory.open_or_create(run.path).manifest == run.manifest


def test_open_elsewhere(tmp_path: Path) -> None:
    """A directory without a manifest is refused in one line that says how to make one."""
    with pytest.raises(CurateError, match=r"not a run directory.*curate run"):
        RunDirectory.open(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ('{"schema_version": 9}', "schema version 9"),
        ('{"schema_version": 1, "created": "now", "shard": []}', "shard: Extra inputs"),
    ],
)
def test_bad_manifest(run: RunDirectory, text: str, message: str) -> None:
    """A manifest that is damaged, newer or has unknown keys gives one clear line."""
    run.manifest_path.write_text(text)
    with pytest.raises(CurateError, match=message):
        RunDirectory.open(run.path)


def test_two_handles_see_each_other(run: RunDirectory) -> None:
    """A change through one handle is seen, and not undone, by another that was opened before."""
    other = RunDirectory.open(run.path)
    assert other.manifest.batch_budget is None
    run.note(batch_budget=5)
    other.note(shard_rows=7)
    assert (run.manifest.batch_budget, run.manifest.shard_rows) == (5, 7)


def test_manifest_is_json_with_the_designed_names(run: RunDirectory) -> None:
    """λ is called "lambda" in the file, and the file reads back to the same manifest."""
    run.add_influence("q", InfluenceEntry(set="q", damping=0.5))
    data = json.loads(run.manifest_path.read_text())
    assert data["influence"]["q"]["lambda"] == 0.5
    assert Manifest.model_validate(data) == run.manifest


@pytest.mark.parametrize(
    ("what", "change", "message"),
    [
        ("model", {"fingerprint": "xyz"}, "model.fingerprint = 'abc', not 'xyz'"),
        ("loop", {"body": ("h",)}, r"loop.body = \['body'\], not \['h'\]"),
        ("loop", {"tied": False}, "loop.tied = True, not False"),
        ("sketch", {"dim": 128}, "sketch.dim = 64, not 128"),
        ("sketch", {"seed": 3}, "sketch.seed = 0, not 3"),
        ("sketch", {"options": {"loss": "mine"}}, "sketch.loss = 'causal_lm_loss', not 'mine'"),
    ],
)
def test_refuses_to_mix(
    run: RunDirectory, what: str, change: dict[str, object], message: str
) -> None:
    """Sketches of another model, body or spec are refused, and the line names both values."""
    given = {"model": MODEL, "loop": LOOP, "sketch": SKETCH}
    run.settle(**given)
    before = run.manifest
    assert run.settle(**given) == before
    with pytest.raises(CurateError, match=message):
        run.settle(**{**given, what: given[what].model_copy(update=change)})
    assert run.manifest == before


def test_checkpoint_weight_may_change_but_contents_may_not(run: RunDirectory) -> None:
    """η is taken over without sketching again; other weights of the same name are refused."""
    entry = CheckpointEntry(name="a", path="a", weight=1, weight_source="given", fingerprint="f")
    run.settle_checkpoint(entry)
    run.settle_checkpoint(entry.model_copy(update={"weight": 0.5}))
    assert run.manifest.weights == {"a": 0.5}
    with pytest.raises(CurateError, match="checkpoint 'a' = 'f', not 'g'"):
        run.settle_checkpoint(entry.model_copy(update={"fingerprint": "g"}))


def test_replacing_is_whole_or_absent(tmp_path: Path) -> None:
    """An error while writing leaves the old contents and no temporary file."""
    path = tmp_path / "a.txt"
    atomic.write_text(path, "old")

    def interrupted(temporary: Path) -> None:
        temporary.write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        atomic.write_with(path, interrupted)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_full_disk(tmp_path: Path) -> None:
    """A full disk gives one line that says what to do, and loses nothing."""
    path = tmp_path / "a.txt"
    atomic.write_text(path, "old")

    def overfull(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CurateError, match=r"no space left.*run the same command again"):
        atomic.write_with(path, overfull)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def _held_by_another(path: Path, answers: multiprocessing.Queue[str]) -> None:
    try:
        with RunDirectory.open(path).writing():
            answers.put("")
    except CurateError as error:
        answers.put(str(error))


def test_one_writer(run: RunDirectory) -> None:
    """A second process that wants to write is told so; blocks of one handle nest."""
    context = multiprocessing.get_context("spawn")
    answers: multiprocessing.Queue[str] = context.Queue()
    with run.writing(), run.writing():
        process = context.Process(target=_held_by_another, args=(run.path, answers))
        process.start()
        assert "another process is writing" in answers.get(timeout=60)
        process.join()


def test_writer_sweeps_leftovers(run: RunDirectory) -> None:
    """What a killed writer left under a temporary name is removed by the next one."""
    left = run.path / "sketches" / "totals-00000.npy.partial"
    left.parent.mkdir()
    left.write_bytes(b"half")
    with run.writing():
        assert not left.exists()


def test_verify_finds_damage(run: RunDirectory) -> None:
    """Verification names the file whose contents changed, and exits as a failed check."""
    path = run.influence_directory("q") / "part-00000.parquet"
    file = run.write_table(path, pl.DataFrame({"row": [0, 1], "total": [1.0, 2.0]}), (0, 2))
    run.add_influence("q", InfluenceEntry(set="q", parts=(file,), complete=True))
    assert run.verify() == 1
    assert run.influence("q").collect()["total"].to_list() == [1.0, 2.0]
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckFailed, match=r"part-00000\.parquet: its contents"):
        run.verify()
    path.unlink()
    with pytest.raises(CheckFailed, match=r"part-00000\.parquet: absent"):
        run.verify()


def test_unlisted_files_do_not_exist(run: RunDirectory) -> None:
    """A reader is given listed files only, and told what there is where a name is unknown."""
    directory = run.influence_directory("q")
    first = run.write_table(directory / "part-00000.parquet", pl.DataFrame({"row": [0]}), (0, 1))
    run.write_table(directory / "part-00001.parquet", pl.DataFrame({"row": [1]}), (1, 2))
    run.add_influence("q", InfluenceEntry(set="q", parts=(first,)))
    assert run.influence("q").collect()["row"].to_list() == [0]
    with pytest.raises(CurateError, match=r"no influence table 'p' \(there: q\)"):
        run.influence("p")
    with pytest.raises(CurateError, match=r"no selection 'top'.*curate filter"):
        run.selection("top")


@pytest.mark.parametrize("name", ["gsm8k-test", "q:max", "a/b", "a=b", "..x", "%2F"])
def test_folder_is_one_component(name: str) -> None:
    """Any name is one path component, and two names never share one."""
    assert "/" not in folder(name)
    assert folder(name) not in (".", "..")
    assert folder(name) == name or "%" in folder(name)


@pytest.mark.parametrize("name", ["", ".", ".."])
def test_folder_refuses(name: str) -> None:
    """Names that would leave the directory are refused."""
    with pytest.raises(CurateError, match="cannot name a folder"):
        folder(name)


def test_set_may_grow_at_its_end_only(run: RunDirectory, tmp_path: Path) -> None:
    """Rows keep their numbers when a set grows; other first rows are refused and change nothing."""
    add_texts(run, "train", write_texts(tmp_path / "a.jsonl", 5))
    before = run.manifest.sets["train"]
    add_texts(run, "train", write_texts(tmp_path / "a.jsonl", 5))
    assert run.manifest.sets["train"] == before
    add_texts(run, "train", write_texts(tmp_path / "a.jsonl", 8))
    assert run.manifest.sets["train"].rows == 8
    assert run.examples("train").collect()["row"].to_list() == list(range(8))
    grown = run.manifest
    (tmp_path / "a.jsonl").write_text('{"id": "r0", "text": "something else"}\n' * 1)
    with pytest.raises(CurateError):
        add_texts(run, "train", tmp_path / "a.jsonl")
    assert run.manifest == grown
    assert run.verify() > 0


def test_swap_is_undone_when_killed_between(run: RunDirectory, tmp_path: Path) -> None:
    """Killed after the directories were swapped, before the manifest: the old set is put back."""
    add_texts(run, "train", write_texts(tmp_path / "a.jsonl", 5))
    own = run.examples_directory("train")
    own.rename(own.with_name(".replaced-train"))
    own.mkdir()
    (own / "part-00000.parquet").write_bytes(b"of the new set")
    with run.writing():
        run.verify()
    assert run.examples("train").collect().height == 5
    assert not own.with_name(".replaced-train").exists()


def test_side_columns_are_joined(run: RunDirectory, tmp_path: Path) -> None:
    """Columns added beside a set appear in its table, NULL where a row has none."""
    add_texts(run, "train", write_texts(tmp_path / "a.jsonl", 3))
    run.add_side("train", "leaks", pl.DataFrame({"row": [1], "leaks": [["q"]]}))
    table = run.examples("train").collect()
    assert table["leaks"].to_list() == [None, ["q"], None]
    assert run.verify() > 0
