"""Bad input through the command line: one line that says what is wrong, and nothing is lost.

Every case runs `curate run` on a recipe with one thing wrong, then the same directory with a good
recipe, which must end as if nothing had happened before.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import curate
from curate.cli import main
from curate.rundir import RunDirectory
from tests.recipefolder import CODE, Folder


@pytest.fixture
def folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Folder:
    """A folder with a good recipe."""
    return Folder(tmp_path / "bad", capsys)


@pytest.fixture
def good(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[Folder], None]:
    """Runs the good recipe where a bad one failed, and compares with a run of its own."""

    def continues(folder: Folder) -> None:
        folder.write("train", folder.texts)
        folder.run()
        whole = Folder(tmp_path / "good", capsys)
        whole.run()
        ours, theirs = folder.tables(), whole.tables()
        assert all(ours[name].equals(theirs[name]) for name in theirs)

    return continues


Continues = Callable[[Folder], None]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("data.query.text=txt", "query.jsonl has no column 'txt' (named by `text`); did you mean"),
        ("data.query.id=key", "query.jsonl has no column 'key' (named by `id`)"),
        ("data.train.columns=[topic]", "has no column 'topic' (named by `columns`)"),
    ],
)
def test_a_missing_column(folder: Folder, good: Continues, settings: str, said: str) -> None:
    """A column that is not there is named with its file, its key and the nearest one."""
    assert said in folder.refused(settings, status=2)
    good(folder)


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_an_empty_file(folder: Folder, good: Continues, text: str) -> None:
    """A file without a row is named, as training set or as a query set added to a whole run."""
    good(folder)
    (folder.path / "none.jsonl").write_text(text)
    for name in ("train", "more"):
        said = folder.refused(f"data.{name}.path={folder.path / 'none.jsonl'}", status=2)
        assert "none.jsonl' is empty" in said
    folder.run()


def test_an_empty_text(folder: Folder, good: Continues) -> None:
    """A row without text is left out with its reason; a set of nothing else is refused."""
    folder.write("train", [{**row, "text": ""} for row in folder.texts])
    assert "none of the 9 rows" in (said := folder.refused(status=2))
    assert "9 × text is empty" in said
    folder.change(3, text="")
    folder.run()
    dropped = curate.open(folder.into).sql("select id, reason from dropped")
    assert dropped.rows() == [("r3", "text is empty")]
    assert "r3" not in folder.tables()["examples"]["id"].to_list()
    folder.write("train", folder.texts)
    folder.run(more=("--from", "sketch"))
    good(folder)


def test_a_text_longer_than_the_context(folder: Folder, good: Continues) -> None:
    """The row is named and `max_tokens` suggested; shards before it stay when it is mended."""
    folder.change(7, text="long " * 20)
    said = folder.refused(status=1)
    assert "'r7'" in said
    assert "max_tokens" in said
    shards = RunDirectory.open(folder.into).manifest.find_shards("train", "step-1", "totals")
    assert [shard.rows for shard in shards] == [(0, 4)]
    folder.run("data.defaults.max_tokens=24")
    table = folder.tables()["examples"]
    assert table.filter("truncated")["id"].to_list() == ["r7"]
    assert table["row"].to_list() == list(range(9))


def test_a_text_longer_than_the_context_is_mended(folder: Folder, good: Continues) -> None:
    """The row that stopped a run may be changed in the file: it was not sketched yet."""
    folder.change(7, text="long " * 20)
    folder.refused(status=1)
    kept = folder.listed()
    assert kept
    good(folder)
    assert kept.items() <= folder.listed().items()


def test_duplicate_ids(folder: Folder, good: Continues) -> None:
    """An id given twice is named with its row and its column."""
    folder.change(7, id="r2")
    said = folder.refused(status=2)
    assert "train.jsonl, row 7: the id 'r2' (column 'id') was there before" in said
    good(folder)


def test_losses_that_are_nan(folder: Folder, good: Continues) -> None:
    """A loss that is not finite is told by the id of its row; the row can then be left out."""

    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors["token.weight"][ord("7")] = torch.nan

    good_weights = (folder.path / "step-1.safetensors").read_bytes()
    folder.save("step-1.safetensors", poison)
    for number, row in enumerate(folder.texts):
        folder.texts[number] = row | {"text": row["text"].replace("7", "8")}
    folder.write("query", [{**row, "id": f"q{n}"} for n, row in enumerate(folder.texts[:3])])
    folder.change(6, text=folder.texts[6]["text"] + "7")
    said = folder.refused(status=1)
    assert "the loss is not finite for r6 (nan)" in said
    assert (kept := folder.listed())
    folder.write("train", [row for row in folder.texts if row["id"] != "r6"])
    folder.run()
    assert kept.items() <= folder.listed().items()
    assert folder.tables()["examples"].height == 8
    (folder.path / "step-1.safetensors").write_bytes(good_weights)
    assert "checkpoint 'step-1' = " in folder.refused(status=1)


@pytest.mark.parametrize(
    ("settings", "said", "status"),
    [
        ("sketch.loss=tiny.py:scalar", "the loss returned a scalar", 1),
        ("loop.body=spare", "the body spare was never called", 1),
        ("loop.body=head", "the body head was called once", 1),
        ("loop.body=bodi", "no module named 'bodi'; the nearest name is 'body'", 1),
        ("model.args.depth=1", "the body body was called once", 1),
        ("model.args.deep=1", "unexpected keyword argument 'deep'", 2),
    ],
)
def test_a_wrong_loss_or_body(
    folder: Folder, good: Continues, settings: str, said: str, status: int
) -> None:
    """A loss or a body that cannot be used is named, and binds nobody to it."""
    assert said in folder.refused(settings, status=status)
    good(folder)


def test_a_list_of_layers_as_body(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    """A ModuleList looped in Python is a body: a step is one pass over its layers."""
    scope: dict[str, Any] = {}
    exec(compile(CODE, "tiny.py", "exec"), scope)
    listed = folder.path / "listed.safetensors"
    save_file(scope["build"](layers=2).state_dict(), listed)
    folder.run("model.args.layers=2", f"checkpoints.path={listed}")
    manifest = RunDirectory.open(folder.into).manifest
    assert manifest.steps == ("1", "2", "3")
    assert manifest.loop is not None
    assert manifest.loop.coverage["share"] == 1


def _another_shape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["body.weight"] = torch.zeros(9, 8)


def _another_name(tensors: dict[str, torch.Tensor]) -> None:
    tensors["core.weight"] = tensors.pop("body.weight")


@pytest.mark.parametrize("change", [_another_shape, _another_name])
def test_a_checkpoint_of_another_model(
    folder: Folder, good: Continues, change: Callable[[dict[str, Any]], object]
) -> None:
    """A checkpoint that does not fit is named with the parameter, first or after good ones."""
    other = folder.save("other.safetensors", change)
    said = folder.refused(f"checkpoints.path={other}", status=1)
    assert "other.safetensors" in said
    assert "body.weight" in said
    good(folder)
    other.rename(folder.path / "step-2.safetensors")
    both = f"checkpoints.path={folder.path}/step-*.safetensors"
    assert "body.weight" in folder.refused(both, status=1)
    good(folder)


def test_a_checkpoint_that_is_none(folder: Folder, good: Continues) -> None:
    """A damaged checkpoint, or none at all, is named."""
    damaged = folder.path / "damaged.safetensors"
    damaged.write_bytes(b"not tensors")
    assert "damaged.safetensors" in folder.refused(f"checkpoints.path={damaged}", status=1)
    missing = folder.path / "none-*.safetensors"
    assert f"no checkpoint at {missing}" in folder.refused(f"checkpoints.path={missing}", status=1)
    good(folder)


@pytest.mark.parametrize("writes", [3, 12, 22, 34, 44])
def test_a_full_disk(
    folder: Folder, good: Continues, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    """Where no more can be written, one line says so, and the same command goes on from there."""
    flush, left = os.fsync, writes

    def full(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        said = folder.refused(status=1)
    assert "disk" in said or "no space left" in said
    assert "run the same command again" in said
    good(folder)


def test_a_full_file_system(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a real file system that fills up, whoever writes says so, and room is all it takes."""
    folder = Folder(tmp_path / "bad", capsys)
    folder.into.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "none", str(folder.into)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs privileges that are not here")
    try:
        for room in (24, 56, 104, 128, 160, 216, 256):
            resize = ["mount", "-o", f"remount,size={room}k", str(folder.into)]
            subprocess.run(resize, check=True)
            said = folder.refused(status=1)
            assert "no space left" in said.lower() or "the disk is full" in said
            assert "run the same command again" in said
        subprocess.run(["mount", "-o", "remount,size=4m", str(folder.into)], check=True)
        folder.run()
        assert RunDirectory.open(folder.into).verify() > 0
    finally:
        subprocess.run(["umount", "--lazy", str(folder.into)], check=True)


