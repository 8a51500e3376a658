"""The manifest of a run directory: everything in the run that a reader may trust.

The manifest is a frozen value. A change makes a new one, and `curate.manifestfile` puts it on disk
in one step, after everything that the new manifest lists is whole there. What it does not list does
not exist for a reader, however complete the file looks.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from curate.errors import CurateError

SCHEMA_VERSION: Literal[1] = 1
INDEX_FORMAT = 4

VectorKind = Literal["steps", "totals"]
ShardKind = Literal["steps", "totals", "rows"]
Role = Literal["train", "query", "eval"]


class Entry(BaseModel):
    """Base of all entries: immutable, and strict about unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class File(Entry):
    """One file of the run.

    Attributes:
        path: relative to the run directory, with forward slashes.
        sha256: hex digest of its contents.
        bytes: its size.
        rows: the half-open range [first, last) of `row` that it holds; None where it has no rows.
    """

    path: str
    sha256: str
    bytes: int
    rows: tuple[int, int] | None = None


class ModelEntry(Entry):
    """The model that was sketched: how to build it, and a digest of the body's shapes."""

    spec: dict[str, Any] = Field(default_factory=dict)
    fingerprint: str
    parameters: int


class LoopEntry(Entry):
    """The loop body; `steps` are the labels of the deepest pass seen, in the order of time."""

    body: tuple[str, ...]
    tied: bool = True
    steps: tuple[str, ...] = ()
    coverage: dict[str, Any] = Field(default_factory=dict)


class SketchEntry(Entry):
    """What a sketch depends on beside the parameter's and the checkpoint's name."""

    version: int
    seed: int
    dim: int
    store: Literal["int8"] = "int8"
    options: dict[str, Any] = Field(default_factory=dict)


class CheckpointEntry(Entry):
    """A checkpoint and η_k, its weight; the weight may change without sketching again.

    `scales` are √(η_p/η̄) by parameter, where learning rates differ; they are in the sketches.
    """

    name: str
    path: str
    weight: float
    weight_source: str
    fingerprint: str
    scales: dict[str, float] = Field(default_factory=dict)


class SetEntry(Entry):
    """A set of examples.

    Attributes:
        role: what the set is for.
        rows: N, how many rows it has.
        parts: the Parquet files of its table, in row order.
        arrays: its token files and whatever else the loader keeps beside the table.
        sides: tables of further columns, joined to the set by `row`; name → file.
        source: the data spec that it was read from.
        fingerprint: digest of its rows' ids and contents, in order.
    """

    role: Role
    rows: int
    parts: tuple[File, ...] = ()
    arrays: tuple[File, ...] = ()
    sides: dict[str, File] = Field(default_factory=dict)
    source: dict[str, Any] = Field(default_factory=dict)
    fingerprint: str


class ShardEntry(Entry):
    """One shard: rows [rows[0], rows[1]) of a set at a checkpoint.

    `kind` is "steps" or "totals" for sketches, "rows" for the per-row loss and depth. `files` maps
    a file's name in `sketches/<set>/<checkpoint>/` to its sha256; `steps` is τ of these rows.
    """

    set: str
    checkpoint: str
    kind: ShardKind
    number: int
    rows: tuple[int, int]
    steps: int
    files: dict[str, str]


class InfluenceEntry(Entry):
    """The influence table of one query: a set, a group of it, or the maximum over groups.

    Attributes:
        set: the query set.
        group: the group's value, "max" for the maximum over groups, None for the mean of the set.
        train_set: the set whose rows were scored.
        kind: how a pair is scored.
        damping: λ of the preconditioner ("lambda" in the file), else None.
        windows: the early and late windows, as given.
        weights: η_k by checkpoint, as used.
        parts, tops, pairs: the Parquet files, in row order; `details` is free.
        complete: False while parts are still being added.
    """

    set: str
    group: str | None = None
    train_set: str = "train"
    kind: Literal["dot", "cosine", "precondition"] = "dot"
    damping: float | None = Field(default=None, alias="lambda")
    windows: dict[str, Any] = Field(default_factory=dict)
    weights: dict[str, float] = Field(default_factory=dict)
    parts: tuple[File, ...] = ()
    tops: tuple[File, ...] = ()
    pairs: tuple[File, ...] = ()
    details: dict[str, Any] = Field(default_factory=dict)
    complete: bool = False


