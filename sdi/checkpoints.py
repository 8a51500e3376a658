"""Checkpoints: find them, weigh them, and put their weights into a model without running code.

A checkpoint is a ``.safetensors`` file, a ``.pt``/``.pth``/``.bin``/``.ckpt`` file, or a directory
as Hugging Face, PEFT, torch.distributed.checkpoint or FSDP write it. Pickles are read with
``weights_only=True`` and nothing else. Loading is strict: everything is compared first, and the
model is written to only if all of it fits.

A checkpoint's weight η is its learning rate unless given (see ``sdi.learning_rates``).
"""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from glob import glob
from pathlib import Path

import torch
from torch import Tensor, nn

from sdi.adapters import Adapter, adapted, base_digest, base_weights, is_adapter, note_loaded
from sdi.errors import CheckpointError
from sdi.fitting import canonical_name, fit, targets_of
from sdi.learning_rates import Recorded, learning_rate, recorded_rates, summary
from sdi.shards import file_sha256
from sdi.weight_files import (
    SHARDED,
    NoWeightsError,
    read_weights,
    unpickled_suffix,
    weight_files,
)

__all__ = [
    "Checkpoint",
    "base_weights",
    "canonical_name",
    "find_checkpoints",
    "fingerprint",
    "is_adapter",
    "learning_rate",
    "load_weights",
    "settle_weights",
]

