"""Which rows are still to be sketched, and in which shards: a function of the manifest alone.

Shards are contiguous ranges of rows, in row order, with boundaries at multiples of the manifest's
`shard_rows` (and wherever a set ended when it was sketched, before it grew). Batches are made
within one shard's range. So a run that was killed, or whose set has grown, makes the same batches
as one that was not, and ends with the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from curate.manifest import Manifest, ShardKind

# A shard is held in memory until it is whole; this bounds its int8 steps.
SHARD_BYTES = 64 * 2**20
MOST_ROWS, FEWEST_ROWS = 2048, 64


@dataclass(frozen=True)
class ShardTask:
    """Rows [first, last) of a set at a checkpoint that go into shard `number`."""

    set: str
    checkpoint: str
    number: int
    first: int
    last: int


def shard_rows(steps: int, dim: int) -> int:
    """How many rows a shard has, for τ = steps and M = dim."""
    return max(FEWEST_ROWS, min(MOST_ROWS, SHARD_BYTES // (steps * dim)))


def stored_kinds(role: str, *, tied: bool, store: str) -> tuple[ShardKind, ...]:
    """Which sketches a set keeps.

    Untied models need steps only. Queries are resolved by step and need both; training rows need
    totals for scores, and steps (`store="steps"`) for the index and the step matrix.
    """
    if not tied:
        return ("steps",)
    return ("totals",) if role == "train" and store == "totals" else ("steps", "totals")


def tasks(
    manifest: Manifest,
    set_name: str,
    checkpoint: str,
    kinds: Iterable[ShardKind],
    rows_per_shard: int,
) -> list[ShardTask]:
    """The shards of a set at a checkpoint that lack one of `kinds`, in row order."""
    known = manifest.find_shards(set_name, checkpoint, "rows")
    held = {
        kind: {entry.number for entry in manifest.find_shards(set_name, checkpoint, kind)}
        for kind in kinds
    }
    found = [
        ShardTask(set_name, checkpoint, entry.number, *entry.rows)
        for entry in known
        if any(entry.number not in numbers for numbers in held.values())
    ]
    first, rows = (known[-1].rows[1] if known else 0), manifest.sets[set_name].rows
    number = len(known)
    while first < rows:
        last = min(rows, (first // rows_per_shard + 1) * rows_per_shard)
        found.append(ShardTask(set_name, checkpoint, number, first, last))
        first, number = last, number + 1
    return found
