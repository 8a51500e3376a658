"""Scores: from sketches to the influence table of a query set and of its groups.

Every group's query vectors are made first (`queryvectors`), then the training sketches are read
once for each chunk of groups and multiplied block by block (`product`); raw scores go to disk
(`scratch`), and the tables are finished from there (`columns`), since contrast is standardised over
the whole training set. Tables enter the manifest together, when all are whole.

What it gives up: raw scores take disk space, 4 bytes × (τ + 8) for each row and group, until the
tables are finished.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import asdict
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import polars as pl
import torch

from curate.blocks import spans
from curate.columns import Contrast, Moments, finish
from curate.errors import CurateError, UsageError
from curate.influencetable import Best, discard, write_parquet
from curate.manifest import File, InfluenceEntry, Manifest
from curate.pairscores import ranked_by, write_pairs, write_tops
from curate.product import Product
from curate.queryvectors import Doubles, Groups, QuerySide, QueryVectors, group_rows, part_of
from curate.rundir import RunDirectory, folder
from curate.scoresettings import ScoreSettings, chosen_weights, data_digest, group_labels
from curate.scratch import TABLE_ROWS, Progress, Raw, Scratch
from curate.windows import Windows
from curate.workers import in_order

VERSION = 3
"""Part of every digest: raise it where the same settings give other numbers."""
VECTOR_BYTES = 96 << 20
KEPT_INVERSES = 4
MAXIMUM = "max"


def score_run(
    run: RunDirectory,
    query_set: str,
    *,
    train_set: str = "train",
    group_by: str | None = None,
    kind: Literal["dot", "cosine"] = "dot",
    precondition: float | None = None,
    windows: Windows | Mapping[str, Any] | None = None,
    contrast: Contrast = "standardised",
    top_k: int = 100,
    top_by: str = "total",
    pairs: bool = False,
    weights: Mapping[str, float] | None = None,
    max_by: str = "total",
    name: str | None = None,
    overwrite: bool = False,
    device: str = "auto",
    progress: Progress | None = None,
) -> list[str]:
    """Score a training set against a query set and return the names of the tables.

    The mean over the queries becomes table `name` (by default the set's); with `group_by` each
    group becomes "name:value" and the best group of each row "name:max", whole rows, so that steps
    still add up to the total. A group's mean counts a step that a member does not have as zero; a
    step that none has is NULL. What is there already with these settings and these sketches is
    left as it is; other rows or sketches are scored again.

    Args:
        windows: early and late steps; by default the halves of each query's depth.
        top_k: how many training rows to keep for each single query; 0 for none.
        top_by: which they are: largest total, early, late, energy or a step such as s03.
        pairs: also every (query, row), N × Q rows of them, with raw contrast.
        weights: other η_k for some checkpoints.
        overwrite: replace tables of this name that have other settings.

    Raises:
        UsageError: settings that make no sense, an unknown column or checkpoint.
        CurateError: sketches are missing, or the tables are there with other settings.
    """
    chosen = chosen_weights(run.manifest, weights or {})
    settings = ScoreSettings(
        train_set, group_by, kind, precondition, Windows.of(windows), contrast, chosen, max_by
    )
    detail = {"top_k": top_k, "top_by": top_by, "pairs": pairs}
    with run.writing():
        scoring = Scoring(run, query_set, name or query_set, settings, detail, device)
        if scoring.done(overwrite=overwrite):
            return list(scoring.tables)
        return scoring.run_all(progress or (lambda *_: None))


class Scoring:
    """One scoring, prepared: which tables it makes, and the digest of what they depend on."""

    def __init__(
        self,
        run: RunDirectory,
        query_set: str,
        name: str,
        settings: ScoreSettings,
        detail: dict[str, Any],
        device: str,
    ) -> None:
        self.run, self.query_set, self.name = run, query_set, name
        self.settings, self.detail = settings, detail
        manifest = run.manifest
        self.tied = manifest.tied
        self.weights = {name: eta for name, eta in settings.weights if eta > 0}
        cosine = settings.kind == "cosine"
        self.side = QuerySide(
            run, query_set, self.weights, settings.windows, cosine=cosine, tied=self.tied
        )
        self.product = Product(
            run, settings.train_set, self.weights, cosine=cosine, tied=self.tied, device=device
        )
        if detail.get("top_k"):
            ranked_by(str(detail["top_by"]), self.side.steps)
        labels = group_labels(run, query_set, settings.group_by)
        self.groups = group_rows(labels, self.side.rows)
        self.tables = {_table(name, group): group for group in self.groups.names}
        self._absent = self.side.absent(self.groups)
        if len(self.groups.names) > 1:
            if MAXIMUM in self.groups.names:
                raise UsageError(
                    f"a group of {settings.group_by!r} is called 'max', which is the name of the "
                    "table of the best group; rename it in the data"
                )
            self.tables[_table(name, MAXIMUM)] = MAXIMUM
        self.data_digest = data_digest(manifest, query_set, settings.train_set, labels)
        said = json.dumps([VERSION, asdict(settings), detail], sort_keys=True, default=str)
        self.settings_digest = hashlib.sha256(said.encode()).hexdigest()
        both = self.settings_digest + self.data_digest
        self.digest = hashlib.sha256(both.encode()).hexdigest()[:12]
        self.place = 0
        self._inverses: dict[tuple[str, int], Any] = {}

    def done(self, *, overwrite: bool) -> bool:
        """True where every table is there as it would be made.

        Raises:
            CurateError: tables with other settings are there, and are not to be overwritten.
        """
        there = self.run.manifest.influence
        found = [there[name] for name in self.tables if name in there]
        if len(found) == len(self.tables) and all(
            entry.complete and entry.details.get("digest") == self.digest for entry in found
        ):
            return True
        for entry in found:
            if entry.details.get("settings") != self.settings_digest and not overwrite:
                raise CurateError(
                    f"{self.run.path} has scores called {self.name!r} with other settings "
                    f"({_describe(entry)}); give --overwrite to replace them, or another name"
                )
        return False

    def run_all(self, progress: Progress) -> list[str]:
        """Score, finish the tables, list them, and clear up."""
        run = self.run
        scratch = Scratch(run.path / "scratch" / folder(self.name), self.digest, self.product.rows)
        chunks = spans(0, len(self.groups.names), self.group_limit())
        for number, (start, stop) in enumerate(chunks):
            self._score_chunk(scratch, number, part_of(self.groups, start, stop), progress)
        files = self._tables(scratch, chunks)
        tops = write_tops(self) if self.detail["top_k"] else ()
        pairs = write_pairs(self) if self.detail["pairs"] else ()
        old = [file for name in self.tables for file in _files(run.manifest, name)]
        entries = {table: self._entry(table, files[table]) for table in self.tables}
        whole = {"tops": tops, "pairs": pairs}
        entries[self.name] = entries[self.name].model_copy(update=whole)
        run.update(lambda m: m.model_copy(update={"influence": {**m.influence, **entries}}))
        discard(run, old)
        scratch.remove()
        return list(self.tables)

    def group_limit(self) -> int:
        """How many groups' vectors, at all checkpoints, `VECTOR_BYTES` hold."""
        each = 8 * self.side.columns * self.product.dim * len(self.weights)
        return max(1, min(64, VECTOR_BYTES // each))

    def vectors(self, groups: Groups) -> list[QueryVectors]:
        """Query vectors by checkpoint, preconditioned where the settings say so."""
        out = []
        for name, values in zip(self.weights, self.side.vectors(groups), strict=True):
            if self.settings.precondition is not None:
                values = self._preconditioned(name, values)
            out.append(QueryVectors.of(values))
        return out

    def _preconditioned(self, checkpoint: str, values: Doubles) -> Doubles:
        slots = [
            self._inverse(checkpoint, slot).apply(torch.from_numpy(values[slot]))
            for slot in range(len(values))
        ]
        return np.stack([slot.cpu().numpy() for slot in slots])

    def _inverse(self, checkpoint: str, slot: int) -> Any:
        """(C + λI)⁻¹ of one checkpoint and slot; a few are kept, each takes M² doubles."""
        from sdi.precondition import SecondMoment

        key = (checkpoint, slot)
        if key not in self._inverses:
            source = self.product.sources[checkpoint]
            moment = SecondMoment(source.dim, self.product.device)
            for start, stop in spans(0, source.rows, 1024):
                block = source.read(start, stop)
                values = block.values[:, slot].astype(np.float32) * block.scale[:, slot, None]
                moment.add(torch.from_numpy(values))
            if len(self._inverses) >= KEPT_INVERSES:
                self._inverses.pop(next(iter(self._inverses)))
            self._inverses[key] = moment.factor(float(self.settings.precondition or 0))
        return self._inverses[key]

    def _score_chunk(
        self, scratch: Scratch, chunk: int, groups: Groups, progress: Progress
    ) -> None:
        missing = scratch.missing(chunk)
        if not missing:
            return
        bound = self.product.bind(self.vectors(groups))
        width = self.side.steps + 8

        def work(first: int, last: int) -> Raw:
            return self.product.score(bound, first, last).astype(np.float32)

        def blocks(start: int, stop: int) -> Iterator[Raw]:
            own = self.product.blocks(bound, start, stop)
            with closing(in_order(work, own, threads=self.product.threads)) as results:
                for (_, last), raw in results:
                    yield raw
                    progress(last, self.product.rows)

        for part in missing:
            start, stop = scratch.parts[part]
            shape = (stop - start, len(groups.names), width)
            scratch.write(chunk, part, shape, blocks(start, stop))

    def _tables(self, scratch: Scratch, chunks: list[tuple[int, int]]) -> dict[str, list[File]]:
        """Write every table, part by part."""
        place = [(n, g) for n, (start, stop) in enumerate(chunks) for g in range(stop - start)]
        standard = self.settings.contrast == "standardised"
        moments = [
            Moments.together(Moments.of(raw) for raw in scratch.group(*where)) if standard else None
            for where in place
        ]
        files: dict[str, list[File]] = {table: [] for table in self.tables}
        for part, span in enumerate(scratch.parts):
            best = Best(span)
            for number, (chunk, group) in enumerate(place):
                raw = np.load(scratch.path(chunk, part), mmap_mode="r")[:, group]
                frames = self._finished(raw, span, number, moments[number], best)
                table = _table(self.name, self.groups.names[number])
                files[table].append(self._write(table, part, frames, span))
            if len(place) > 1:
                table = _table(self.name, MAXIMUM)
                frames = self._best(scratch, part, place, moments, best)
                files[table].append(self._write(table, part, frames, span))
        return files

    def _finished(
        self, raw: Raw, span: tuple[int, int], number: int, moments: Moments | None, best: Best
    ) -> Iterator[pl.DataFrame]:
        """The table of one group over the rows of a part, block by block; offers it to `best`."""
        for start, stop in spans(*span, TABLE_ROWS):
            rows = np.arange(start, stop, dtype=np.int64)
            frame = self._frame(raw[start - span[0] : stop - span[0]], rows, number, moments)
            if number:  # the mean over all queries is not one of the groups
                best.offer(number, rows, frame[self.settings.max_by])
            yield frame

    def _best(
        self,
        scratch: Scratch,
        part: int,
        place: list[tuple[int, int]],
        moments: list[Moments | None],
        best: Best,
    ) -> Iterator[pl.DataFrame]:
        """For every row the whole row of its best group, so that its steps add up to its total."""
        first = scratch.parts[part][0]
        for start, stop in spans(*scratch.parts[part], TABLE_ROWS):
            frames = []
            for number, rows in best.of(start, stop):
                chunk, group = place[number]
                raw = np.load(scratch.path(chunk, part), mmap_mode="r")[:, group]
                frame = self._frame(raw[rows - first], rows, number, moments[number])
                named = pl.lit(self.groups.names[number]).alias("group")
                frames.append(frame.with_columns(named))
            yield pl.concat(frames).sort("row")

    def _frame(
        self, raw: Raw, rows: npt.NDArray[np.int64], number: int, moments: Moments | None
    ) -> pl.DataFrame:
        errors = self.settings.precondition is None
        frame = finish(raw, moments, absent=self._absent[number], errors=errors)
        return frame.insert_column(0, pl.Series("row", rows))

    def _write(
        self, table: str, part: int, frames: Iterator[pl.DataFrame], rows: tuple[int, int]
    ) -> File:
        directory = self.run.influence_directory(table)
        path = directory / f"part-{self.digest}-{part:05d}.parquet"
        return write_parquet(self.run, path, frames, rows)

    def _entry(self, table: str, parts: list[File]) -> InfluenceEntry:
        settings = self.settings
        group = self.tables[table]
        details = {
            "digest": self.digest,
            "settings": self.settings_digest,
            "group_by": settings.group_by,
            "score": settings.kind,
            "contrast": settings.contrast,
            "max_by": settings.max_by,
            **self.detail,
        }
        # The field goes by its name in the file, which is a keyword of the language.
        damping: dict[str, Any] = {"lambda": settings.precondition}
        return InfluenceEntry(
            set=self.query_set,
            group=group or None,
            train_set=settings.train_set,
            kind="precondition" if settings.precondition is not None else settings.kind,
            **damping,
            windows=settings.windows.as_dict(),
            weights=dict(settings.weights),
            parts=tuple(parts),
            details=details,
            complete=True,
        )


def _table(name: str, group: str) -> str:
    return f"{name}:{group}" if group else name


def _files(manifest: Manifest, table: str) -> tuple[File, ...]:
    entry = manifest.influence.get(table)
    return (*entry.parts, *entry.tops, *entry.pairs) if entry else ()


def _describe(entry: InfluenceEntry) -> str:
    return ", ".join(
        [
            f"kind {entry.kind}",
            f"groups by {entry.details.get('group_by') or 'nothing'}",
            f"windows {entry.windows}",
            f"weights {entry.weights}",
        ]
    )


def scoring_of(run: RunDirectory, table: str) -> Scoring:
    """The scoring that made a table of a mean, with `place` the number of its group."""
    entry = run.influence_entry(table)
    settings = ScoreSettings(
        entry.train_set,
        entry.details.get("group_by"),
        "cosine" if entry.kind == "cosine" else "dot",
        entry.damping,
        Windows.of(entry.windows),
        entry.details["contrast"],
        tuple(entry.weights.items()),
    )
    name = table.removesuffix(f":{entry.group}") if entry.group else table
    scoring = Scoring(run, entry.set, name, settings, {}, "cpu")
    scoring.place = scoring.groups.names.index(entry.group or "")
    return scoring
