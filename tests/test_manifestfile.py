"""The manifest and the log of shards beside it: one of them always has everything, none twice."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest

from curate import atomic
from curate.errors import CurateError
from curate.manifest import ShardEntry, parse_manifest
from curate.manifestfile import LOG
from curate.rundir import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """An empty run."""
    return RunDirectory.create(tmp_path / "run")


def shard(number: int) -> ShardEntry:
    """A shard of one row."""
    return ShardEntry(
        set="träin",
        checkpoint="one",
        kind="steps",
        number=number,
        rows=(number, number + 1),
        steps=2,
        files={f"{number}.npy": "0" * 64},
    )


def numbers(run: RunDirectory) -> list[int]:
    """Which shards a reader sees that was not there before."""
    return [entry.number for entry in RunDirectory.open(run.path).manifest.shards]


def log_of(run: RunDirectory) -> Path:
    """The log, whether it is there or not."""
    return run.path / LOG


def test_listing_a_shard_leaves_the_manifest_as_it_is(run: RunDirectory) -> None:
    """Each takes a line of its own, whatever was listed before, and every reader sees it."""
    other = RunDirectory.open(run.path)
    before, sizes = run.manifest_path.read_bytes(), [0]
    for number in range(5):
        run.add_shard(shard(number))
        sizes.append(log_of(run).stat().st_size)
        assert other.manifest == run.manifest
    assert len({after - size for size, after in pairwise(sizes)}) == 1
    assert run.manifest_path.read_bytes() == before
    assert numbers(run) == [0, 1, 2, 3, 4]


def test_any_other_change_takes_the_log_over(run: RunDirectory) -> None:
    """A field beside the shards, or a shard made again, writes the manifest, and the log goes."""
    run.add_shard(shard(0))
    run.note(batch_budget=3)
    assert not log_of(run).exists()
    run.add_shard(shard(1))
    run.add_shard(shard(0))
    assert not log_of(run).exists()
    assert numbers(run) == [1, 0]
    assert run.manifest.batch_budget == 3


def test_a_writer_leaves_one_file(run: RunDirectory) -> None:
    """What a killed process left is taken over by the next writer, and so is what that one adds."""
    run.add_shard(shard(0))
    with run.writing():
        assert not log_of(run).exists()
        run.add_shard(shard(1))
        assert log_of(run).exists()
    assert not log_of(run).exists()
    written = parse_manifest(run.manifest_path.read_bytes(), run.manifest_path)
    assert [entry.number for entry in written.shards] == [0, 1]
    assert written == run.manifest


def test_killed_before_the_log_went(run: RunDirectory) -> None:
    """Lines that the manifest has taken over are not counted again; later ones are."""
    run.add_shard(shard(0))
    shutil.copy(log_of(run), run.path / "kept")
    run.note(batch_budget=3)
    shutil.move(run.path / "kept", log_of(run))
    assert numbers(run) == [0]
    run.add_shard(shard(1))
    assert numbers(run) == [0, 1]


def test_killed_within_a_line(run: RunDirectory) -> None:
    """A line that was cut short lists nothing, and the next one takes its place."""
    run.add_shard(shard(0))
    whole = log_of(run).read_bytes()
    for cut in (1, len(whole) // 2, len(whole) - 1):
        log_of(run).write_bytes(whole + whole[:cut])
        assert numbers(run) == [0]
    run.add_shard(shard(1))
    assert numbers(run) == [0, 1]
    log_of(run).write_bytes(whole[:-1])
    assert numbers(run) == []


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"after": "DIGEST", "shards": [{"set": 1}]}'])
def test_a_damaged_line_is_named(run: RunDirectory, line: str) -> None:
    """A whole line that is none of ours is refused, with its number and what to do."""
    run.add_shard(shard(0))
    digest = json.loads(log_of(run).read_text())["after"]
    with log_of(run).open("a") as stream:
        stream.write(line.replace("DIGEST", digest) + "\n")
    with pytest.raises(CurateError, match=r"shards\.jsonl is damaged in line 2: delete that line"):
        _ = RunDirectory.open(run.path).manifest


def test_append_line(tmp_path: Path) -> None:
    """Lines longer than what is read at once are found, and cut ones go."""
    path = tmp_path / "log"
    atomic.append_line(path, "a" * 10_000)
    atomic.append_line(path, "b")
    with path.open("ab") as stream:
        stream.write(b"c" * 9_000)
    atomic.append_line(path, "d")
    assert path.read_text() == "a" * 10_000 + "\nb\nd\n"
    path.write_bytes(b"e" * 9_000)
    atomic.append_line(path, "f")
    assert path.read_text() == "f\n"