class SelectionEntry(Entry):
    """A selection: which rows of a set were kept, by which configuration."""

    query: str | None = None
    train_set: str = "train"
    rows: int
    kept: int
    config: dict[str, Any] = Field(default_factory=dict)
    files: tuple[File, ...] = ()


class Manifest(Entry):
    """The contents of `manifest.json`."""

    schema_version: Literal[1] = SCHEMA_VERSION
    created: str
    versions: dict[str, str] = Field(default_factory=dict)
    git: dict[str, Any] = Field(default_factory=dict)
    recipe_hash: str | None = None
    model: ModelEntry | None = None
    loop: LoopEntry | None = None
    sketch: SketchEntry | None = None
    checkpoints: tuple[CheckpointEntry, ...] = ()
    sets: dict[str, SetEntry] = Field(default_factory=dict)
    shards: tuple[ShardEntry, ...] = ()
    influence: dict[str, InfluenceEntry] = Field(default_factory=dict)
    selections: dict[str, SelectionEntry] = Field(default_factory=dict)
    indexes: dict[str, dict[str, Any]] = Field(default_factory=dict)
    self_check: dict[str, dict[str, Any]] = Field(default_factory=dict)
    batch_budget: int | None = None
    shard_rows: int | None = None
    details: dict[str, Any] = Field(default_factory=dict)

    @property
    def steps(self) -> tuple[str, ...]:
        """Labels of the steps, in the order of time; empty before anything was sketched."""
        return self.loop.steps if self.loop else ()

    @property
    def tied(self) -> bool:
        """True where the same weights are used at every step."""
        return self.loop.tied if self.loop else True

    @property
    def weights(self) -> dict[str, float]:
        """η_k by checkpoint name, in manifest order."""
        return {entry.name: entry.weight for entry in self.checkpoints}

    def find_shards(self, set_name: str, checkpoint: str, kind: ShardKind) -> list[ShardEntry]:
        """The shards of one set at one checkpoint, in row order."""
        found = [
            shard
            for shard in self.shards
            if (shard.set, shard.checkpoint, shard.kind) == (set_name, checkpoint, kind)
        ]
        return sorted(found, key=lambda shard: shard.rows)

    def find_kind(self, set_name: str, kind: ShardKind) -> list[ShardEntry]:
        """The shards of one set at every checkpoint."""
        return [shard for shard in self.shards if (shard.set, shard.kind) == (set_name, kind)]

    def text(self) -> str:
        """Itself as JSON, as `manifest.json` has it."""
        return self.model_dump_json(by_alias=True, indent=1) + "\n"

    def without_attempts(self) -> Manifest:
        """Itself without what failed before any sketch was made of it: nobody is held to it."""
        used = {shard.checkpoint for shard in self.shards}
        kept = tuple(entry for entry in self.checkpoints if entry.name in used)
        checked = {name: report for name, report in self.self_check.items() if name in used}
        update: dict[str, Any] = {"checkpoints": kept, "self_check": checked}
        if not used:
            update |= {"model": None, "loop": None, "sketch": None}
        return self.model_copy(update=update)


def parse_manifest(contents: bytes, path: Path) -> Manifest:
    """The manifest that a file at `path` holds.

    Raises:
        CurateError: where it is not one, or of another schema version.
    """
    try:
        data = json.loads(contents)
        version = data.get("schema_version") if isinstance(data, dict) else None
        if version != SCHEMA_VERSION:
            raise CurateError(
                f"{path} has schema version {version!r}, this curate reads {SCHEMA_VERSION}: use "
                f"the curate that made the run, or make the run again"
            )
        return Manifest.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CurateError(f"{path} is not a run's manifest: {where}: {first['msg']}") from error
    except ValueError as error:
        raise CurateError(f"{path} is not JSON: {error}") from error


def index_digest(manifest: Manifest, set_name: str) -> str:
    """Of the sketches and the weights that an index of a set is built from, and of its format."""
    shards = sorted(
        [shard.checkpoint, shard.kind, shard.number, sorted(shard.files.items())]
        for shard in manifest.shards
        if shard.set == set_name and shard.kind != "rows"
    )
    said = json.dumps([INDEX_FORMAT, manifest.weights, shards], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()[:12]
