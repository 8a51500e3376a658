"""A run directory of a million generated sketches, for the measurements of `scale`.

Row r is n·(z + b·u) / ‖z + b·u‖ as int8 with one scale: z is noise, u one of `TOPICS` shared
directions, b in 0 to 0.7, and n a norm with heavy tails (lognormal with σ = 1, times ten for a row
in a hundred). The model is tied, so the training side is one total a row; queries have a vector for
each step. Everything follows from the seed.

Letters: N rows, Q queries, τ steps, M sketch dimension.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from curate import atomic
from curate.manifest import (
    CheckpointEntry,
    File,
    LoopEntry,
    ModelEntry,
    SetEntry,
    ShardEntry,
    SketchEntry,
)
from curate.rundir import RunDirectory
from sdi.shards import write_shard
from sdi.sketch.quantize import quantize

TOPICS = 8
QUERIES, STEPS = 64, 8
SHARD_ROWS = 2048
CHECKPOINT = "last"
VERSION = 2
"""Of what is generated; another one where that changes."""
DEVIATION = 44.0
"""Of the noise, in int8 units: the largest that `_rows` draws is then 127."""


def make(path: Path, rows: int, dim: int, seed: int = 0) -> RunDirectory:
    """The run at `path`, made unless it is there whole."""
    if (path / "manifest.json").exists():
        run = RunDirectory.open(path)
        if "query" in run.manifest.sets:
            return run
        raise SystemExit(f"{path} was left unfinished; remove it and run this again")
    path.parent.mkdir(parents=True, exist_ok=True)
    run = RunDirectory.create(path)
    labels = tuple(str(number + 1) for number in range(STEPS))
    run.settle(
        ModelEntry(fingerprint="generated", parameters=1),
        LoopEntry(body=("body",), tied=True, steps=labels),
        SketchEntry(version=1, seed=seed, dim=dim),
    )
    run.settle_checkpoint(
        CheckpointEntry(
            name=CHECKPOINT, path="", weight=1.0, weight_source="generated", fingerprint="generated"
        )
    )
    directions = np.random.default_rng([seed, 1]).normal(size=(TOPICS, dim)).astype(np.float32)
    shards = [*_train(run, rows, directions, seed), _queries(run, directions, seed)]
    _add_set(run, "train", rows)
    run.add_shards(tuple(shards))
    _add_set(run, "query", QUERIES)
    return run


def _train(
    run: RunDirectory, rows: int, directions: npt.NDArray[np.float32], seed: int
) -> Iterator[ShardEntry]:
    directory = run.sketches_directory("train", CHECKPOINT)
    for number, start in enumerate(range(0, rows, SHARD_ROWS)):
        count = min(SHARD_ROWS, rows - start)
        random = np.random.default_rng([seed, 2, number])
        values = _rows(random, np.arange(start, start + count) % TOPICS, directions)
        norm = random.lognormal(size=count) * np.where(random.random(count) < 0.01, 10, 1)
        size = np.sqrt(np.square(values, dtype=np.float32).sum(axis=1))
        norm = norm.astype(np.float32)
        written = write_shard(directory, "totals", number, values, norm / size, norm)
        span = (start, start + count)
        yield _entry("train", "totals", number, span, written.files)
        yield _entry("train", "rows", number, span, _measured(directory, number, random, count))


def _rows(
    random: np.random.Generator, topic: npt.NDArray[Any], directions: npt.NDArray[np.float32]
) -> npt.NDArray[np.int8]:
    """int8 (rows, M): noise from a table of 256 normal quantiles, and a share of a direction; the
    largest entry is 127, as a sketch's always is.
    """
    from statistics import NormalDist

    quantile = NormalDist(0, DEVIATION).inv_cdf
    table = np.array([quantile((byte + 0.5) / 256) for byte in range(256)], dtype=np.float32)
    dim = directions.shape[1]
    noise = np.frombuffer(random.bytes(len(topic) * dim), dtype=np.uint8)
    values = table[noise].reshape(len(topic), dim)
    share = DEVIATION * random.uniform(0, 0.7, size=len(topic)).astype(np.float32)
    values += share[:, None] * directions[topic]
    np.rint(values, out=values)
    ints = np.clip(values, -127, 127, out=values).astype(np.int8)
    largest = np.abs(ints).argmax(axis=1)[:, None]
    signs = np.sign(np.take_along_axis(ints, largest, axis=1))
    np.put_along_axis(ints, largest, 127 * signs, axis=1)
    return ints


def _measured(
    directory: Path, number: int, random: np.random.Generator, count: int
) -> dict[str, str]:
    """Loss and depth of a shard's rows, as sketching leaves them."""
    found = {}
    columns = {
        "loss": random.gamma(4.0, 0.5, size=count).astype(np.float32),
        "depth": np.full(count, STEPS, dtype=np.int32),
    }
    for name, column in columns.items():
        path = directory / f"{name}-{number:05d}.npy"
        np.save(path, column)
        found[path.name] = atomic.sha256(path)
    return found


