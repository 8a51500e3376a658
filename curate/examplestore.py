"""The example sets of a run: taken over whole, grown but never changed, joined with what is known.

A set is loaded into a staging directory and swapped in when it has been compared with the set that
is there. Killed between the two renames, the next writer puts the old directory back (`recover`).
"""

from __future__ import annotations

import hashlib
import shutil
from bisect import bisect_left
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from curate import atomic
from curate.errors import CurateError
from curate.manifest import File, Manifest, SetEntry

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from curate.examples import ExampleSet
    from curate.rundir import RunDirectory

_STAGED, _REPLACED = ".staged-", ".replaced-"


class ExampleStore:
    """The sets of one run; see `RunDirectory`, whose methods of the same names use it."""

    def __init__(self, run: RunDirectory) -> None:
        self._run = run

    def entry(self, set_name: str) -> SetEntry:
        """The record of a set; raises CurateError where the run has none of that name."""
        sets = self._run.manifest.sets
        if set_name not in sets:
            there = ", ".join(sorted(sets)) or "none yet"
            raise CurateError(f"the run has no set '{set_name}' (there: {there})")
        return sets[set_name]

    def stage(self, set_name: str) -> Path:
        """An empty directory beside the set's own."""
        path = self._beside(set_name, _STAGED)
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path

    def open(self, set_name: str) -> ExampleSet:
        """The set with its tokens."""
        from curate.examples import open_examples  # imports torch

        self.entry(set_name)
        return open_examples(self._run.examples_directory(set_name))

    def add(self, examples: ExampleSet) -> ExampleSet:
        """Compare with the set that is there, swap the directory in, and list its files."""
        staged = examples.directory
        if staged is None:
            raise CurateError(
                f"set '{examples.name}' is in memory only: load it into stage('{examples.name}')"
            )
        known = self._run.manifest.sets.get(examples.name)
        parts = sorted(staged.glob("part-*.parquet"))
        fingerprint = rows_fingerprint(parts)
        target = self._run.examples_directory(examples.name)
        self._refuse_changed(examples.name, parts, target)
        if known and fingerprint == known.fingerprint and staged != target:
            shutil.rmtree(staged)
            self._run.update(lambda manifest: _with(manifest, examples, known))
            return self.open(examples.name)
        self._install(staged, target)
        entry = self._record(examples, target, fingerprint)
        self._run.update(lambda manifest: _with(manifest, examples, entry))
        shutil.rmtree(self._beside(examples.name, _REPLACED), ignore_errors=True)
        return replace(self.open(examples.name), role=examples.role)

    def _refuse_changed(self, set_name: str, parts: list[Path], target: Path) -> None:
        """Rows that were sketched must be those in `parts`, in the same places."""
        fixed = self.fixed(set_name)
        if not fixed:
            return
        there = sorted(target.glob("part-*.parquet"))
        expected, seen = (rows_fingerprint(files, fixed) for files in (there, parts))
        if seen != expected:
            raise CurateError(
                f"the first {fixed} rows of set '{set_name}' are not those that were sketched "
                f"(expected {expected[:12]}, the data read now give {seen[:12]}): a set may grow "
                f"at its end only. Use another set name or another run directory, or make the "
                f"sketches again (curate run … --from sketch)"
            )

    def fixed(self, set_name: str) -> int:
        """How many of the set's first rows something was made of, so that they may not change.

        Rows that only stand in the table, such as those that stopped a run, may be mended.
        """
        manifest = self._run.manifest
        entry = manifest.sets.get(set_name)
        if entry is not None and entry.role == "eval" and manifest.shards:
            return entry.rows  # never sketched, but what the results are judged by
        ends = (shard.rows[1] for shard in manifest.shards if shard.set == set_name)
        return max(ends, default=0) if entry is not None else 0

    def recover(self) -> None:
        """Undo a swap that the manifest never learned of; drop what staging left behind."""
        for old in self._run.path.glob(f"examples/{_REPLACED}*"):
            target = old.with_name(old.name.removeprefix(_REPLACED))
            listed = [
                file
                for entry in self._run.manifest.sets.values()
                for file in (*entry.parts, *entry.arrays)
                if (self._run.path / file.path).parent == target
            ]
            if not all(_holds(self._run.path / file.path, file) for file in listed):
                shutil.rmtree(target, ignore_errors=True)
                old.replace(target)
            shutil.rmtree(old, ignore_errors=True)

    def add_side(self, set_name: str, name: str, frame: pl.DataFrame) -> None:
        """Write the columns beside the set and list the file."""
        path = self._run.examples_directory(set_name) / f"side-{name}.parquet"
        file = self._run.write_table(path, frame)
        entry = self.entry(set_name)
        changed = entry.model_copy(update={"sides": {**entry.sides, name: file}})
        self._run.update(lambda m: m.model_copy(update={"sets": {**m.sets, set_name: changed}}))

    def ids(self, set_name: str) -> list[str]:
        """The ids in row order; empty where there is no such set."""
        entry = self._run.manifest.sets.get(set_name)
        if entry is None:
            return []
        frame = self._run.scan(entry.parts, f"set '{set_name}'").select("id").collect()
        return frame["id"].to_list()

    def table(self, set_name: str, rows: Collection[int] | None = None) -> pl.LazyFrame:
        """The set's own table, with loss, steps and side columns joined by row.

        All rows are there; with `rows`, loss and steps of others may be NULL: no shard is read for
        them.
        """
        frame = self._run.scan(self.entry(set_name).parts, f"rows in set '{set_name}'")
        for more in self.beside(set_name, rows):
            table = pl.scan_parquet(more) if isinstance(more, Path) else more.lazy()
            frame = frame.join(table, on="row", how="left", maintain_order="left")
        return frame

    def beside(
        self, set_name: str, rows: Collection[int] | None = None
    ) -> list[pl.DataFrame | Path]:
        """What `table` joins by `row`: loss and steps once there are some, then side columns."""
        sides = [self._run.path / file.path for file in self.entry(set_name).sides.values()]
        if not self._run.manifest.find_kind(set_name, "rows"):
            return [*sides]
        return [self._measured(set_name, rows), *sides]

    def losses(self, set_name: str, rows: Collection[int] | None = None) -> pl.DataFrame:
        """row, then losses by checkpoint; `rows` as for `table`."""
        import numpy as np  # 100 ms, which `curate sql` need not wait for

        columns = {
            checkpoint: self._column(set_name, checkpoint, "loss", np.float32, np.nan, rows)
            for checkpoint in self._run.manifest.weights
        }
        frame = pl.DataFrame({"row": np.arange(self.entry(set_name).rows), **columns})
        return frame.with_columns(pl.col(list(columns)).fill_nan(None))

    def depths(self, set_name: str, rows: Collection[int] | None = None) -> NDArray[np.int32]:
        """(N,) depth by row; `rows` as for `table`."""
        import numpy as np

        deepest = np.zeros(self.entry(set_name).rows, np.int32)
        for checkpoint in self._run.manifest.weights:
            found = self._column(set_name, checkpoint, "depth", np.int32, 0, rows)
            np.maximum(deepest, found, out=deepest)
        return deepest

    def _measured(self, set_name: str, rows: Collection[int] | None) -> pl.DataFrame:
        """row, loss at the last checkpoint that has it, steps; NULL where not yet sketched."""
        losses = self.losses(set_name, rows)
        last_first = losses.columns[:0:-1]
        depths = pl.Series("steps", self.depths(set_name, rows))
        return losses.select("row", pl.coalesce(last_first).alias("loss")).with_columns(
            depths.replace(0, None)
        )

    def _column(
        self,
        set_name: str,
        checkpoint: str,
        name: str,
        kind: type,
        absent: float,
        rows: Collection[int] | None,
    ) -> NDArray[np.generic]:
        import numpy as np

        column: NDArray[np.generic] = np.full(self.entry(set_name).rows, absent, kind)
        directory = self._run.sketches_directory(set_name, checkpoint)
        wanted = None if rows is None else sorted(rows)
        for shard in self._run.manifest.find_shards(set_name, checkpoint, "rows"):
            first, last = shard.rows
            if wanted is None or bisect_left(wanted, first) < bisect_left(wanted, last):
                column[first:last] = np.load(directory / f"{name}-{shard.number:05d}.npy")
        return column

    def _install(self, staged: Path, target: Path) -> None:
        if staged == target:
            return
        old = target.with_name(f"{_REPLACED}{target.name}")
        if target.exists():
            target.replace(old)
        staged.replace(target)

    def _record(self, examples: ExampleSet, target: Path, fingerprint: str) -> SetEntry:
        import pyarrow.parquet as pq  # 50 ms, which readers need not wait for

        parts, first = [], 0
        for path in sorted(target.glob("part-*.parquet")):
            last = first + pq.read_metadata(path).num_rows
            parts.append(self._run.file(path, (first, last)))
            first = last
        listed = {part.path for part in parts}
        others = (self._run.file(path) for path in _files(target))
        return SetEntry(
            role=examples.role,
            rows=first,
            parts=tuple(parts),
            arrays=tuple(file for file in others if file.path not in listed),
            source=examples.spec.model_dump(mode="json", exclude_defaults=True),
            fingerprint=fingerprint,
        )

    def _beside(self, set_name: str, prefix: str) -> Path:
        own = self._run.examples_directory(set_name)
        return own.with_name(f"{prefix}{own.name}")


