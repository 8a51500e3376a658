"""One shard while it is being filled, batch by batch, and how it becomes files of the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from curate import atomic
from curate.manifest import ShardEntry, ShardKind
from sdi.shards import KINDS, write_shard
from sdi.sketch.quantize import quantize

if TYPE_CHECKING:
    from torch import Tensor

    from curate.shardplan import ShardTask
    from sdi.part import Part


class ShardBuffer:
    """Quantised sketches of the rows [first, last) of a task; τ grows to the deepest batch seen.

    Steps that a row does not have keep scale and norm 0.
    """

    def __init__(self, task: ShardTask, kinds: tuple[ShardKind, ...]) -> None:
        self._task = task
        rows = task.last - task.first
        self._stores: dict[str, _Store] = {kind: _Store(rows) for kind in kinds}
        self.loss = np.full(rows, np.nan, np.float32)
        self.depth = np.zeros(rows, np.int32)
        self.labels: tuple[str, ...] = ()

    def put(self, rows: NDArray[np.int64], part: Part) -> None:
        """Quantise a batch's vectors, (B, τ, M), and put them at their rows' places."""
        places = rows - self._task.first
        if len(part.steps) > len(self.labels):
            self.labels = part.steps
        self.loss[places] = part.losses.detach().float().cpu().numpy()
        self.depth[places] = len(part.steps)
        if "steps" in self._stores:
            self._stores["steps"].put(places, part.values, part.norms)
        if "totals" in self._stores:
            totals = part.totals
            self._stores["totals"].put(places, totals, totals.norm(dim=-1))

    def write(self, directory: Path) -> tuple[ShardEntry, ...]:
        """Write everything under `directory` and return what the manifest is to list."""
        number = self._task.number
        entries = []
        for kind in KINDS:
            if store := self._stores.get(kind):
                written = write_shard(
                    directory, kind, number, store.values, store.scale, store.norm
                )
                entries.append(self._entry(kind, written.files))
        files = dict(
            _save(directory / f"{name}-{number:05d}.npy", array)
            for name, array in (("loss", self.loss), ("depth", self.depth))
        )
        return (*entries, self._entry("rows", files))

    def _entry(self, kind: ShardKind, files: dict[str, str]) -> ShardEntry:
        task = self._task
        return ShardEntry(
            set=task.set,
            checkpoint=task.checkpoint,
            kind=kind,
            number=task.number,
            rows=(task.first, task.last),
            steps=len(self.labels),
            files=files,
        )


class _Store:
    """int8 values (rows, ..., M), float32 scale and norm (rows, ...) of one kind of sketch."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self.values: NDArray[np.int8] = np.zeros((0, 0, 0), np.int8)
        self.scale: NDArray[np.float32] = np.zeros((0, 0), np.float32)
        self.norm = self.scale

    def put(self, places: NDArray[np.int64], values: Tensor, norms: Tensor) -> None:
        """Place a batch's vectors (B, ..., M) and norms (B, ...)."""
        stored, scale = quantize(values)
        if not self.values.size:
            self._allocate(stored.shape[1:])
        if stored.ndim == 3 and stored.shape[1] > self.values.shape[1]:
            self._deepen(stored.shape[1])
        into: Any = places if stored.ndim == 2 else (places, slice(0, stored.shape[1]))
        self.values[into] = stored.cpu().numpy()
        self.scale[into] = scale.cpu().numpy()
        self.norm[into] = norms.detach().float().cpu().numpy()

    def _allocate(self, shape: Sequence[int]) -> None:
        self.values = np.zeros((self._rows, *shape), np.int8)
        self.scale = np.zeros((self._rows, *shape[:-1]), np.float32)
        self.norm = np.zeros_like(self.scale)

    def _deepen(self, steps: int) -> None:
        more = steps - self.values.shape[1]
        self.values = np.pad(self.values, ((0, 0), (0, more), (0, 0)))
        self.scale = np.pad(self.scale, ((0, 0), (0, more)))
        self.norm = np.pad(self.norm, ((0, 0), (0, more)))


def _save(path: Path, array: NDArray[np.generic]) -> tuple[str, str]:
    atomic.write_array(path, array)
    return path.name, atomic.sha256(path)
