"""What a run holds and what is still to be done, from its manifest alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from curate import coverage
from curate.manifest import index_digest
from curate.rundir import RunDirectory

if TYPE_CHECKING:
    import polars as pl

    from curate.manifest import Manifest

Line = tuple[str, str, str]


def status(path: Path) -> pl.DataFrame:
    """One row per thing of the run: what, its name, and how far it is.

    Raises CurateError where `path` is no run.
    """
    import polars as pl

    manifest = RunDirectory.open(path).manifest
    lines = [*_made(manifest), *_sketches(manifest), *_results(manifest), *_steps(manifest)]
    return pl.DataFrame(lines, schema=["what", "name", "state"], orient="row")


def _made(manifest: Manifest) -> Iterator[Line]:
    yield "run", manifest.created, f"schema {manifest.schema_version}"
    if manifest.model and manifest.loop:
        name = str(manifest.model.spec.get("source", "model"))
        yield "model", name, f"{manifest.model.parameters:,} parameters"
        kind = "tied" if manifest.tied else "untied"
        yield "loop", ", ".join(manifest.loop.body), f"{len(manifest.steps)} steps, {kind}"
        gradients = {name: check.get("gradient") for name, check in manifest.self_check.items()}
        for name, text in coverage.lines(manifest.loop.coverage, gradients):
            yield "coverage", name, text
    if manifest.sketch:
        yield "sketch", f"M={manifest.sketch.dim}", f"seed {manifest.sketch.seed}, int8"
    for name, entry in manifest.sets.items():
        yield "set", name, f"{entry.rows:,} rows, {entry.role}"
    for checkpoint in manifest.checkpoints:
        source = checkpoint.weight_source
        yield "checkpoint", checkpoint.name, f"weight {checkpoint.weight:.4g} ({source})"


def _sketches(manifest: Manifest) -> Iterator[Line]:
    for name, entry in manifest.sets.items():
        for checkpoint in manifest.checkpoints:
            done = _sketched(manifest, name, checkpoint.name)
            if entry.role != "eval" or done:
                state = "done" if done == entry.rows else "curate sketch continues"
                yield "sketches", f"{name} @ {checkpoint.name}", f"{done:,}/{entry.rows:,}, {state}"


def _sketched(manifest: Manifest, name: str, checkpoint: str) -> int:
    """Rows with sketches of every kind that any shard of the set at the checkpoint has."""
    rows: dict[str, int] = {}
    for shard in manifest.shards:
        if (shard.set, shard.checkpoint) == (name, checkpoint):
            rows[shard.kind] = rows.get(shard.kind, 0) + shard.rows[1] - shard.rows[0]
    return min(rows.values(), default=0)


def _results(manifest: Manifest) -> Iterator[Line]:
    for name, entry in manifest.influence.items():
        state = entry.kind if entry.complete else f"{entry.kind}, curate score continues"
        yield "influence", name, f"on {entry.train_set}, {state}"
    for name, built in manifest.indexes.items():
        fresh = built["digest"] == index_digest(manifest, name)
        yield "index", name, "built" if fresh else "out of date, curate index makes it anew"
    for name, selection in manifest.selections.items():
        yield "selection", name, f"{selection.kept:,} of {selection.rows:,} rows kept"


def _steps(manifest: Manifest) -> Iterator[Line]:
    for step, entry in manifest.details.get("steps", {}).items():
        yield "step", step, f"done {entry.get('finished', '')}".strip()
