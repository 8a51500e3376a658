"""From source rows to examples: content, tokens, truncation, hashes, ids, and why a row is dropped.

Rows are read in chunks from the memory-mapped source; what is remembered from chunk to chunk is a
64-bit key per row, in a mapped file, by which repeated ids are told.

Three hashes, for three questions. An id that the user does not give is "<source>:<12 hex>" of the
whole row, tokens and labels before truncation, so that it is the same in whatever order the rows
come and whatever the context; the k-th occurrence of the same row ends in "#k". `content_hash` is
of tokens and labels as the model sees them, truncated (for a row that fits it is what the id was
made from): where it is the same, so is the sketch. `token_hash` is of the whole row's tokens alone,
since a query whose prompt is masked must be recognised among training rows whose prompt is not.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from curate.contents import Columns, Content, content_columns, row_content
from curate.errors import DataError, UsageError
from curate.sources import DataSpec, Source, require_column
from curate.tokens import Document, Encoded, Tokenizer, load_tokenizer

CHUNK_ROWS = 1000
PREVIEW = 2000  # characters of a row's text kept in the table

SCHEMA: dict[str, Any] = {
    "source_row": pl.Int64,
    "id": pl.String,
    "source": pl.String,
    "tokens": pl.Int32,
    "tokens_full": pl.Int32,
    "targets": pl.Int32,
    "truncated": pl.Boolean,
    "content_hash": pl.String,
    "token_hash": pl.String,
    "text": pl.String,
}
DROPPED_SCHEMA: dict[str, Any] = {
    "source_row": pl.Int64,
    "id": pl.String,
    "source": pl.String,
    "reason": pl.String,
    "text": pl.String,
}
# Columns that others add to the table, so that no user's column may be called so.
_TAKEN = {"row", "loss", "leaks", "set", "steps", *SCHEMA}


@dataclass(frozen=True)
class Chunk:
    """Kept rows (`frame`, by SCHEMA and the user's columns), their tokens, and dropped rows."""

    frame: pl.DataFrame
    encoded: list[Encoded]
    dropped: list[dict[str, Any]]
    read: int


class Repeats:
    """Counts occurrences of strings, told apart by 64 bits of each.

    The table, twelve bytes a place, lies in an unnamed temporary file that is mapped, so that the
    memory it takes is the system's to give back. Open addressing, linear probing.

    Args:
        most: how many strings will be counted at the most.
    """

    def __init__(self, most: int) -> None:
        self._places = 1 << max(4, (2 * most).bit_length())  # at most half of them taken
        with tempfile.TemporaryFile() as file:
            file.truncate(12 * self._places)
            if hasattr(os, "posix_fallocate"):  # a full disk says so here, not when it is touched
                os.posix_fallocate(file.fileno(), 0, 12 * self._places)
            mapped = mmap.mmap(file.fileno(), 0)
        self._keys = np.frombuffer(mapped, np.uint64, self._places)
        self._counts = np.frombuffer(mapped, np.uint32, self._places, 8 * self._places)

    def occurrence(self, text: str) -> int:
        """1 for a string not seen before, then 2, 3, …"""
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        key = int.from_bytes(digest, "little")
        place = key & (self._places - 1)
        while self._counts[place] and int(self._keys[place]) != key:
            place = (place + 1) & (self._places - 1)
        self._keys[place] = key
        self._counts[place] += 1
        return int(self._counts[place])


@dataclass(frozen=True)
class Intake:
    """An opened source with all that is needed to read rows of it."""

    spec: DataSpec
    source: Source
    columns: Columns
    tokenizer: Tokenizer | None
    id_column: str | None
    source_column: str | None
    kept: tuple[str, ...]

    def chunks(self, rows: NDArray[np.int64]) -> Iterator[Chunk]:
        """The source rows `rows` (N,), in that order, a thousand at a time."""
        repeats = Repeats(len(rows))
        for start in range(0, len(rows), CHUNK_ROWS):
            yield self._chunk(rows[start : start + CHUNK_ROWS], repeats)

    def _chunk(self, rows: NDArray[np.int64], repeats: Repeats) -> Chunk:
        named = {*self.columns.present, self.id_column, self.source_column} - {None}
        part = self.source.dataset.select(rows)
        values = part.select_columns(sorted(map(str, named)))[:]
        contents = [self._content(values, i, int(row)) for i, row in enumerate(rows)]
        encoded = self._encoded(contents)
        lines: list[dict[str, Any]] = []
        dropped: list[dict[str, Any]] = []
        keep: list[int] = []
        for i, row in enumerate(rows):
            line = self._line(values, i, int(row), contents[i], encoded[i])
            if "reason" in line:
                dropped.append(line)
                continue
            line["id"] = self._id(values, i, line, encoded[i], repeats)
            lines.append(line)
            keep.append(i)
        frame = pl.DataFrame(lines, schema=SCHEMA)
        if self.kept:
            frame = pl.concat([frame, _user_columns(part, self.kept, keep)], how="horizontal")
        cut = [encoded[i].cut(self.spec.max_tokens) for i in keep]  # type: ignore[union-attr]
        return Chunk(frame, cut, dropped, len(rows))

    def _content(self, values: dict[str, list[Any]], i: int, row: int) -> Content:
        where = f"{', '.join(self.spec.paths)}, row {row}"
        line = {name: values[name][i] for name in self.columns.present}
        return row_content(self.columns, line, self.spec, self.tokenizer, where)

    def _encoded(self, contents: Sequence[Content]) -> list[Encoded | None]:
        """Tokens of every content that has any; documents go to the tokenizer all at once."""
        places = [i for i, content in enumerate(contents) if isinstance(content, Document)]
        out = [content if isinstance(content, Encoded) else None for content in contents]
        if places and self.tokenizer is not None:
            documents = [content for content in contents if isinstance(content, Document)]
            for i, encoded in zip(places, self.tokenizer.encode(documents), strict=True):
                out[i] = encoded
        return out

    def _line(
        self, values: dict[str, list[Any]], i: int, row: int, content: Content, full: Encoded | None
    ) -> dict[str, Any]:
        """A row of the table less its id, or of the table of dropped rows (it has a reason)."""
        named = values[self.source_column][i] if self.source_column else self.spec.source
        text = content.text if isinstance(content, Document) else self._decoded(full)
        line: dict[str, Any] = {
            "source_row": row,
            "source": self.source.label(row) if named is None else str(named),
            "text": None if text is None else text[:PREVIEW],
        }
        if isinstance(content, str) or full is None:
            return line | {"reason": content, "id": self._user_id(values, i)}
        cut = full.cut(self.spec.max_tokens)
        if reason := _without_targets(full, cut):
            return line | {"reason": reason, "id": self._user_id(values, i)}
        return line | {
            "tokens": len(cut.ids),
            "tokens_full": len(full.ids),
            "targets": cut.targets,
            "truncated": len(cut.ids) < len(full.ids),
            "content_hash": _digest(cut.ids, cut.labels),
            "token_hash": _digest(full.ids),
        }

    def _user_id(self, values: dict[str, list[Any]], i: int) -> str | None:
        value = values[self.id_column][i] if self.id_column else None
        return None if value is None else str(value)

    def _decoded(self, full: Encoded | None) -> str | None:
        if full is None or self.tokenizer is None:
            return None
        return self.tokenizer.decode(full.ids[:PREVIEW].tolist())

    def _id(
        self,
        values: dict[str, list[Any]],
        i: int,
        line: dict[str, Any],
        full: Encoded | None,
        repeats: Repeats,
    ) -> str:
        if self.id_column is None:
            assert full is not None  # a row without tokens has been dropped
            base = f"{line['source']}:{_digest(full.ids, full.labels)[:12]}"
            times = repeats.occurrence(base)
            return base if times == 1 else f"{base}#{times}"
        where = f"{', '.join(self.spec.paths)}, row {line['source_row']}"
        value = self._user_id(values, i)
        if not value:
            raise DataError(
                f"{where}: the id column {self.id_column!r} is empty; every row needs an id"
            )
        if repeats.occurrence(value) > 1:
            raise DataError(
                f"{where}: the id {value!r} (column {self.id_column!r}) was there before; ids "
                "must be unique, or leave `id` out to have them made from the content"
            )
        return value


def open_intake(spec: DataSpec, source: Source) -> Intake:
    """Settle which columns are read. Raises DataError or UsageError, with the nearest names."""
    names = list(source.dataset.column_names)
    columns = content_columns(spec, names)
    id_column = require_column(spec.id, "id", names, spec.paths) if spec.id else None
    source_column = spec.source if spec.source in names else None
    if spec.source is None and "source" in names:
        source_column = "source"
    from_text = columns.kind != "tokens"
    named = from_text or (spec.tokenizer or "").startswith("hf:")
    tokenizer = load_tokenizer(spec.tokenizer) if named else None
    known = {("id", id_column), ("source", source_column), ("text", columns.names[0])}
    kept = tuple(column for column in spec.columns if (column, column) not in known)
    for column in kept:
        require_column(column, "columns", names, spec.paths)
        if column in _TAKEN:
            raise UsageError(
                f"the column {column!r} (named by `columns`) is one of the tool's own "
                "names; rename it in the data"
            )
    return Intake(spec, source, columns, tokenizer, id_column, source_column, kept)


def ordered_after(
    intake: Intake, rows: NDArray[np.int64], known_ids: Sequence[str]
) -> NDArray[np.int64]:
    """`rows` with those that have `known_ids` first, in that order. Raises DataError where the
    source has lost one. Reads all rows once: only a set that grew pays for it.
    """
    place = {identity: at for at, identity in enumerate(known_ids)}
    first = np.full(len(known_ids), -1, dtype=np.int64)
    new: list[int] = []
    for chunk in intake.chunks(rows):
        for identity, row in chunk.frame.select("id", "source_row").iter_rows():
            if identity in place:
                first[place[identity]] = row
            else:
                new.append(row)
    lost = np.flatnonzero(first < 0)
    if len(lost):
        raise DataError(
            f"{', '.join(intake.spec.paths)} has lost {len(lost)} of {len(known_ids)} rows known "
            f"before, such as {known_ids[int(lost[0])]!r}; rows can be added to a run, not taken "
            "away: start another run, or make the sketches again (curate run … --from sketch)"
        )
    known_or_new = np.concatenate([first, np.asarray(new, dtype=np.int64)])
    # Dropped rows come last; they take no number, but keep their reasons.
    return np.concatenate([known_or_new, np.setdiff1d(rows, known_or_new)])


def dropped_frame(lines: Sequence[dict[str, Any]]) -> pl.DataFrame:
    """The table of dropped rows: source_row, id (the user's, if any), source, reason, text."""
    return pl.DataFrame(list(lines), schema=DROPPED_SCHEMA)


def count_reasons(reasons: Sequence[str]) -> str:
    """Such as "3 × text is empty, 1 × …", the most frequent first."""
    counts = {reason: reasons.count(reason) for reason in dict.fromkeys(reasons)}
    order: Callable[[str], int] = counts.__getitem__
    return ", ".join(f"{counts[r]} × {r}" for r in sorted(counts, key=order, reverse=True))


def _without_targets(full: Encoded, cut: Encoded) -> str:
    if cut.targets:
        return ""
    if full.targets:
        return f"no targets within the first {len(cut.ids)} of {len(full.ids)} tokens"
    return "no targets: nothing to predict"


def _digest(*arrays: NDArray[np.int32]) -> str:
    """128 bits of SHA-256, in hex, over the arrays as little-endian int32."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array, dtype="<i4").tobytes())
    return digest.hexdigest()[:32]


def _user_columns(part: Any, names: Sequence[str], keep: Sequence[int]) -> pl.DataFrame:
    """The user's columns of the kept rows, in the types that they have in the source."""
    table: pa.Table = part.with_format("arrow").select_columns(list(names))[:]
    for at, column in enumerate(table.columns):
        if isinstance(column.type, pa.BaseExtensionType):
            plain = column.cast(column.type.storage_type)
            table = table.set_column(at, table.column_names[at], plain)
    frame = pl.from_arrow(table.take(pa.array(keep, type=pa.int64())))
    return frame.select(names) if isinstance(frame, pl.DataFrame) else frame.to_frame()