@pytest.mark.parametrize("settings", ["sketch.dim=32", "sketch.seed=1", "loop.body=head"])
def test_another_sketch_spec(folder: Folder, good: Continues, settings: str) -> None:
    """A run of other sketches is refused by both values, and --from sketch makes them again."""
    good(folder)
    said = folder.refused(settings, status=1)
    assert "the run was made with " in said
    assert "--from sketch" in said
    good(folder)
    if settings != "loop.body=head":
        folder.run(settings, more=("--from", "sketch"))
        assert "sketch." in folder.refused(status=1)


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("insert into examples select * from examples", "this one is INSERT"),
        ("update examples set id = 'x'", "this one is UPDATE"),
        ("delete from examples", "this one is DELETE"),
        ("drop table examples", "this one is DROP"),
        ("create table mine as select 1", "this one is CREATE"),
        ("copy (select 1) to 'mine.csv'", "this one is COPY"),
        ("attach 'mine.db'", "this one is ATTACH"),
        ("select 1; drop table examples", "one statement expected, 2 seen"),
        ("select * from read_csv('/etc/passwd')", "read_csv() is not available"),
        ("selec 1", 'syntax error at or near "selec"'),
    ],
)
def test_sql_that_writes(
    folder: Folder,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    statement: str,
    said: str,
) -> None:
    """A statement that does more than read is wrong usage, and nothing is written anywhere."""
    folder.run("steps=[sketch]")
    before = folder.listed()
    files = sorted(folder.path.rglob("*"))
    monkeypatch.chdir(folder.path)
    assert main(["sql", str(folder.into), statement]) == 2
    seen = capsys.readouterr()
    assert seen.out == ""
    assert said in seen.err
    assert seen.err.count("\n") == 1
    assert folder.listed() == before
    assert sorted(folder.path.rglob("*")) == files


def test_an_interrupt(folder: Folder, good: Continues) -> None:
    """Ctrl-C while sketching is exit status 130 and one line; the good recipe then goes on."""
    words = folder.command("sketch.loss=tiny.py:slow")
    # The script, as users run it: `python -m` ends by the signal itself where the interrupt passed
    # through a string that was exec'd, such as the making of a dataclass, whatever sys.exit says.
    script = Path(sysconfig.get_path("scripts")) / "curate"
    process = subprocess.Popen([script, *words], stderr=subprocess.PIPE, text=True)
    manifest = folder.into / "manifest.json"
    while not manifest.exists() or RunDirectory.open(folder.into).manifest.sketch is None:
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert said.strip() == "curate: interrupted; nothing is lost: the same command continues"
    assert process.returncode == 130
    good(folder)