def rows_fingerprint(parts: list[Path], rows: int | None = None) -> str:
    """Digest of the ids and content hashes of the first `rows` rows, in order."""
    import pyarrow.parquet as pq

    digest, left = hashlib.sha256(), rows
    for path in parts:
        for batch in pq.ParquetFile(path).iter_batches(columns=["id", "content_hash"]):
            taken = batch if left is None else batch.slice(0, left)
            ids, hashes = (taken.column(name).to_pylist() for name in ("id", "content_hash"))
            digest.update("".join(f"{i}\0{h}\n" for i, h in zip(ids, hashes, strict=True)).encode())
            left = None if left is None else left - len(taken)
    if left:
        digest.update(b"rows are missing")
    return digest.hexdigest()


def _with(manifest: Manifest, examples: ExampleSet, entry: SetEntry) -> Manifest:
    settled = entry.model_copy(update={"role": examples.role})
    return manifest.model_copy(update={"sets": {**manifest.sets, examples.name: settled}})


def _holds(path: Path, file: File) -> bool:
    return path.is_file() and atomic.sha256(path) == file.sha256


def _files(directory: Path) -> Iterator[Path]:
    for path in sorted(directory.iterdir()):
        if path.is_file() and not path.name.startswith((".", "side-")):
            yield path
