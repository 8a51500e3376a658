"""Sketches on disk: three ``.npy`` files a shard, whole or absent.

A shard is ``steps-00000.npy`` int8 (rows, τ, M) with ``.scale.npy`` and ``.norm.npy`` float32
(rows, τ), or ``totals-00000.npy`` int8 (rows, M) with (rows,). Each file is written under the name
``….partial``, flushed to the disk, and renamed once all three are whole: an array created in place
and killed midway would read back as zeros without a word. The temporary names are fixed, so that
a resumed run overwrites what a killed one left. The caller's manifest, written last, says which
shards count.

``norm`` is that of the float sketch before quantising. An absent step has scale and norm 0.

Letters: M sketch dimension, τ loop steps.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import numpy.typing as npt

from sdi.errors import DiskError, ShardError
from sdi.sketch.quantize import dequantize

Kind = Literal["steps", "totals"]
KINDS: tuple[Kind, ...] = ("steps", "totals")
PARTIAL = ".partial"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_BLOCK = 1 << 20


@dataclass(frozen=True)
class ShardFiles:
    """What was written: sha256 (hex) by file name, and the number of rows."""

    files: dict[str, str]
    rows: int


@dataclass(frozen=True)
class Shard:
    """One shard, mapped from disk: pages are read as they are touched.

    Attributes:
        values: int8 (rows, τ, M) or (rows, M).
        scale: float32 (rows, τ) or (rows,).
        norm: float32, like ``scale``; norms of the float sketches.
    """

    values: npt.NDArray[np.int8]
    scale: npt.NDArray[np.float32]
    norm: npt.NDArray[np.float32]

    @property
    def rows(self) -> int:
        """Number of examples."""
        return int(self.values.shape[0])

    def block(self, start: int = 0, stop: int | None = None) -> npt.NDArray[np.float32]:
        """Return rows ``start:stop`` as float32, (rows, τ, M) or (rows, M), in memory."""
        return dequantize(self.values[start:stop], self.scale[start:stop])


def shard_names(kind: Kind, number: int) -> tuple[str, str, str]:
    """Return the file names of a shard: values, scale, norm."""
    if kind not in KINDS:
        raise ShardError(f"shard kind is {kind!r}; expected one of {', '.join(KINDS)}")
    stem = f"{kind}-{number:05d}"
    return f"{stem}.npy", f"{stem}.scale.npy", f"{stem}.norm.npy"


def write_shard(
    directory: Path,
    kind: Kind,
    number: int,
    values: npt.NDArray[np.int8],
    scale: npt.NDArray[np.float32],
    norm: npt.NDArray[np.float32],
) -> ShardFiles:
    """Write one shard so that it is whole or absent, and return its checksums.

    Args:
        directory: made if absent.
        kind: ``steps`` or ``totals``.
        number: of the shard, from 0.
        values: int8 (rows, τ, M) for steps, (rows, M) for totals.
        scale: float32 (rows, τ) or (rows,).
        norm: float32, like ``scale``.

    Raises:
        ShardError: arrays of the wrong kind, or a disk that is full or refuses; nothing partial
            is left behind.
    """
    names = shard_names(kind, number)
    _check_arrays(names[0], kind, values, scale, norm)
    arrays: dict[str, npt.NDArray[Any]] = dict(zip(names, (values, scale, norm), strict=True))
    partial = [directory / (name + PARTIAL) for name in names]
    with _disk_errors(directory / names[0], partial, sum(a.nbytes for a in arrays.values())):
        directory.mkdir(parents=True, exist_ok=True)
        files = {
            name: _write_flushed(path, array)
            for path, (name, array) in zip(partial, arrays.items(), strict=True)
        }
        for path, name in zip(partial, names, strict=True):
            path.replace(directory / name)
        _flush_directory(directory)
    return ShardFiles(files=files, rows=int(values.shape[0]))


def open_shard(directory: Path, kind: Kind, number: int) -> Shard:
    """Map one shard; nothing is read until it is touched.

    Raises:
        ShardError: a file is absent, cut short, or not what the name says.
    """
    names = shard_names(kind, number)
    values, scale, norm = (_map(directory / name) for name in names)
    _check_arrays(str(directory / names[0]), kind, values, scale, norm)
    return Shard(values=values, scale=scale, norm=norm)


def verify_shard(directory: Path, files: Mapping[str, str]) -> None:
    """Hold files against their checksums, as ``ShardFiles.files`` gives them.

    Raises:
        ShardError: a file is absent, or its contents have changed since it was written.
    """
    for name, expected in files.items():
        path = directory / name
        try:
            seen = file_sha256(path)
        except OSError as error:
            raise ShardError(f"{path} cannot be read ({error.strerror}); {_REMAKE}") from error
        if seen != expected:
            raise ShardError(
                f"{path} has sha256 {seen[:12]}…, expected {expected[:12]}…: its contents changed "
                f"after it was written; {_REMAKE}"
            )


def file_sha256(path: Path) -> str:
    """Return the sha256 (hex) of a file's contents, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


_REMAKE = "remove the shard from the manifest and sketch these rows again"


class _HashingStream:
    """Pass bytes to a file and to a sha256, so that the file is not read back for its checksum."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.digest = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> int:
        self.digest.update(data)
        return self._stream.write(data)


def _write_flushed(path: Path, array: npt.NDArray[Any]) -> str:
    with path.open("wb") as stream:
        hashing = _HashingStream(stream)
        whole = np.ascontiguousarray(array)
        header = np.lib.format.header_data_from_array_1_0(whole)
        np.lib.format.write_array_header_1_0(hashing, header)
        hashing.write(whole.reshape(-1).view(np.uint8).data)  # write_array would copy it
        stream.flush()
        os.fsync(stream.fileno())
    return hashing.digest.hexdigest()


def _flush_directory(directory: Path) -> None:
    """Make the renames last through a power cut; some systems cannot open a directory."""
    with contextlib.suppress(PermissionError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _disk_errors(path: Path, partial: list[Path], size: int) -> Iterator[None]:
    """Remove partial files on any error, and say what to do about those of the disk."""
    try:
        yield
    except BaseException as error:
        for leftover in partial:
            with contextlib.suppress(OSError):
                leftover.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        if error.errno in _FULL:
            raise DiskError(
                f"the disk is full: {path} needs {size / 2**20:.1f} MiB ({error.strerror}). Free "
                "some space and run the same command again; finished shards are kept"
            ) from error
        raise DiskError(
            f"{path} could not be written ({error.strerror}); check that the directory exists "
            "and may be written to, then run the same command again"
        ) from error


def _map(path: Path) -> Any:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise ShardError(f"{path} is absent; {_REMAKE}") from error
    except (OSError, ValueError, EOFError) as error:
        raise ShardError(f"{path} is damaged ({error}); {_REMAKE}") from error


def _check_arrays(
    name: str,
    kind: Kind,
    values: npt.NDArray[Any],
    scale: npt.NDArray[Any],
    norm: npt.NDArray[Any],
) -> None:
    dimensions = 3 if kind == "steps" else 2
    wanted = "(rows, steps, m)" if kind == "steps" else "(rows, m)"
    if values.dtype != np.int8 or values.ndim != dimensions or values.size == 0:
        raise ShardError(
            f"{name} holds {values.dtype} {values.shape}; expected int8 {wanted}, not empty"
        )
    for label, array in (("scale", scale), ("norm", norm)):
        if array.dtype != np.float32 or array.shape != values.shape[:-1]:
            raise ShardError(
                f"{name}: {label} is {array.dtype} {array.shape}; "
                f"expected float32 {values.shape[:-1]}"
            )
