"""Files that are either whole or absent: written under a temporary name, flushed, renamed."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from curate.errors import CurateError

if TYPE_CHECKING:
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
        yield temporary
        _flush(temporary)
        temporary.replace(path)
        _flush(path.parent)
    except Exception as error:  # polars raises a ComputeError where a disk is full
        if not _disk_full(error):
            raise
        raise CurateError(
            f"no space left on the device while writing {path}: free some space and run the same "
            f"command again; what is finished is kept"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


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
