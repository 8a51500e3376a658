"""Sketches read by any rows and slots, from shards of unequal depth."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from curate import blocks
from curate.blocks import SketchRows, open_rows
from curate.errors import CurateError
from curate.manifest import SketchEntry
from sdi.shards import Shard
from tests.sketchedrun import make

DIM = 5


def source(depths: tuple[int, ...], rows: int = 4, dim: int = DIM) -> SketchRows:
    """A shard of `rows` rows for each of `depths`; 0 is one of totals, without an axis of steps."""
    random = np.random.default_rng(0)
    pieces = []
    for number, depth in enumerate(depths):
        shape = (rows, depth) if depth else (rows,)
        shard = Shard(
            random.integers(1, 128, (*shape, dim), dtype=np.int8),
            random.random(shape, dtype=np.float32) + 1,
            random.random(shape, dtype=np.float32) + 1,
        )
        pieces.append((number * rows, (number + 1) * rows, shard))
    return SketchRows(pieces, rows * len(depths), "made")


@pytest.mark.parametrize("few", [0, 1000])
@pytest.mark.parametrize("depths", [(1,), (0, 0), (3,), (1, 3), (2, 1, 3)])
def test_taken_rows_are_those_that_are_read(
    depths: tuple[int, ...], few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any rows, whole or one slot of each, are those of a reading in order, taken shard by shard
    or one by one; a slot that a row does not have is zeros, where the whole checkpoint has one slot
    only as well.
    """
    monkeypatch.setattr(blocks, "FEW", few)
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


@pytest.mark.parametrize("depths", [(1,), (0, 0), (3,), (1, 3), (2, 1, 3)])
def test_places_lead_to_the_same(depths: tuple[int, ...]) -> None:
    """What lies at an address is what is taken; there is none where a row has no such slot, or
    there is no such row.
    """
    rows = source(depths)
    for count in (0, 1, 40):
        wanted = np.random.default_rng(1).integers(0, rows.rows, count)
        slots = np.arange(count) % 4
        values, scales = rows.vectors(wanted, slots)
        found = zip(values[:, 0], scales[:, 0], *rows.places(wanted, slots), strict=True)
        for value, scale, place, scaled in found:
            if place:
                at = (ctypes.c_int8 * DIM).from_address(int(place))
                assert list(at) == value.tolist()
                assert ctypes.c_float.from_address(int(scaled)).value == scale
            else:
                assert not scaled and not value.any()
    for row in (-1, rows.rows):
        with pytest.raises(IndexError, match=f"of {rows.rows}"):
            rows.places(np.array([0, row]), np.zeros(2, np.int64))


def test_shards_that_are_not_what_is_listed() -> None:
    """Too few rows, or of another dimension, are refused before anything reads beyond them."""
    pieces = source((1, 1))._pieces
    short = [pieces[0], (4, 9, pieces[1][2])]
    with pytest.raises(CurateError, match="rows 4 to 9 holds 4 sketches of M = 5, expected 5 of 5"):
        SketchRows(short, 9, "made")
    other = pieces[1][2]
    wide = Shard(np.zeros((4, 1, DIM + 1), np.int8), other.scale, other.norm)
    with pytest.raises(CurateError, match="holds 4 sketches of M = 6, expected 4 of 5"):
        SketchRows([pieces[0], (4, 8, wide)], 8, "made")


def test_sketches_of_another_dimension(tmp_path: Path) -> None:
    """Than the run's are refused: two checkpoints' would not add up."""
    run = make(tmp_path / "run").run
    assert open_rows(run, "train", "a", "totals").dim == 64
    run.note(sketch=SketchEntry(version=1, seed=0, dim=32))
    with pytest.raises(CurateError, match=r"checkpoint 'a' have M = 64, expected 32"):
        open_rows(run, "train", "a", "totals")


@pytest.mark.parametrize(
    ("start", "stop", "size", "expected"),
    [
        (0, 12, 8, [(0, 4), (4, 8), (8, 12)]),  # shards of half a range: each by itself
        (0, 12, 3, [(0, 3), (3, 4), (4, 7), (7, 8), (8, 11), (11, 12)]),
        (0, 12, 9, [(0, 8), (8, 12)]),  # smaller shards are read together
        (0, 12, 100, [(0, 12)]),
        (3, 11, 8, [(3, 8), (8, 11)]),
        (5, 7, 1, [(5, 6), (6, 7)]),
        (4, 4, 8, []),
    ],
)
def test_ranges_keep_to_shards(
    start: int, stop: int, size: int, expected: list[tuple[int, int]]
) -> None:
    """Ranges follow one another to the end, none too long, and end with a shard that fills half of
    one; within a shard they are read without a copy.
    """
    rows = source((2, 2, 2))
    assert rows.spans(start, stop, size) == expected
    for first, last in expected:
        whole = rows._plain[first // 4]
        within = first // 4 == (last - 1) // 4
        assert np.shares_memory(rows.read(first, last).values, whole.values) == within


def test_torch_is_not_loaded_for_what_filters_read() -> None:
    """It takes a second, which a command that multiplies nothing does not wait for."""
    code = "import sys, curate.scratch, curate.profile; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