ABSENT = "absent: taken as 1"
GIVEN = "given"


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint of a model.

    Attributes:
        name: unique within a run, safe as a file name; the sketch's hashes depend on it.
        path: file or directory.
        weight: η, or None where it is not known.
        weight_source: where η comes from, for people to read.
        recorded: the learning rates of parameter groups, where these differ and no weight was
            given; `sdi.parameter_rates.settle_rates` says whose they are.
        rates: parameter name → learning rate, settled; empty where there is one rate.
    """

    name: str
    path: Path
    weight: float | None
    weight_source: str
    recorded: Recorded | None = None
    rates: tuple[tuple[str, float], ...] = ()


def fingerprint(path: Path | str, model: nn.Module | None = None) -> str:
    """Return the sha256 (hex) of a checkpoint's weights: of the file, or of a directory's.

    For a directory it covers names and contents of its weight files, so optimizer states and logs
    may come and go. An adapter is nothing without its base, so that is covered too: the directory
    that the adapter names or, where that is not there, the weights of `model`.

    Raises:
        CheckpointError: no weights there.
    """
    path = Path(path)
    if is_adapter(path) and path.is_file():
        path = path.parent  # its settings count too
    files = weight_files(path)
    if path.is_file():
        return file_sha256(path)
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{file_sha256(file)}\n".encode())
    if is_adapter(path):
        base = Adapter.read(path).base
        if base is not None:
            digest.update(f"base\0{fingerprint(base)}\n".encode())
        elif model is not None:
            digest.update(f"base\0{base_digest(model)}\n".encode())
    return digest.hexdigest()


def load_weights(
    model: nn.Module, path: Path | str, *, base: Mapping[str, Tensor] | None = None
) -> None:
    """Copy a checkpoint's weights into the model, in place, in the model's own dtype and device.

    Names are compared in canonical form. A name the checkpoint lacks is fine where the model ties
    it to one that is there. An adapter (PEFT, LoRA) goes onto its base: into a model that has the
    adapter's own parameters, or merged into the weights of one that has not. The base is the
    directory that the adapter names, else `base`, else the weights that the model has now.

    Args:
        model: its parameters and persistent buffers are overwritten; nothing else is.
        path: a file or a directory.
        base: the weights below an adapter (`base_weights` of the model as it was built); needed
            where several adapters are merged into one model in turn.

    Raises:
        CheckpointError: unreadable, or missing, unexpected or misshapen tensors (all listed), or an
            adapter that cannot be merged; the model is then as it was.
    """
    path = Path(path)
    targets = targets_of(model)
    if is_adapter(path):
        values = adapted(model, Adapter.read(path), targets, base)
    else:
        values = fit(model, read_weights(path), targets, str(path))
    with torch.no_grad():
        for name, value in values.items():
            # .data leaves version counters and requires_grad out of it.
            targets[name].data.copy_(value)
    note_loaded(model, merged=is_adapter(path))


def find_checkpoints(
    paths: Path | str | Mapping[str, object] | Sequence[Path | str | Mapping[str, object]],
) -> tuple[Checkpoint, ...]:
    """Resolve paths to checkpoints with weights, in order (numbers in names in natural order).

    Args:
        paths: one or several of: a file, a directory, a directory of checkpoints, a glob, or a
            mapping with ``path`` and optionally ``weight`` (η) and ``name``.

    Raises:
        CheckpointError: nothing found, two of one name, or weights that cannot be meant.
    """
    entries = [paths] if isinstance(paths, (str, Path, Mapping)) else list(paths)
    found = [checkpoint for entry in entries for checkpoint in _resolve(entry)]
    if not found:
        raise CheckpointError("no checkpoints were given; expected at least one file or directory")
    return settle_weights(_named_apart(found))


def settle_weights(checkpoints: Iterable[Checkpoint]) -> tuple[Checkpoint, ...]:
    """Return the checkpoints with a weight each: absent is 1, said aloud; zero warns.

    Raises:
        CheckpointError: a negative or non-finite weight, all weights zero, or a weight absent
            where other checkpoints' learning rates are known (a 1 would drown those).
    """
    checkpoints = tuple(checkpoints)
    absent = [c.name for c in checkpoints if c.weight is None]
    read = [c for c in checkpoints if c.weight is not None and c.weight_source != GIVEN]
    if absent and read:
        raise CheckpointError(
            f"no learning rate was found for {', '.join(absent)}, but {read[0].name} has "
            f"{read[0].weight:g} ({read[0].weight_source}); a weight of 1 would drown it. "
            "Give every checkpoint a weight"
        )
    if absent:
        warnings.warn(
            f"no learning rate was found for {', '.join(absent)}: the checkpoint weight is taken "
            "as 1; give `weight` to say otherwise",
            stacklevel=2,
        )
    settled = tuple(
        replace(c, weight=1.0, weight_source=ABSENT) if c.weight is None else c for c in checkpoints
    )
    _check_zero(settled)
    return settled


def _check_zero(checkpoints: tuple[Checkpoint, ...]) -> None:
    for c in checkpoints:
        if c.weight is None or not math.isfinite(c.weight) or c.weight < 0:
            raise CheckpointError(
                f"checkpoint {c.name} has weight {c.weight} ({c.weight_source}); expected a "
                "finite number, 0 or larger"
            )
    zero = [c.name for c in checkpoints if c.weight == 0]
    if zero and len(zero) == len(checkpoints):
        raise CheckpointError(
            f"every checkpoint has weight 0 ({', '.join(zero)}), so every influence would be 0; "
            "give at least one a positive weight"
        )
    if zero:
        warnings.warn(
            f"checkpoints with weight 0 count for nothing: {', '.join(zero)}; give `weight`, or "
            "leave them out",
            stacklevel=3,
        )


def _resolve(entry: Path | str | Mapping[str, object]) -> list[Checkpoint]:
    """Return the checkpoints that one entry stands for."""
    options: Mapping[str, object] = entry if isinstance(entry, Mapping) else {"path": entry}
    unknown = sorted(set(options) - {"path", "weight", "name"})
    if unknown or "path" not in options:
        raise CheckpointError(
            f"a checkpoint entry has {sorted(options)}; expected path, and optionally weight, name"
        )
    text, weight, name = str(options["path"]), options.get("weight"), options.get("name")
    places = [Path(text)]
    if not places[0].exists():
        # Path.glob takes no absolute pattern.
        places = [Path(match) for match in glob(text, recursive=True)]  # noqa: PTH207
    found = [place for path in sorted(places, key=_natural) for place in _expand(path)]
    if not found:
        raise CheckpointError(
            f"no checkpoint at {text}; expected a .safetensors, .pt or .bin file, a directory with "
            "model.safetensors, or a directory or glob of such"
        )
    if name is not None and len(found) > 1:
        raise CheckpointError(f"{text} is {len(found)} checkpoints; one name cannot serve for all")
    return [_checkpoint(path, weight, None if name is None else str(name)) for path in found]


def _checkpoint(path: Path, weight: object, name: str | None) -> Checkpoint:
    safe = _file_safe(name or _default_name(path))
    if weight is None:
        recorded = recorded_rates(path)
        differ = recorded is not None and len(recorded.rates) > 1
        return Checkpoint(safe, path, *summary(recorded), recorded=recorded if differ else None)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)):
        raise CheckpointError(f"checkpoint {safe} has weight {weight!r}; expected a number")
    return Checkpoint(safe, path, float(weight), GIVEN)


def _file_safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or "checkpoint"


def _default_name(path: Path) -> str:
    # Not resolved: a hub cache links model.safetensors to a blob named by its hash.
    path = path.absolute()
    generic = path.stem in ("model", "pytorch_model", "adapter_model", "weights")
    if path.name == SHARDED or (path.is_file() and generic):
        return path.parent.name
    return unpickled_suffix(path)


def _expand(path: Path) -> list[Path]:
    """Return the path itself if it is a checkpoint, else the checkpoints right inside it."""
    try:
        files = weight_files(path)
        # A lone step-100.safetensors keeps its own name, so that it has the same one (and the
        # same sketch) once step-200.safetensors has joined it.
        numbered = len(files) == 1 and any(letter.isdigit() for letter in files[0].stem)
        return [files[0]] if numbered else [path]
    except NoWeightsError:
        if not path.is_dir():
            return []
    inside = []
    for child in sorted(path.iterdir(), key=_natural):
        try:
            weight_files(child)
            inside.append(child)
        except NoWeightsError:
            continue
    return inside


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sort key that puts step-200 before step-1000."""
    pieces = re.findall(r"\d+|\D+", str(path))
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in pieces]


def _named_apart(checkpoints: list[Checkpoint]) -> list[Checkpoint]:
    """Put the directory before names that clash; refuse those that still do."""
    names = [c.name for c in checkpoints]
    apart = [
        c
        if names.count(c.name) == 1
        else replace(c, name=_file_safe(f"{c.path.absolute().parent.name}-{c.name}"))
        for c in checkpoints
    ]
    renamed = [c.name for c in apart]
    for c in apart:
        if renamed.count(c.name) > 1:
            raise CheckpointError(
                f"two checkpoints are named {c.name} ({c.path}); give each a `name` of its own, or "
                "list it once"
            )
    return apart
