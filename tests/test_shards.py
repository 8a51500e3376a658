"""Shards on disk: whole or absent, checked, and read without being loaded."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdi.errors import ShardError
from sdi.shards import open_shard, shard_names, verify_shard, write_shard

Arrays = tuple[Any, Any, Any]


def make_arrays(kind: str = "steps", rows: int = 6, steps: int = 3, dim: int = 16) -> Arrays:
    rng = np.random.default_rng(0)
    shape = (rows, steps) if kind == "steps" else (rows,)
    values = rng.integers(-127, 128, (*shape, dim), dtype=np.int8)
    return values, rng.random(shape, dtype=np.float32), rng.random(shape, dtype=np.float32)


@pytest.mark.parametrize("kind", ["steps", "totals"])
def test_what_is_written_is_read(tmp_path: Path, kind: Any) -> None:
    """Values, scales and norms come back equal, under the promised names and checksums."""
    values, scale, norm = make_arrays(kind)
    written = write_shard(tmp_path / "new", kind, 7, values, scale, norm)
    names = [f"{kind}-00007.npy", f"{kind}-00007.scale.npy", f"{kind}-00007.norm.npy"]
    assert list(written.files) == names
    assert written.rows == 6
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == sorted(names)
    for name, digest in written.files.items():
        assert hashlib.sha256((tmp_path / "new" / name).read_bytes()).hexdigest() == digest
    shard = open_shard(tmp_path / "new", kind, 7)
    for seen, expected in zip(
        (shard.values, shard.scale, shard.norm), (values, scale, norm), strict=True
    ):
        assert isinstance(seen, np.memmap)
        np.testing.assert_array_equal(seen, expected)
    np.testing.assert_array_equal(shard.block(1, 3), values[1:3] * scale[1:3, ..., None])
    verify_shard(tmp_path / "new", written.files)


def test_a_strided_view_is_written_as_it_reads(tmp_path: Path) -> None:
    """Arrays that are not contiguous are stored in row order."""
    values, scale, norm = make_arrays(rows=8)
    write_shard(tmp_path, "steps", 0, values[::2], scale[::2], norm[::2])
    np.testing.assert_array_equal(open_shard(tmp_path, "steps", 0).values, values[::2])


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_says_so_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """No space at the second file: a ShardError with the remedy, and an empty directory."""
    calls: list[int] = []

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(ShardError, match=r"disk is full.*Free some space.*run the same command"):
        write_shard(tmp_path, "steps", 0, *make_arrays())
    assert list(tmp_path.iterdir()) == []
    assert ShardError.exit_code == 3


def test_a_real_write_failure_leaves_nothing(tmp_path: Path) -> None:
    """A size limit set by the system, which cuts a write short, leaves no partial file either."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(ShardError, match="disk is full"):
            write_shard(tmp_path, "steps", 0, *make_arrays(rows=64, dim=1024))
        assert list(tmp_path.iterdir()) == []
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def test_a_directory_in_the_way_is_explained(tmp_path: Path) -> None:
    """Any other refusal of the disk is a ShardError too, with its own remedy."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ShardError, match=r"could not be written.*check that the directory"):
        write_shard(tmp_path / "file", "steps", 0, *make_arrays())


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from sdi.shards import write_shard
real, calls = os.fsync, []
def fsync(fd):
    calls.append(fd)
    if len(calls) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    real(fd)
os.fsync = fsync
ones = np.ones((4, 3), np.float32)
write_shard(Path(sys.argv[1]), "steps", 0, np.ones((4, 3, 8), np.int8), ones, ones)
"""


@pytest.mark.parametrize("moment", [1, 3])
def test_a_killed_write_is_overwritten(tmp_path: Path, moment: int) -> None:
    """SIGKILL before the renames leaves no shard, and writing again leaves no rubbish."""
    process = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), str(moment)])
    assert process.returncode == -signal.SIGKILL
    with pytest.raises(ShardError, match="absent"):
        open_shard(tmp_path, "steps", 0)
    write_shard(tmp_path, "steps", 0, *make_arrays())
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(shard_names("steps", 0))


def test_damage_is_noticed(tmp_path: Path) -> None:
    """A file cut short cannot be opened; a changed or lost one fails its checksum."""
    files = write_shard(tmp_path, "steps", 0, *make_arrays()).files
    path = tmp_path / "steps-00000.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(ShardError, match="damaged"):
        open_shard(tmp_path, "steps", 0)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ShardError, match=r"sha256 .*contents changed.*sketch these rows again"):
        verify_shard(tmp_path, files)
    path.unlink()
    with pytest.raises(ShardError, match="cannot be read"):
        verify_shard(tmp_path, files)


def test_a_pickle_is_not_loaded(tmp_path: Path) -> None:
    """A shard that holds Python objects is refused, since reading it would run code."""
    write_shard(tmp_path, "totals", 0, *make_arrays("totals"))
    np.save(tmp_path / "totals-00000.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ShardError, match="damaged"):
        open_shard(tmp_path, "totals", 0)


def test_wrong_arrays_are_refused() -> None:
    """Wrong dtype, dimensions, side arrays, emptiness and kind each say what was expected."""
    values, scale, norm = make_arrays()
    cases: list[tuple[Any, str]] = [
        (("steps", values.astype(np.float32), scale, norm), "expected int8"),
        (("totals", values, scale, norm), r"expected int8 \(rows, m\)"),
        (("steps", values[:0], scale[:0], norm[:0]), "not empty"),
        (("steps", values, scale[:2], norm), r"scale is float32 \(2, 3\); expected float32 \(6, 3"),
        (("steps", values, scale, norm.astype(np.float64)), "norm is float64"),
        (("sums", values, scale, norm), "kind is 'sums'"),
    ]
    for (kind, *arrays), text in cases:
        with pytest.raises(ShardError, match=text):
            write_shard(Path("unused"), kind, 0, *arrays)
    assert not Path("unused").exists()
