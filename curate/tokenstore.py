"""Tokens and labels of a set's rows: flat arrays with offsets, in memory or memory-mapped.

A part is three arrays, `tokens` and `labels` int32 (sum of T,) and `offsets` int64 (rows + 1,).
Persisted, each is a plain `.npy`, written under a temporary name, flushed and renamed when whole.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from curate import atomic
from curate.errors import CurateError
from curate.tokens import Encoded

ARRAYS = ("tokens", "labels", "offsets")


@dataclass(frozen=True)
class TokenPart:
    """Rows `first`, `first + 1`, … : tokens and labels (sum of T,), offsets (rows + 1,)."""

    first: int
    tokens: NDArray[np.int32]
    labels: NDArray[np.int32]
    offsets: NDArray[np.int64]

    @property
    def rows(self) -> int:
        """How many rows the part holds."""
        return len(self.offsets) - 1

    def encoded(self, row: int) -> Encoded:
        """Ids and labels of `row`, counted in the whole set; views, (T,) each."""
        at = row - self.first
        span = slice(int(self.offsets[at]), int(self.offsets[at + 1]))
        return Encoded(self.tokens[span], self.labels[span])


@dataclass(frozen=True)
class TokenStore:
    """The parts of a set, in row order."""

    parts: tuple[TokenPart, ...]

    def __len__(self) -> int:
        return self.parts[-1].first + self.parts[-1].rows if self.parts else 0

    def encoded(self, row: int) -> Encoded:
        """Ids and labels of one row, (T,) each."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of a set of {len(self)} rows")
        at = bisect.bisect_right(self.parts, row, key=lambda part: part.first) - 1
        return self.parts[at].encoded(row)

    def lengths(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of each of `rows` (B,), (B,)."""
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"rows {rows.min()}..{rows.max()} of a set of {len(self)} rows")
        found = np.zeros(len(rows), dtype=np.int64)
        for part in self.parts:
            here = (rows >= part.first) & (rows < part.first + part.rows)
            at = rows[here] - part.first
            found[here] = part.offsets[at + 1] - part.offsets[at]
        return found


def packed(first: int, rows: Sequence[Encoded]) -> TokenPart:
    """A part in memory, of `rows` that begin with number `first`."""
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(row.ids) for row in rows], out=offsets[1:])
    empty = np.zeros(0, dtype=np.int32)
    return TokenPart(
        first,
        np.concatenate([empty, *(row.ids for row in rows)]),
        np.concatenate([empty, *(row.labels for row in rows)]),
        offsets,
    )


def write_part(directory: Path, stem: str, part: TokenPart) -> dict[str, str]:
    """Write tokens-, labels- and offsets-`stem`.npy; answers with the SHA-256 of each file."""
    arrays: dict[str, NDArray[Any]] = {
        "tokens": part.tokens,
        "labels": part.labels,
        "offsets": part.offsets,
    }
    files = {}
    for kind in ARRAYS:
        path = directory / f"{kind}-{stem}.npy"
        with atomic.replacing(path) as temporary, temporary.open("wb") as stream:
            np.save(stream, arrays[kind])
        files[path.name] = atomic.sha256(path)
    return files


def open_part(directory: Path, stem: str, first: int) -> TokenPart:
    """The part written by `write_part`, memory-mapped."""
    found = [_mapped(directory / f"{kind}-{stem}.npy") for kind in ARRAYS]
    return TokenPart(first, *found)


def _mapped(path: Path) -> NDArray[Any]:
    try:
        found: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as cause:
        raise CurateError(f"{path} cannot be read ({cause}); load the data again") from cause
    return found