def _queries(run: RunDirectory, directions: npt.NDArray[np.float32], seed: int) -> ShardEntry:
    """Query vectors that grow with the step and lie nearer to a topic in the later ones."""
    random = np.random.default_rng([seed, 3])
    dim = directions.shape[1]
    values = random.normal(size=(QUERIES, STEPS, dim)).astype(np.float32)
    share = np.linspace(0, 0.8, STEPS, dtype=np.float32)[None, :, None]
    values += share * directions[np.arange(QUERIES) % TOPICS][:, None]
    values *= (1.5 ** np.arange(STEPS, dtype=np.float32))[None, :, None] / np.sqrt(dim)
    ints, scale = quantize(values)
    norm = np.linalg.norm(values, axis=2).astype(np.float32)
    directory = run.sketches_directory("query", CHECKPOINT)
    written = write_shard(directory, "steps", 0, ints, scale, norm)
    return _entry("query", "steps", 0, (0, QUERIES), written.files)


def _entry(
    set_name: str, kind: Any, number: int, span: tuple[int, int], files: dict[str, str]
) -> ShardEntry:
    return ShardEntry(
        set=set_name,
        checkpoint=CHECKPOINT,
        kind=kind,
        number=number,
        rows=span,
        steps=STEPS,
        files=files,
    )


def _add_set(run: RunDirectory, name: str, rows: int) -> None:
    """The set's table alone: nothing here reads tokens."""
    parts: list[File] = []
    for number, start in enumerate(range(0, rows, 131_072)):
        stop = min(start + 131_072, rows)
        path = run.examples_directory(name) / f"part-{number:05d}.parquet"
        parts.append(run.write_table(path, _examples(name, start, stop), (start, stop)))
    entry = SetEntry(
        role="train" if name == "train" else "query",
        rows=rows,
        parts=tuple(parts),
        fingerprint="generated",
    )
    run.update(lambda m: m.model_copy(update={"sets": {**m.sets, name: entry}}))


def _examples(name: str, start: int, stop: int) -> pl.DataFrame:
    """The columns that loading makes, with about 150 letters of text a row."""
    row = np.arange(start, stop)
    ids = [f"{name}-{number:07d}" for number in row]
    hashes = [hashlib.sha256(text.encode()).hexdigest() for text in ids]
    return pl.DataFrame(
        {
            "row": row,
            "source_row": row,
            "id": ids,
            "source": [f"source {number % TOPICS}" for number in row],
            "tokens": pl.Series((row % 97 + 20).astype(np.int32)),
            "tokens_full": pl.Series((row % 97 + 20).astype(np.int32)),
            "targets": pl.Series((row % 97 + 19).astype(np.int32)),
            "truncated": np.zeros(stop - start, dtype=bool),
            "content_hash": hashes,
            "token_hash": hashes,
            "text": [f"The answer to question {number} is {number * number}. {own} {own[:40]}"
                     for number, own in zip(row, hashes, strict=True)],
            "topic": [f"topic {number % TOPICS}" for number in row],
        }
    )  # fmt: skip
