"""What the sketches of a run are made of: recorded once, and never mixed.

Inner products of sketches mean something only where both were made with the same hashes, of the
same parameters of the same checkpoint. Each function takes a manifest and returns the one to write,
or refuses and names both values.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isclose
from typing import TYPE_CHECKING, Any

from curate.errors import CurateError
from curate.manifest import CheckpointEntry, LoopEntry, Manifest, ModelEntry, SketchEntry

if TYPE_CHECKING:
    from torch import nn

    from sdi.checkpoints import Checkpoint

_ADVICE = (
    "sketch into another directory (--into), ask for what this run has, or make its sketches again "
    "(curate run … --from sketch)"
)


def spec(manifest: Manifest, model: ModelEntry, loop: LoopEntry, sketch: SketchEntry) -> Manifest:
    """The manifest with these recorded, or refused where the run has other ones."""
    if manifest.model:
        _same("model.fingerprint", manifest.model.fingerprint, model.fingerprint)
        _same("model.parameters", manifest.model.parameters, model.parameters)
    if manifest.loop:
        _same("loop.body", list(manifest.loop.body), list(loop.body))
        _same("loop.tied", manifest.loop.tied, loop.tied)
    if manifest.sketch:
        for key in ("version", "seed", "dim", "store"):
            _same(f"sketch.{key}", getattr(manifest.sketch, key), getattr(sketch, key))
        ours, theirs = manifest.sketch.options, sketch.options
        for key in sorted(set(ours) | set(theirs)):
            _same(f"sketch.{key}", ours.get(key), theirs.get(key))
    known = manifest.loop or loop
    recorded = loop.model_copy(
        update={
            "steps": max(known.steps, loop.steps, key=len),
            "coverage": {**known.coverage, **loop.coverage},
        }
    )
    return manifest.model_copy(update={"model": model, "loop": recorded, "sketch": sketch})


def checkpoint_entry(
    checkpoint: Checkpoint, model: nn.Module, scales: Mapping[str, float] | None
) -> CheckpointEntry:
    """What is recorded of a checkpoint; `model` as it was built, which an adapter is put onto."""
    from sdi.checkpoints import fingerprint

    return CheckpointEntry(
        name=checkpoint.name,
        path=str(checkpoint.path),
        weight=1.0 if checkpoint.weight is None else checkpoint.weight,
        weight_source=checkpoint.weight_source,
        fingerprint=fingerprint(checkpoint.path, model),
        scales=dict(scales or {}),
    )


def checkpoint(manifest: Manifest, entry: CheckpointEntry) -> Manifest:
    """The manifest with the checkpoint in its place, or refused where its contents are others."""
    names = [known.name for known in manifest.checkpoints]
    if entry.name not in names:
        return manifest.model_copy(update={"checkpoints": (*manifest.checkpoints, entry)})
    place = names.index(entry.name)
    known = manifest.checkpoints[place]
    _same(f"checkpoint '{entry.name}'", known.fingerprint, entry.fingerprint)
    for name in sorted(set(known.scales) | set(entry.scales)):
        before, now = (one.scales.get(name, 1.0) for one in (known, entry))
        # Rates read again from a file are the same numbers; only their rounding may not be.
        if not isclose(before, now, rel_tol=1e-6, abs_tol=1e-8):
            _same(f"√(η_p/η̄) of {name} at checkpoint '{entry.name}'", before, now)
    changed = (*manifest.checkpoints[:place], entry, *manifest.checkpoints[place + 1 :])
    return manifest.model_copy(update={"checkpoints": changed})


def steps(
    manifest: Manifest, labels: tuple[str, ...], coverage: dict[str, Any] | None = None
) -> Manifest:
    """The manifest with the labels of the deepest pass seen so far, and what was covered."""
    if manifest.loop is None:
        return manifest
    deepest = max(labels, manifest.loop.steps, key=len)
    loop = manifest.loop.model_copy(
        update={"steps": deepest, "coverage": {**manifest.loop.coverage, **(coverage or {})}}
    )
    return manifest.model_copy(update={"loop": loop})


def _same(what: str, recorded: Any, asked: Any) -> None:
    if recorded != asked:
        raise CurateError(f"the run was made with {what} = {recorded!r}, not {asked!r}: {_ADVICE}")
