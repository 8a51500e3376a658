"""Sets read in a process of their own: as in this one, errors and progress included."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from curate.errors import CurateError, DataError, UsageError
from curate.examples import DataSpec, load_examples
from curate.loading import Loader, _portable


@pytest.fixture
def loader() -> Iterator[Loader]:
    """One process for a test."""
    with Loader() as found:
        yield found


def texts(path: Path, count: int) -> str:
    """A file of texts, the last of which is empty."""
    lines = [{"text": f"row {number} " * 3} for number in range(count - 1)] + [{"text": ""}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_the_same_set_as_in_this_process(tmp_path: Path, loader: Loader) -> None:
    """Two sets one after another, with ids known before, dropped rows and progress."""
    spec = DataSpec(path=texts(tmp_path / "a.jsonl", 2500))
    here = load_examples(spec, tmp_path / "here")
    seen: list[tuple[int, int]] = []

    def progress(done: int, of: int) -> None:
        seen.append((done, of))

    there = loader.load(spec, tmp_path / "there", name="train", progress=progress)
    assert there.fingerprint == here.fingerprint
    assert there.table.equals(here.table) and there.dropped.equals(here.dropped)
    assert there.spec == spec and len(there.dropped) == 1
    assert seen == [(1000, 2500), (2000, 2500), (2500, 2500)]
    last = here.ids()[::-1]
    turned = loader.load(spec, tmp_path / "turned", name="train", known_ids=last)
    assert turned.ids() == last


def test_errors_are_those_of_loading(tmp_path: Path, loader: Loader) -> None:
    """An error has its class and text here, and the process goes on to the next set."""
    with pytest.raises(DataError, match="there is no file or directory"):
        loader.load(DataSpec(path="./nothing.jsonl"), tmp_path / "a", name="a")
    spec = DataSpec(path=texts(tmp_path / "a.jsonl", 5))
    with pytest.raises(UsageError, match="has no split 'other'"):
        loader.load(spec.model_copy(update={"split": "other"}), tmp_path / "a", name="a")
    blocked = tmp_path / "file"
    blocked.touch()
    with pytest.raises(FileExistsError):
        loader.load(spec, blocked, name="a")
    assert len(loader.load(spec, tmp_path / "a", name="a")) == 4


def test_a_process_that_is_killed(tmp_path: Path, loader: Loader) -> None:
    """Its end is one line."""
    spec = DataSpec(path=texts(tmp_path / "a.jsonl", 5))
    loader._process.send_signal(signal.SIGKILL)
    with pytest.raises(CurateError, match=r"read set 'train' ended with status -9: killed"):
        loader.load(spec, tmp_path / "a", name="train")


@pytest.mark.skipif(sys.platform != "linux", reason="asks the system for it, on Linux only")
def test_it_does_not_outlive_its_parent(tmp_path: Path) -> None:
    """Whoever takes over the directory of a killed process is alone in it."""
    code = (
        "import os, pathlib, sys; sys.path[:] = {path!r}; from curate.loading import Loader\n"
        "from curate.examples import DataSpec\n"
        "loader = Loader()\n"
        "def stop(done, of):\n"
        "    print(loader._process.pid, flush=True); os.kill(os.getpid(), 9)\n"
        "loader.load(DataSpec(path={file!r}), pathlib.Path({to!r}), name='a', progress=stop)\n"
    ).format(path=sys.path, file=texts(tmp_path / "a.jsonl", 200_000), to=str(tmp_path / "a"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL
    status, ends = Path(f"/proc/{int(done.stdout)}/stat"), time.monotonic() + 20
    while status.exists() and status.read_text().split(")")[1].split()[0] != "Z":
        assert time.monotonic() < ends  # it was told, and ends when it is given a processor
        time.sleep(0.01)
    assert not (tmp_path / "a" / "set.json").exists()


def test_errors_that_cannot_be_sent() -> None:
    """What a class that cannot be rebuilt says is kept; the trace goes with the others."""

    class OddError(Exception):
        def __init__(self, one: int, two: int) -> None:
            super().__init__(f"{one} and {two}")

    found = _portable(OddError(1, 2))
    assert type(found) is CurateError and str(found) == "OddError: 1 and 2"
    kept = _portable(ZeroDivisionError("by zero"))
    assert type(kept) is ZeroDivisionError and "ZeroDivisionError: by zero" in kept.__notes__[0]


def test_an_interrupted_load_leaves_no_answers(tmp_path: Path, loader: Loader) -> None:
    """An error of the caller's progress is the caller's, and the next load does not read on."""
    spec = DataSpec(path=texts(tmp_path / "a.jsonl", 2500))

    def closed(done: int, of: int) -> None:
        raise BrokenPipeError(32, "the caller's own pipe")

    with pytest.raises(BrokenPipeError, match="the caller's own pipe"):
        loader.load(spec, tmp_path / "a", name="a", progress=closed)
    with pytest.raises(CurateError, match="read set 'b' ended with status -9"):
        loader.load(spec, tmp_path / "b", name="b")


def test_paths_that_are_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry of sys.path that Python itself passes over is passed over."""
    monkeypatch.setattr(sys, "path", [*sys.path, tmp_path])
    with Loader() as loader:
        spec = DataSpec(path=texts(tmp_path / "a.jsonl", 5))
        assert len(loader.load(spec, tmp_path / "a", name="a")) == 4
