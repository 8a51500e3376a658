"""The budget of a batch: what it will take is known before, and no more is taken than is of use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from curate import budget
from curate.batches import Batch, plan
from curate.budget import DEFAULT, Need, Rows, find, largest, measure, refuse_too_large
from curate.errors import CurateError
from curate.memory import CPU_SPILL

CPU = torch.device("cpu")
HELD = [torch.zeros(1)]
NEED = Need("cpu float32", 1000, (10, 100), (100, 1000))


def rows(longest: int = 512, shortest: int = 40, most: int = 64, tokens: int = 10**6) -> Rows:
    """Rows of every length between two."""
    token = np.arange(longest, dtype=np.int32)
    return Rows([(token, token)], range(shortest, longest + 1), most, tokens)


def _free(monkeypatch: pytest.MonkeyPatch, size: int | None) -> None:
    """Let so many bytes be free."""
    monkeypatch.setattr(budget, "available", lambda _: size)


class Taking:
    """A pass that takes 40 bytes a token and `square` × 4 a pair of tokens; keeps what it saw."""

    def __init__(self, square: int = 0) -> None:
        self.square = square
        self.seen: list[tuple[int, int]] = []

    def __call__(self, batch: Batch) -> Any:
        count, length = batch.shape
        self.seen.append((count, length))
        return torch.empty(count, length, 10), torch.empty(count, length, length, self.square)


def test_need_grows_with_rows_and_length() -> None:
    """Between two lengths it is a straight line; beyond the longest it counts squared."""
    assert NEED.of(1, 10) == 1100
    assert NEED.of(3, 55) == 1000 + 3 * 550
    assert NEED.of(1, 200) == 1000 + 4 * 1000


@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=60),
    st.integers(1, 4000),
    st.integers(0, 10**6),
    st.lists(st.integers(1, 10**6), min_size=2, max_size=2),
)
def test_no_batch_of_a_plan_needs_more_than_the_worst(
    lengths: list[int], tokens: int, base: int, each: list[int]
) -> None:
    """Whatever rows come, no batch that is made of them takes more than was said before."""
    need = Need("cpu float32", base, (10, 200), (min(each), max(each)))
    array = np.asarray(lengths, np.int64)
    worst = need.worst(sorted(set(lengths)), tokens, len(lengths))
    for group in plan(array, tokens):
        assert need.of(len(group), int(array[group].max())) <= worst


@pytest.mark.parametrize("square", [0, 2])
def test_what_a_batch_takes_is_foretold(square: int) -> None:
    """From passes of two rows at most, what sixteen rows take is known to one percent."""
    need = measure(Taking(square), rows(), CPU, HELD)
    for count, length in ((16, 512), (16, 256), (1, 128)):
        takes = count * (40 * length + 4 * square * length**2) * CPU_SPILL
        assert need.of(count, length) == pytest.approx(takes, rel=0.01)
    between = 16 * (40 * 300 + 4 * square * 300**2) * CPU_SPILL
    assert between * 0.99 <= need.of(16, 300) <= between * 1.2


def test_a_row_too_long_is_refused_before_it_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that grows as the square is seen on short rows, and the longest is never tried."""
    _free(monkeypatch, 50 * 2**20)
    work = Taking(square=4)
    with pytest.raises(
        CurateError, match=r"one row of 4096 .*about 3.. MiB.* has 50 MiB free.*Cut"
    ):
        measure(work, rows(4096), CPU, HELD)
    assert max(length for _, length in work.seen) == 1024
    assert measure(work, rows(1024), CPU, HELD).of(1, 1024) < 50 * 2**20


def test_one_row_that_fits_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one of the longest rows fits and two do not, two are not tried."""
    _free(monkeypatch, 70_000)
    work = Taking()
    need = measure(work, rows(1024), CPU, HELD)
    assert (2, 1024) not in work.seen
    assert need.of(1, 1024) == pytest.approx(40 * 1024 * CPU_SPILL, rel=0.01)


def test_a_device_that_runs_out_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """An allocator's refusal on a short row is one clear line; another error comes through."""
    _free(monkeypatch, None)

    def failing(error: Exception) -> Callable[[Batch], None]:
        def run(batch: Batch) -> None:
            if batch.shape[1] > 100:
                raise error

        return run

    with pytest.raises(CurateError, match=r"more memory than there is .*at most 64 tokens"):
        measure(failing(torch.cuda.OutOfMemoryError("CUDA out of memory")), rows(), CPU, HELD)
    with pytest.raises(RuntimeError, match="mat1"):
        measure(failing(RuntimeError("mat1 and mat2")), rows(), CPU, HELD)


def test_a_budget_too_large_is_refused_with_one_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line says what it takes, what is free, and a budget; that one is then accepted."""
    _free(monkeypatch, 2**20)
    need = Need("cpu float32", 0, (100,), (2**17,))
    with pytest.raises(CurateError, match=r"need about 8 MiB .*1 MiB free.* at most 800,"):
        refuse_too_large(need, rows(100, 100), 6400, CPU)
    refuse_too_large(need, rows(100, 100), 800, CPU)
    assert largest(need, rows(100, 100), 2**20) == 800


def _clocked(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[int], float]) -> None:
    """Let passes take what `seconds` says for their tokens."""

    def timed(run: Any, batch: Batch, device: torch.device) -> float:
        run(batch)
        return seconds(batch.shape[0] * batch.shape[1])

    monkeypatch.setattr(budget, "_seconds", timed)


def test_the_smallest_that_is_as_fast_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a fixed cost of 100 tokens a pass, 4096 tokens are within 5 % of all larger ones."""
    _free(monkeypatch, 2**40)
    _clocked(monkeypatch, lambda tokens: (tokens + 100) * 1e-6)
    found = find(Taking(), rows(), NEED, CPU)
    assert found.tokens == 2048
    assert found.why == "the rate no longer grows"
    assert list(found.rates) == [512, 1024, 2048, 4096, 8192]


def test_memory_ends_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """No batch is tried that would take more than half of what is free."""
    _free(monkeypatch, 2 * 6 * 512)
    _clocked(monkeypatch, lambda _: 1e-3)
    work = Taking()
    found = find(work, rows(), Need("", 0, (40, 512), (40, 512)), CPU)
    assert found.tokens == 4 * 512
    assert max(count for count, _ in work.seen) == 4


def test_time_ends_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a pass takes long, trying costs no more than two seconds or a percent of the run."""
    _free(monkeypatch, 2**40)
    spent: list[float] = []

    def seconds(tokens: int) -> float:
        spent.append(0.1 + tokens * 1e-4)
        return spent[-1]

    _clocked(monkeypatch, seconds)
    find(Taking(), rows(tokens=100_000), NEED, CPU)
    assert sum(spent) < 2
    longer = rows(tokens=10**7)
    spent.clear()
    find(Taking(), longer, NEED, CPU)
    assert 2 < sum(spent) < 10


def test_running_out_ends_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that runs out while budgets are tried leaves the search with those that fitted."""
    _free(monkeypatch, 2**40)
    _clocked(monkeypatch, lambda _: 1e-3)

    def run(batch: Batch) -> None:
        if batch.shape[0] > 4:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    assert find(run, rows(), NEED, CPU).tokens == 4 * 512


def test_timings_may_not_decide_where_results_depend_on_them() -> None:
    """For a model that draws random numbers the default is taken, and nothing is run."""
    work = Taking()
    found = find(work, rows(), NEED, CPU, timed=False)
    assert (found.tokens, work.seen) == (DEFAULT, [])
