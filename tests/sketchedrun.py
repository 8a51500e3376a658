"""A run directory of generated sketches, with the float64 vectors that were written."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from curate.examples import load_examples
from curate.manifest import CheckpointEntry, LoopEntry, ModelEntry, ShardEntry, SketchEntry
from curate.rundir import RunDirectory
from curate.sources import DataSpec
from sdi.shards import write_shard
from sdi.sketch.quantize import dequantize, quantize

Doubles = npt.NDArray[np.float64]


@dataclass
class Made:
    """The run, and by (set, checkpoint): values (N, τ, M), totals (N, M), and their norms."""

    run: RunDirectory
    values: dict[tuple[str, str], Doubles] = field(default_factory=dict)
    totals: dict[tuple[str, str], Doubles] = field(default_factory=dict)
    norms: dict[tuple[str, str], Doubles] = field(default_factory=dict)
    total_norms: dict[tuple[str, str], Doubles] = field(default_factory=dict)


WEIGHTS = {"a": 0.5, "b": 0.25}


def make(
    path: Path,
    *,
    rows: int = 41,
    queries: int = 7,
    steps: int = 4,
    dim: int = 64,
    tied: bool = True,
    depths: tuple[int, ...] | None = None,
    scale: float = 1e-3,
    shard_rows: int = 16,
) -> Made:
    """A run of two checkpoints, sets "train" and "test"; `depths` are those of the queries."""
    path.parent.mkdir(parents=True, exist_ok=True)
    run = RunDirectory.create(path)
    labels = tuple(str(n + 1) for n in range(steps))
    run.settle(
        ModelEntry(fingerprint="m", parameters=1),
        LoopEntry(body=("body",), tied=tied, steps=labels),
        SketchEntry(version=1, seed=0, dim=dim),
    )
    for name, weight in WEIGHTS.items():
        run.settle_checkpoint(
            CheckpointEntry(
                name=name, path=name, weight=weight, weight_source="test", fingerprint=name
            )
        )
    made = Made(run)
    for set_name, count in (("train", rows), ("test", queries)):
        _add_set(run, set_name, count, path.parent)
        own = depths if set_name == "test" and depths else (steps,) * count
        for number, checkpoint in enumerate(WEIGHTS):
            seed = 10 * number + (set_name == "test")
            _add_sketches(made, set_name, checkpoint, seed, own, steps, dim, scale, shard_rows)
    return made


def _add_set(run: RunDirectory, name: str, count: int, folder: Path) -> None:
    file = folder / f"{name}.jsonl"
    rows = (
        {"id": f"{name}{n}", "text": f"{name} {n}", "source": "ab"[n % 2], "topic": "xyx"[n % 3]}
        for n in range(count)
    )
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = DataSpec.of(
        {
            "path": str(file),
            "text": "text",
            "id": "id",
            "source": "source",
            "columns": ["topic"],
            "role": "train" if name == "train" else "query",
        }
    )
    run.add_set(load_examples(spec, run.stage(name), name=name))


def _add_sketches(
    made: Made,
    set_name: str,
    checkpoint: str,
    seed: int,
    depths: tuple[int, ...],
    steps: int,
    dim: int,
    scale: float,
    shard_rows: int,
) -> None:
    random = np.random.default_rng(seed)
    floats = random.normal(size=(len(depths), steps, dim)) * random.lognormal(
        size=(len(depths), 1, 1)
    )
    floats *= scale * 1.5 ** np.arange(steps)[None, :, None]
    floats[np.arange(steps)[None, :] >= np.array(depths)[:, None]] = 0
    floats = floats.astype(np.float32)
    key = (set_name, checkpoint)
    kept: dict[str, list[Doubles]] = {"steps": [], "totals": []}
    norms: dict[str, list[Doubles]] = {"steps": [], "totals": []}
    directory = made.run.sketches_directory(set_name, checkpoint)
    for number, start in enumerate(range(0, len(depths), shard_rows)):
        part = floats[start : start + shard_rows]
        for kind, values in (("steps", part), ("totals", part.sum(axis=1))):
            ints, scales = quantize(values)
            norm = np.linalg.norm(values, axis=-1).astype(np.float32)
            written = write_shard(directory, kind, number, ints, scales, norm)
            made.run.add_shard(
                ShardEntry(
                    set=set_name,
                    checkpoint=checkpoint,
                    kind=kind,
                    number=number,
                    rows=(start, start + len(part)),
                    steps=steps,
                    files=written.files,
                )
            )
            kept[kind].append(dequantize(ints, scales).astype(np.float64))
            norms[kind].append(norm.astype(np.float64))
    made.values[key] = np.concatenate(kept["steps"])
    made.totals[key] = np.concatenate(kept["totals"])
    made.norms[key] = np.concatenate(norms["steps"])
    made.total_norms[key] = np.concatenate(norms["totals"])
