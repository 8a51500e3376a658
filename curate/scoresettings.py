"""What a score depends on: its settings, the checkpoints' weights, the groups, the data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from curate.columns import Contrast
from curate.errors import CurateError, UsageError
from curate.manifest import Manifest
from curate.rundir import RunDirectory
from curate.windows import Windows


@dataclass(frozen=True)
class ScoreSettings:
    """All that a score depends on beside the data.

    Attributes:
        train_set: the set whose rows are scored.
        group_by: column of the query set; each value is a group, and their maximum a table.
        kind: ``dot``, or ``cosine``: every SDI_t divided by the norms of its two vectors.
        precondition: λ relative to the mean eigenvalue of C, or None.
        windows: early and late steps.
        contrast: ``standardised`` over the training set, or ``raw``: late − early.
        weights: η_k by checkpoint.
        max_by: the column by which a row's best group is found.
    """

    train_set: str = "train"
    group_by: str | None = None
    kind: Literal["dot", "cosine"] = "dot"
    precondition: float | None = None
    windows: Windows = field(default_factory=Windows)
    contrast: Contrast = "standardised"
    weights: tuple[tuple[str, float], ...] = ()
    max_by: str = "total"

    def __post_init__(self) -> None:
        if self.kind not in ("dot", "cosine"):
            raise UsageError(f"kind is {self.kind!r}; expected 'dot' or 'cosine'")
        if self.contrast not in ("standardised", "raw"):
            raise UsageError(f"contrast is {self.contrast!r}; expected 'standardised' or 'raw'")
        if self.max_by not in ("total", "early", "late", "contrast"):
            raise UsageError(f"max_by is {self.max_by!r}; expected total, early, late or contrast")
        if self.precondition is not None and self.kind == "cosine":
            raise UsageError("a preconditioned score has no cosine; choose one of the two")


def chosen_weights(manifest: Manifest, given: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
    """η_k by checkpoint, those of the manifest and what replaces them."""
    known = manifest.weights
    for name in given:
        if name not in known:
            raise UsageError(
                f"weights name checkpoint {name!r}; the run has {', '.join(known) or 'none'}"
            )
    weights = {**known, **{name: float(eta) for name, eta in given.items()}}
    if not weights:
        raise CurateError("the run has no checkpoints yet; run `curate sketch` first")
    if any(not np.isfinite(eta) or eta < 0 for eta in weights.values()):
        raise UsageError(f"weights are {weights}; expected finite numbers, none negative")
    if not any(weights.values()):
        raise UsageError("every checkpoint has weight 0; give at least one a positive weight")
    return tuple(weights.items())


def group_labels(run: RunDirectory, query_set: str, column: str | None) -> list[object] | None:
    """The group of each query row."""
    if column is None:
        return None
    table = run.examples(query_set)
    names = table.collect_schema().names()
    if column not in names:
        raise UsageError(
            f"group_by: set {query_set!r} has no column {column!r}; it has {', '.join(names)}"
        )
    labels: list[object] = table.sort("row").select(column).collect()[column].to_list()
    return labels


def data_digest(manifest: Manifest, query: str, train: str, labels: list[object] | None) -> str:
    """Digest of all the sketches that are read, and of the queries' groups."""
    shards = sorted(
        [shard.set, shard.checkpoint, shard.kind, shard.number, sorted(shard.files.items())]
        for shard in manifest.shards
        if shard.set in (query, train) and shard.kind != "rows"
    )
    said = json.dumps([shards, labels], sort_keys=True, default=str)
    return hashlib.sha256(said.encode()).hexdigest()
