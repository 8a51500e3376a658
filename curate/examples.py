"""Datasets in: the rows of a source as tokens with stable ids, in memory or in a directory.

A persisted set is read back through memory maps, and its table from Parquet when it is asked for,
so that an `ExampleSet` takes the same memory whatever the number of rows. `set.json` is written
last: a directory without it is not a set.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from curate import atomic
from curate.errors import CurateError, DataError
from curate.intake import (
    Chunk,
    Intake,
    count_reasons,
    dropped_frame,
    open_intake,
    ordered_after,
)
from curate.sources import DataSpec, Role, chosen_rows, open_source, source_dataset
from curate.tokens import Encoded
from curate.tokenstore import TokenPart, TokenStore, open_part, packed, write_part

__all__ = [
    "DataError",
    "DataSpec",
    "ExampleSet",
    "flag_overlap",
    "load_examples",
    "open_examples",
    "source_dataset",
]

SET_FILE = "set.json"
DROPPED_FILE = "dropped.parquet"
PART_ROWS = 8_192
PART_TOKENS = 1 << 20

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ExampleSet:
    """A named set of tokenised rows; `row` is dense, 0..N-1, in table order.

    `parts` are the frames themselves, or the Parquet files (in `directory`) that hold them.
    `files` maps every file of a persisted set but `set.json` to its SHA-256.
    """

    name: str
    role: Role
    spec: DataSpec
    pad_id: int
    vocab_size: int
    fingerprint: str  # SHA-256 over ids, tokens and labels, in row order
    store: TokenStore
    parts: tuple[pl.DataFrame | Path, ...]
    dropped: pl.DataFrame
    directory: Path | None = None
    files: dict[str, str] = field(default_factory=dict)

    @property
    def table(self) -> pl.DataFrame:
        """The whole table: row, source_row, id, source, tokens, tokens_full, targets, truncated,
        content_hash, token_hash, text (a preview), and the columns that were asked for.
        """
        return self.scan().collect()

    def scan(self) -> pl.LazyFrame:
        """The table, to be read in part."""
        return pl.concat([_lazy(part) for part in self.parts])

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row, (N,)."""
        return self.store.lengths(np.arange(len(self)))

    def lengths_of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of each of `rows`, (B,), without looking at the others."""
        return self.store.lengths(rows)

    def __len__(self) -> int:
        return len(self.store)

    def ids(self, rows: Sequence[int] | NDArray[np.int64] | None = None) -> list[str]:
        """The ids of `rows` (all by default), in that order; reads only the span they lie in."""
        wanted = np.arange(len(self)) if rows is None else np.asarray(rows, dtype=np.int64)
        if len(wanted) == 0:
            return []
        first, last = int(wanted.min()), int(wanted.max())
        if first < 0 or last >= len(self):
            raise IndexError(f"rows {first}..{last} of set {self.name!r}, which has {len(self)}")
        span = self.scan().select("id").slice(first, last - first + 1).collect()["id"]
        found: list[str] = span.gather(wanted - first).to_list()
        return found

    def tokens(self, row: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """(input_ids, labels) of one row, each (T,)."""
        encoded = self.store.encoded(row)
        return encoded.ids, encoded.labels


def load_examples(
    spec: DataSpec,
    directory: Path | None = None,
    *,
    name: str = "train",
    known_ids: Sequence[str] = (),
    progress: Progress | None = None,
) -> ExampleSet:
    """Read, tokenise and number the rows of `spec`; persisted in `directory` when one is given.

    `known_ids`: ids of the rows that an earlier load numbered 0..len-1; they keep their numbers,
    new rows come after. `progress(done, of)` counts source rows. What `directory` held of another
    set is replaced. Raises DataError or UsageError; a killed load leaves no `set.json`.
    """
    source = open_source(spec)
    intake = open_intake(spec, source)
    rows = chosen_rows(spec, len(source.dataset))
    if known_ids:
        rows = ordered_after(intake, rows, known_ids)
    sink = _Sink(directory)
    for chunk in intake.chunks(rows):
        sink.add(chunk)
        if progress is not None:
            progress(sink.read, len(rows))
    sink.close()
    if sink.rows == 0:
        reasons = count_reasons([line["reason"] for line in sink.dropped])
        paths = ", ".join(spec.paths)
        raise DataError(f"none of the {len(rows)} rows of {paths} can be used: {reasons}")
    return sink.example_set(name, intake)


class _Sink:
    """Collects chunks into parts and, where there is a directory, writes each part when full."""

    def __init__(self, directory: Path | None) -> None:
        self.directory = directory
        self.rows = self.read = self._part_first = self._largest = 0
        self.dropped: list[dict[str, Any]] = []
        self._frames: list[pl.DataFrame] = []
        self._encoded: list[Encoded] = []
        self._tokens = 0
        self._parts: list[TokenPart] = []
        self._tables: list[pl.DataFrame | Path] = []
        self._files: dict[str, str] = {}
        self._digest = hashlib.sha256()
        if directory is not None:
            _clear(directory)

    def add(self, chunk: Chunk) -> None:
        numbers = pl.int_range(self.rows, self.rows + len(chunk.frame), dtype=pl.Int64, eager=True)
        self._frames.append(chunk.frame.insert_column(0, numbers.alias("row")))
        self._encoded += chunk.encoded
        self._tokens += sum(len(row.ids) for row in chunk.encoded)
        self.dropped += chunk.dropped
        self.rows += len(chunk.frame)
        self.read += chunk.read
        for identity, row in zip(chunk.frame["id"], chunk.encoded, strict=True):
            self._digest.update(f"{identity}\n{len(row.ids)}\n".encode())
            self._digest.update(np.concatenate([row.ids, row.labels]).astype("<i4").tobytes())
            self._largest = max(self._largest, int(row.ids.max()))
        if self.rows - self._part_first >= PART_ROWS or self._tokens >= PART_TOKENS:
            self._flush()

    def close(self) -> None:
        if self._encoded:
            self._flush()

    def _flush(self) -> None:
        part = packed(self._part_first, self._encoded)
        frame = pl.concat(self._frames)
        if self.directory is None:
            self._parts.append(part)
            self._tables.append(frame)
        else:
            stem = f"{len(self._tables):05d}"
            path = self.directory / f"part-{stem}.parquet"
            self._files |= write_part(self.directory, stem, part) | _written(path, frame)
            self._parts.append(open_part(self.directory, stem, self._part_first))
            self._tables.append(path)
        self._frames, self._encoded, self._tokens = [], [], 0
        self._part_first = self.rows

    def example_set(self, name: str, intake: Intake) -> ExampleSet:
        tokenizer, dropped = intake.tokenizer, dropped_frame(self.dropped)
        found = ExampleSet(
            name=name,
            role=intake.spec.role,
            spec=intake.spec,
            pad_id=tokenizer.pad_id if tokenizer else 0,
            vocab_size=max(tokenizer.vocab_size if tokenizer else 0, self._largest + 1),
            fingerprint=self._digest.hexdigest(),
            store=TokenStore(tuple(self._parts)),
            parts=tuple(self._tables),
            dropped=dropped,
        )
        if self.directory is None:
            return found
        self._files |= _written(self.directory / DROPPED_FILE, dropped)
        found = replace(found, directory=self.directory, files=self._files)
        atomic.write_text(self.directory / SET_FILE, json.dumps(_record(found), indent=1) + "\n")
        return found


def open_examples(directory: Path) -> ExampleSet:
    """The set persisted in `directory` by `load_examples`, its tokens memory-mapped.

    Raises CurateError where there is no whole set.
    """
    directory = Path(directory)
    try:
        record = json.loads((directory / SET_FILE).read_text())
        spec = DataSpec.model_validate(record["spec"])
        parts, first = [], 0
        for stem in record["parts"]:
            parts.append(open_part(directory, stem, first))
            first += parts[-1].rows
        dropped = pl.read_parquet(directory / DROPPED_FILE)
    except FileNotFoundError as cause:
        raise CurateError(
            f"{directory} holds no whole set of examples ({cause.filename} is missing); "
            "load the data again"
        ) from cause
    except (ValueError, KeyError) as cause:
        raise CurateError(f"{directory / SET_FILE} cannot be read: {cause}") from cause
    return ExampleSet(
        name=record["name"],
        role=spec.role,
        spec=spec,
        pad_id=record["pad_id"],
        vocab_size=record["vocab_size"],
        fingerprint=record["fingerprint"],
        store=TokenStore(tuple(parts)),
        parts=tuple(directory / f"part-{stem}.parquet" for stem in record["parts"]),
        dropped=dropped,
        directory=directory,
        files=record["files"],
    )


def flag_overlap(train: ExampleSet, queries: Sequence[ExampleSet]) -> pl.DataFrame:
    """Which rows of `train` are also in a query set, token for token, whatever their labels.

    For every row of `train`: row (int64), leaks (list of names of query sets, mostly empty).
    """
    hashes = [query.scan().select("token_hash").unique().collect() for query in queries]
    found = train.scan().select("row", "token_hash").collect()
    named = [
        pl.when(pl.col("token_hash").is_in(taken["token_hash"].implode())).then(pl.lit(query.name))
        for query, taken in zip(queries, hashes, strict=True)
    ]
    nothing = pl.lit([], dtype=pl.List(pl.String))
    leaks = pl.concat_list(named).list.drop_nulls() if named else nothing
    return found.select("row", leaks.alias("leaks"))


def _lazy(part: pl.DataFrame | Path) -> pl.LazyFrame:
    return part.lazy() if isinstance(part, pl.DataFrame) else pl.scan_parquet(part, glob=False)


def _written(path: Path, frame: pl.DataFrame) -> dict[str, str]:
    atomic.write_table(path, frame)
    return {path.name: atomic.sha256(path)}


def _record(found: ExampleSet) -> dict[str, Any]:
    return {
        "schema": 1,
        "name": found.name,
        "spec": found.spec.model_dump(mode="json", exclude_defaults=True),
        "rows": len(found),
        "dropped": len(found.dropped),
        "pad_id": found.pad_id,
        "vocab_size": found.vocab_size,
        "fingerprint": found.fingerprint,
        "parts": [f"{number:05d}" for number in range(len(found.parts))],
        "files": found.files,
    }


def _clear(directory: Path) -> None:
    """Take away an earlier set, `set.json` first: half of it must not pass for the whole."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / SET_FILE).unlink(missing_ok=True)
    for pattern in ("part-*.parquet", "tokens-*.npy", "labels-*.npy", "offsets-*.npy"):
        for path in directory.glob(pattern):
            path.unlink()
