"""Products of stored sketches with vectors: exact in integers, float32 elsewhere, in order."""

from __future__ import annotations

import ctypes
from contextlib import closing

import numpy as np
import pytest
import torch

from curate import multiply
from curate.multiply import Operand, digits_of
from curate.workers import in_order
from sdi import team
from sdi.sketch.quantize import quantize

CPU = torch.device("cpu")


def sketches(count: int, dim: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Stored sketches and their scales."""
    random = np.random.default_rng(seed)
    return quantize(random.normal(size=(count, dim)).astype(np.float32))


def test_stored_sketches_are_multiplied_exactly() -> None:
    """A query's own sketch takes one digit, and its products with others are those of integers."""
    rows, _ = sketches(50, 640)
    query, scale = sketches(300, 640, seed=1)
    values = query.astype(np.float32) * scale[:, None]
    digits, _ = digits_of(values)
    np.testing.assert_array_equal(digits, query)
    expected = (rows.astype(np.int64) @ query.T.astype(np.int64)) * scale.astype(np.float64)
    found = Operand.of(values, CPU).times(multiply.as_tensor(rows)).numpy()
    exact = multiply.exact_integers()
    near = 0 if exact else 1e-6 * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=2e-7 if exact else 1e-5, atol=near)


@pytest.mark.parametrize("integers", [True, False])
def test_any_vectors(integers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors of any size keep the accuracy of float32, zero vectors and extreme rows included."""
    if integers and not multiply.exact_integers():
        pytest.skip("this processor has no fast exact int8 products")
    monkeypatch.setattr(multiply, "exact_integers", lambda: integers)
    rows = np.concatenate([sketches(30, 300)[0], np.full((2, 300), 127, np.int8)])
    rows[-1] = -127
    values = np.random.default_rng(2).normal(size=(9, 300)) * 10.0 ** np.arange(-4, 5)[:, None]
    values[4] = 0
    operand = Operand.of(values, CPU)
    expected = rows.astype(np.float64) @ values.T
    size = np.linalg.norm(rows.astype(np.float64), axis=1)[:, None] * np.linalg.norm(values, axis=1)
    error = np.abs(operand.times(torch.from_numpy(rows)).numpy() - expected)
    assert (error <= 1e-6 * size).all()
    which = torch.tensor([8, 0, 4])
    some = operand.some(which).times(torch.from_numpy(rows)).numpy()
    assert (np.abs(some - expected[:, which]) <= 1e-6 * size[:, which]).all()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("rows", "count"), [(64, 1), (65, 33), (128, 5), (300, 40)])
@pytest.mark.parametrize("dim", [64, 448, 576, 1088, 600])
def test_products_in_tiles_are_exact(dim: int, rows: int, count: int, threads: int) -> None:
    """A kernel multiplies as torch does, in whole numbers, also the extreme ones; of rows that are
    apart only their own numbers are read.
    """
    if not multiply.exact_integers():
        pytest.skip("this processor has no fast exact int8 products")
    stored = np.stack([sketches(rows, dim)[0], np.full((rows, dim), 99, np.int8)], axis=1)
    stored[-1, 0], stored[0, 0] = 127, -127
    query, _ = sketches(count, dim, seed=1)
    query[0] = 127
    expected = stored[:, 0].astype(np.int64) @ query.T.astype(np.int64)
    operand = Operand.of(query.astype(np.float32), CPU)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = operand.products(torch.from_numpy(stored)[:, 0], tiled=True)
    finally:
        torch.set_num_threads(before)
    assert found.shape[0] == rows
    np.testing.assert_array_equal(found[:, :count].numpy(), expected)
    other = operand.some(torch.tensor([count - 1, 0]))
    some = other.products(torch.from_numpy(stored)[:, 0], tiled=True)
    np.testing.assert_array_equal(some[:, :2].numpy(), expected[:, [count - 1, 0]])


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize("dim", [64, 600])
def test_bytes_as_faiss_stores_them(
    dim: int, integers: bool, tiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was added to a byte does not count, whatever multiplies."""
    if integers and not multiply.exact_integers():
        pytest.skip("this processor has no fast exact int8 products")
    monkeypatch.setattr(multiply, "exact_integers", lambda: integers)
    rows, query = sketches(70, dim)[0], sketches(3, dim, seed=1)[0]
    rows[0], rows[1] = 127, -128
    stored = torch.from_numpy((rows.astype(np.int16) + multiply.OFFSET).astype(np.uint8))
    before = stored.clone()
    operand = Operand.of(query.astype(np.float32), CPU)
    found = operand.products(stored, tiled=tiled)[:, :3].double()
    expected = rows.astype(np.int64) @ query.T.astype(np.int64)
    np.testing.assert_array_equal(found * (operand.scale if integers else 1), expected)
    assert torch.equal(stored, before)


def test_room_that_is_kept_serves_inside_and_outside_of_inference_mode() -> None:
    """Products are written over the last ones, whether or not these were made for inference."""
    rows = torch.from_numpy(sketches(8, 128)[0])
    operand = Operand.of(np.ones((3, 128), np.float32), CPU)
    team._kept.__dict__.clear()
    with torch.inference_mode():
        first = operand.times(rows)
    assert torch.equal(operand.times(rows), first)


@pytest.mark.parametrize("count", [1, 2, 10, 16, 17])
@pytest.mark.parametrize("rows", [0, 1, 7, 50])
def test_rows_are_widened_in_stretches(
    rows: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without integer products rows become float32 a few at a time, whatever number of columns."""
    multiplied: list[tuple[int, ...]] = []
    mm = torch.mm

    def noted(left: torch.Tensor, right: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        multiplied.append((*left.shape, right.shape[1]))
        return mm(left, right, out=out)

    monkeypatch.setattr(torch, "mm", noted)
    monkeypatch.setattr(multiply, "exact_integers", lambda: False)
    monkeypatch.setattr(multiply, "_WIDE", 4 * 7 * 96)
    stored = np.zeros((rows, 2, 96), np.int8)
    stored[:, 1] = sketches(max(rows, 1), 96)[0][:rows]
    values = np.random.default_rng(4).normal(size=(count, 96)).astype(np.float32)
    found = Operand.of(values, CPU).times(torch.from_numpy(stored)[:, 1], torch.float32)
    expected = stored[:, 1].astype(np.float64) @ values.T
    size = np.linalg.norm(stored[:, 1].astype(np.float64), axis=1)[:, None]
    assert found.shape == (rows, count)
    assert (np.abs(found.numpy() - expected) <= 1e-6 * size * np.linalg.norm(values, axis=1)).all()
    assert sum(height for height, _, _ in multiplied) == rows
    assert max(height for height, _, _ in multiplied) <= 7
    assert {width for _, _, width in multiplied} <= {1, 16, 32}


def test_digits_leave_what_float32_leaves() -> None:
    """Three digits hold a vector to 2e-7 of its norm, where the sketch's own error is 1/√M."""
    values = np.random.default_rng(3).normal(size=(5, 4096))
    digits, scale = digits_of(values)
    parts = digits.reshape(3, 5, 4096).astype(np.float64)
    held = (parts[0] + parts[1] / multiply.BASE + parts[2] / multiply.BASE**2) * scale[:, None]
    assert (np.linalg.norm(held - values, axis=1) < 2e-7 * np.linalg.norm(values, axis=1)).all()


@pytest.mark.parametrize("small", [1e-6, 1.4e-5, 7e-6, 2e-3])
def test_small_entries_are_not_dropped(small: float) -> None:
    """Entries far below the largest count where there are many: whichever digits are all zero,
    what is left out is within float32's rounding of the largest.
    """
    values = np.full((1, 64), small)
    values[0, 0] = 1.0
    digits, scale = digits_of(values)
    weights = multiply.BASE ** -np.arange(len(digits), dtype=np.float64)
    held = (weights @ digits.astype(np.float64)) * scale
    assert np.abs(held - values[0]).max() <= 1.2e-7
    rows = torch.full((1, 64), 127, dtype=torch.int8)
    found = float(Operand.of(values, CPU).times(rows))
    assert found == pytest.approx(127 * (1 + 63 * small), abs=1e-6 * 127 * 8)


def test_blocks_come_in_order_and_threads_are_given_back() -> None:
    """Results keep the order of the blocks, and torch has as many threads afterwards, even where
    the work fails or is left early.
    """
    before = torch.get_num_threads()
    spans = [(n, n + 1) for n in range(40)]

    def work(start: int, stop: int) -> int:
        if start == 30:
            raise ValueError("no")
        return start * stop

    with closing(in_order(work, spans[:30], threads=3)) as results:
        assert [found for _, found in results] == [n * (n + 1) for n in range(30)]
    with pytest.raises(ValueError, match="no"), closing(in_order(work, spans, threads=3)) as left:
        list(left)
    with closing(in_order(work, spans, threads=3)) as left:
        assert next(left) == ((0, 1), 0)
    assert torch.get_num_threads() == before


def test_each_thread_multiplies_alone() -> None:
    """Threads that work on blocks have one of OpenMP's threads each, from their first call on."""
    count = ctypes.CDLL(torch._C.__file__)
    if not hasattr(count, "omp_get_max_threads"):
        pytest.skip("torch has another runtime here")
    torch.set_num_threads(max(2, torch.get_num_threads()))
    blocks = [(n, n + 1) for n in range(8)]

    def work(_start: int, _stop: int) -> int:
        return int(count.omp_get_max_threads())

    with closing(in_order(work, blocks, threads=2)) as results:
        assert [found for _, found in results] == [1] * 8
