"""The run directory: where everything of a run is, and the one place that changes its manifest.

Every file is whole before the manifest lists it, and the manifest is changed last, in one step. So
a process killed at any moment leaves a directory that reads as it did before, plus files that
nobody lists and the next run writes again. Readers look at the manifest only and need no lock; a
process that writes holds one (`writing`), which the system releases when the process dies.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

import polars as pl

from curate import atomic, provenance, settle
from curate.errors import CheckFailed, CurateError
from curate.examplestore import ExampleStore
from curate.manifest import (
    CheckpointEntry,
    File,
    InfluenceEntry,
    LoopEntry,
    Manifest,
    ModelEntry,
    SelectionEntry,
    ShardEntry,
    SketchEntry,
    VectorKind,
)
from curate.manifestfile import ManifestFile

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from curate.examples import ExampleSet
    from sdi.shards import Shard

MANIFEST = "manifest.json"

Found = TypeVar("Found")


def folder(name: str) -> str:
    """A name as one safe path component; legal names stay as they are."""
    if name in ("", ".", "..") or "\x00" in name:
        raise CurateError(f"{name!r} cannot name a folder: choose a plain name")
    return quote(name, safe=" :@+,()")


class RunDirectory:
    """A run on disk. Make one with `create`, `open` or `open_or_create`.

    Attributes:
        path: the directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = ManifestFile(self.manifest_path)
        self._store = ExampleStore(self)
        self._held = 0

    @classmethod
    def create(cls, path: str | Path, *, recipe_hash: str | None = None) -> RunDirectory:
        """An empty run at `path`, which must not hold one yet."""
        run = cls(Path(path))
        if run.manifest_path.exists():
            raise CurateError(
                f"{path} already holds a run: open it to go on with it, or choose another directory"
            )
        run._file.write(
            Manifest(
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                versions=provenance.versions(),
                git=provenance.git_state(),
                recipe_hash=recipe_hash,
            )
        )
        return run

    @classmethod
    def open(cls, path: str | Path) -> RunDirectory:
        """The run at `path`.

        Raises:
            CurateError: where there is none, or its manifest cannot be read.
        """
        run = cls(Path(path))
        if not run.manifest_path.is_file():
            raise CurateError(
                f"{path} is not a run directory: it has no {MANIFEST}. `curate run RECIPE --into "
                f"{path}` makes one"
            )
        _ = run.manifest
        return run

    @classmethod
    def open_or_create(cls, path: str | Path, *, recipe_hash: str | None = None) -> RunDirectory:
        """The run at `path`, made if there is none."""
        if (Path(path) / MANIFEST).exists():
            return cls.open(path)
        return cls.create(path, recipe_hash=recipe_hash)

    @property
    def manifest_path(self) -> Path:
        """Where the manifest is."""
        return self.path / MANIFEST

    @property
    def manifest(self) -> Manifest:
        """The manifest as it stands on disk."""
        return self._file.contents

    def update(self, change: Callable[[Manifest], Manifest]) -> Manifest:
        """Replace the manifest by `change(manifest)`, in one step, where that differs."""
        return self._file.update(change)

    def note(self, **fields: Any) -> Manifest:
        """Set top-level fields of the manifest (`recipe_hash=...`, `batch_budget=...`)."""
        return self.update(lambda manifest: manifest.model_copy(update=fields))

    @contextmanager
    def writing(self) -> Iterator[RunDirectory]:
        """Hold the writer's lock; leftovers of interrupted writers are swept away first.

        Blocks of the same object may nest.

        Raises:
            CurateError: where another process holds it.
        """
        if self._held:
            yield self
            return
        with (self.path / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise CurateError(
                    f"another process is writing to {self.path}: wait for it to end, or stop it"
                ) from error
            atomic.sweep(self.path)
            self._file.fold()
            self._store.recover()
            self._held += 1
            try:
                yield self
                self._file.fold()
            finally:
                self._held -= 1

    def examples_directory(self, set_name: str) -> Path:
        """examples/<set>"""
        return self.path / "examples" / folder(set_name)

    def sketches_directory(self, set_name: str, checkpoint: str) -> Path:
        """sketches/<set>/<checkpoint>"""
        return self.path / "sketches" / folder(set_name) / folder(checkpoint or "_")

    def influence_directory(self, query: str, table: str = "influence") -> Path:
        """influence/query=<query>; `table` may also be "tops" or "pairs"."""
        return self.path / table / f"query={folder(query)}"

    def selection_directory(self, name: str) -> Path:
        """selections/<name>"""
        return self.path / "selections" / folder(name)

    @property
    def index_directory(self) -> Path:
        """index/: caches that can be rebuilt."""
        return self.path / "index"

    def file(self, path: Path, rows: tuple[int, int] | None = None) -> File:
        """The manifest's record of a file that is whole on disk."""
        relative = path.relative_to(self.path).as_posix()
        return File(path=relative, sha256=atomic.sha256(path), bytes=path.stat().st_size, rows=rows)

    def write_table(
        self, path: Path, frame: pl.DataFrame, rows: tuple[int, int] | None = None
    ) -> File:
        """Write a Parquet file in one step and return its record, not yet in the manifest."""
        atomic.write_table(path, frame)
        return self.file(path, rows)

    def scan(self, files: tuple[File, ...], what: str) -> pl.LazyFrame:
        """A lazy table over listed Parquet files.

        Raises:
            CurateError: where there are none.
        """
        if not files:
            raise CurateError(f"the run at {self.path} has no {what}")
        return pl.scan_parquet([self.path / file.path for file in files], glob=False)

    def settle(self, model: ModelEntry, loop: LoopEntry, sketch: SketchEntry) -> Manifest:
        """Record what the run's sketches are made of, or refuse what differs from the record.

        Raises:
            CurateError: naming the value that the run has and the one that was asked for.
        """
        return self.update(lambda manifest: settle.spec(manifest, model, loop, sketch))

    def settle_checkpoint(self, entry: CheckpointEntry) -> Manifest:
        """Record a checkpoint. A new weight is taken over; other contents are refused."""
        return self.update(lambda manifest: settle.checkpoint(manifest, entry))

    def stage(self, set_name: str) -> Path:
        """An empty directory to load a set's examples into, before `add_set` takes them over."""
        return self._store.stage(set_name)

    def add_set(self, examples: ExampleSet) -> ExampleSet:
        """Take a persisted set over, from `stage(name)` or from `examples_directory(name)`.

        A set that is already there may only have grown: the rows that were sketched must be there.
        Returns the set as opened from its place in the run.

        Raises:
            CurateError: where the rows that were already there are others now.
        """
        return self._store.add(examples)

    def add_side(self, set_name: str, name: str, frame: pl.DataFrame) -> None:
        """Add columns to a set: `frame` has `row` and the columns, which `examples` joins."""
        self._store.add_side(set_name, name, frame)

    def example_set(self, set_name: str) -> ExampleSet:
        """The set with its tokens, memory-mapped."""
        return self._store.open(set_name)

    def ids(self, set_name: str) -> list[str]:
        """The ids of a set's rows, in row order; empty where the run has no such set."""
        return self._store.ids(set_name)

    def fixed_ids(self, set_name: str) -> list[str]:
        """The ids of the rows that were sketched, which keep their numbers; others may change."""
        return self.ids(set_name)[: self._store.fixed(set_name)]

    def examples(
        self, set_name: str = "train", rows: Collection[int] | None = None
    ) -> pl.LazyFrame:
        """A set's table in row order, with the columns of its side tables.

        Once it was sketched: `loss`, at the last checkpoint that has it, and `steps`, its depth.
        With `rows` both may be NULL in other rows, all of which are there; that is quicker.
        """
        return self._store.table(set_name, rows)

    def losses(self, set_name: str) -> pl.DataFrame:
        """row, then one float32 column of losses per checkpoint; NULL where not yet sketched."""
        return self._store.losses(set_name)

    def depths(self, set_name: str) -> NDArray[np.int32]:
        """(N,) each row's number of steps, the largest over checkpoints; 0: not yet sketched."""
        return self._store.depths(set_name)

    def add_shard(self, entry: ShardEntry) -> Manifest:
        """List a shard whose files are whole."""
        return self.add_shards((entry,))

    def add_shards(
        self,
        entries: tuple[ShardEntry, ...],
        labels: tuple[str, ...] = (),
        coverage: dict[str, Any] | None = None,
    ) -> Manifest:
        """List several shards in one step, with the labels of their steps and the coverage."""
        new = {(e.set, e.checkpoint, e.kind, e.number) for e in entries}
        numbers = {e.number for e in entries}  # few have one of these, and it is quickly told

        def change(manifest: Manifest) -> Manifest:
            kept = tuple(
                e
                for e in manifest.shards
                if e.number not in numbers or (e.set, e.checkpoint, e.kind, e.number) not in new
            )
            listed = manifest.model_copy(update={"shards": kept + entries})
            return settle.steps(listed, labels, coverage)

        return self.update(change)

    def shards(
        self, set_name: str, checkpoint: str, kind: VectorKind, *, partial: bool = False
    ) -> list[tuple[int, int, Shard]]:
        """(first row, last row + 1, shard) in row order; the values are memory-mapped.

        Raises:
            CurateError: where rows are missing, unless `partial`.
        """
        from sdi.shards import open_shard  # imports torch, which `status` and `sql` never need

        entries = self.manifest.find_shards(set_name, checkpoint, kind)
        covered = sum(b - a for a, b in (entry.rows for entry in entries))
        rows = self._store.entry(set_name).rows
        if covered != rows and not partial:
            raise CurateError(
                f"{covered} of the {rows} rows of set '{set_name}' have {kind} sketches at "
                f"checkpoint '{checkpoint}': finish with `curate sketch {self.path}`"
            )
        directory = self.sketches_directory(set_name, checkpoint)
        return [(*e.rows, open_shard(directory, kind, e.number)) for e in entries]

    def add_influence(self, query: str, entry: InfluenceEntry) -> Manifest:
        """Record, or replace, the influence table of a query."""
        return self.update(
            lambda m: m.model_copy(update={"influence": {**m.influence, query: entry}})
        )

    def influence_entry(self, query: str) -> InfluenceEntry:
        """The record of a query's influence table.

        Raises:
            CurateError: where there is none; the message names those that exist.
        """
        return _known(self.manifest.influence, query, "influence table", "score")

    def influence(self, query: str) -> pl.LazyFrame:
        """A query's influence table, sorted by row."""
        entry = self.influence_entry(query)
        return self.scan(entry.parts, f"influence of '{query}'")

    def tops(self, query: str) -> pl.LazyFrame:
        """The best training rows of each query row."""
        return self.scan(self.influence_entry(query).tops, f"top rows for '{query}'")

    def pairs(self, query: str) -> pl.LazyFrame:
        """Scores of every (training row, query row), where they were asked for."""
        return self.scan(self.influence_entry(query).pairs, f"pairs for '{query}'")

    def add_selection(self, name: str, entry: SelectionEntry) -> Manifest:
        """Record, or replace, a selection."""
        return self.update(
            lambda m: m.model_copy(update={"selections": {**m.selections, name: entry}})
        )

    def selection_entry(self, name: str) -> SelectionEntry:
        """The record of a selection; raises CurateError where there is none."""
        return _known(self.manifest.selections, name, "selection", "filter")

    def selection(self, name: str) -> pl.LazyFrame:
        """The decisions of a selection: every row, kept or dropped."""
        return self.scan(self.selection_entry(name).files, f"decisions of '{name}'")

    def listed(self) -> Iterator[tuple[Path, str]]:
        """Every file that the manifest lists, with the sha256 it must have."""
        manifest = self.manifest
        for entry in manifest.sets.values():
            for file in (*entry.parts, *entry.arrays, *entry.sides.values()):
                yield self.path / file.path, file.sha256
        for shard in manifest.shards:
            directory = self.sketches_directory(shard.set, shard.checkpoint)
            yield from ((directory / name, digest) for name, digest in shard.files.items())
        for table in manifest.influence.values():
            for file in (*table.parts, *table.tops, *table.pairs):
                yield self.path / file.path, file.sha256
        for selection in manifest.selections.values():
            yield from ((self.path / file.path, file.sha256) for file in selection.files)

    def problems(self) -> Iterator[str]:
        """One line for each listed file that is absent or whose contents are not as recorded."""
        for path, digest in self.listed():
            if not path.is_file():
                yield f"{path.relative_to(self.path)}: absent"
            elif atomic.sha256(path) != digest:
                yield f"{path.relative_to(self.path)}: its contents are not what was written"

    def verify(self) -> int:
        """Read every listed file and return how many there are.

        Raises:
            CheckFailed: naming the first of those that are absent or changed.
        """
        problems = list(self.problems())
        if problems:
            raise CheckFailed(
                f"{len(problems)} files of {self.path} are damaged, the first is {problems[0]}. "
                f"Restore them, or delete the run and make it again"
            )
        return sum(1 for _ in self.listed())


def _known(entries: dict[str, Found], name: str, what: str, command: str) -> Found:
    if name in entries:
        return entries[name]
    there = ", ".join(sorted(entries)) or "none yet"
    raise CurateError(
        f"the run has no {what} '{name}' (there: {there}); `curate {command}` makes one"
    )
