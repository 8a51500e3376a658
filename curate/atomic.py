"""Files that are either whole or absent: written under a temporary name, flushed, renamed.

Or lines that are: a line without its end is none.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate.errors import CurateError

if TYPE_CHECKING:
    import numpy.typing as npt
    import polars as pl

TEMPORARY = ".partial"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path that takes the place of `path` when the block ends without an error.

    Raises:
        CurateError: where the disk is full; the temporary file is gone and `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with _space(path):
            yield temporary
            _flush(temporary)
            temporary.replace(path)
            _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def append_line(path: Path, text: str) -> None:
    """Add a line to a file, made where there is none; on disk whole, or, cut short, not a line.

    Raises:
        CurateError: where the disk is full.
    """
    fresh = not path.exists()
    with _space(path), path.open("ab") as stream:
        stream.truncate(_whole_lines(path))
        stream.write(text.encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())
    if fresh:
        _flush(path.parent)


def remove(path: Path) -> None:
    """Remove a file where it is there, for good."""
    with suppress(FileNotFoundError):
        path.unlink()
        _flush(path.parent)


def _whole_lines(path: Path) -> int:
    """How many bytes of a file are whole lines."""
    with path.open("rb") as stream:
        end = stream.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 4096)
            stream.seek(start)
            place = stream.read(end - start).rfind(b"\n")
            if place >= 0:
                return start + place + 1
            end = start
    return 0


@contextmanager
def _space(path: Path) -> Iterator[None]:
    """A full disk as an error that says what to do."""
    try:
        yield
    except Exception as error:  # polars raises a ComputeError where a disk is full
        if not _disk_full(error):
            raise
        raise CurateError(
            f"no space left on the device while writing {path}: free some space and run the same "
            f"command again; what is finished is kept"
        ) from error


def _disk_full(error: Exception) -> bool:
    """Whether the system refused to write for want of space, whoever reported it."""
    full = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError) and error.errno in full:
        return True
    return any(f"(os error {number})" in str(error) for number in full)


def write_bytes(path: Path, data: bytes) -> None:
    """Replace the contents of `path` in one step."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Replace the contents of `path` in one step."""
    write_bytes(path, text.encode())


def write_array(path: Path, array: npt.NDArray[Any]) -> None:
    """Write an array as .npy, or leave the file as it was."""
    import numpy as np

    def write(to: Path) -> None:
        with to.open("wb") as stream:
            np.save(stream, array)

    write_with(path, write)


def write_with(path: Path, write: Callable[[Path], object]) -> None:
    """Replace `path` by what `write` puts at the path it is given."""
    with replacing(path) as temporary:
        write(temporary)


def write_table(path: Path, frame: pl.DataFrame) -> None:
    """Write a table as Parquet (zstd), replacing `path` in one step."""
    with replacing(path) as temporary:
        frame.write_parquet(temporary, compression="zstd", row_group_size=131_072)


def sha256(path: Path) -> str:
    """Hex digest of a file's contents, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sweep(directory: Path) -> None:
    """Remove what interrupted writers left; only for the one process that may write."""
    for path in directory.rglob(f"*{TEMPORARY}"):
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
