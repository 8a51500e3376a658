"""Sketches read by any rows and slots, from shards of unequal depth."""

from __future__ import annotations

import numpy as np
import pytest

from curate.blocks import SketchRows
from sdi.shards import Shard

DIM = 5


def source(depths: tuple[int, ...], rows: int = 4) -> SketchRows:
    """A shard of `rows` rows for each of `depths`; 0 is one of totals, without an axis of steps."""
    random = np.random.default_rng(0)
    pieces = []
    for number, depth in enumerate(depths):
        shape = (rows, depth) if depth else (rows,)
        shard = Shard(
            random.integers(1, 128, (*shape, DIM), dtype=np.int8),
            random.random(shape, dtype=np.float32) + 1,
            random.random(shape, dtype=np.float32) + 1,
        )
        pieces.append((number * rows, (number + 1) * rows, shard))
    return SketchRows(pieces, rows * len(depths), "made")


@pytest.mark.parametrize("depths", [(1,), (0, 0), (3,), (1, 3), (2, 1, 3)])
def test_taken_rows_are_those_that_are_read(depths: tuple[int, ...]) -> None:
    """Any rows, whole or one slot of each, are those of a reading in order; a slot that a row does
    not have is zeros, where the whole checkpoint has one slot only as well.
    """
    rows = source(depths)
    wanted = np.random.default_rng(1).integers(0, rows.rows, 40)
    slots = np.arange(40) % 4
    whole, single = rows.take(wanted), rows.take(wanted, slots)
    for place, (row, slot) in enumerate(zip(wanted.tolist(), slots.tolist(), strict=True)):
        read = rows.read(row, row + 1)
        for name in ("values", "scale", "norm"):
            one = getattr(read, name)[0]
            np.testing.assert_array_equal(getattr(whole, name)[place], one)
            expected = one[slot] if slot < rows.slots else np.zeros_like(one[0])
            np.testing.assert_array_equal(getattr(single, name)[place, 0], expected)
    assert single.values.shape == (40, 1, DIM)
