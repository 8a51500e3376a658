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
from curate.batches import Batch, plan, width
from curate.budget import DEFAULT, Need, Rows, at_most, find, largest, measure, try_asked
from curate.errors import CurateError
from curate.memory import CPU_SPILL

CPU = torch.device("cpu")
HELD = [torch.zeros(1)]
NEED = Need("cpu float32", 1000, (10, 100), (100, 1000))


def rows(longest: int = 512, shortest: int = 40, most: int = 64, tokens: int = 10**6) -> Rows:
    """Rows of every length between two."""
    long, short = (np.arange(size, dtype=np.int32) for size in (longest, shortest))
    lengths = range(shortest, longest + 1)
    return Rows([(long, long)], lengths, most, tokens, shortest=(short, short))


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


def test_buffers_are_full_at_some_time() -> None:
    """Buffers grow by no more than a row, to their limit; with one row they are in the base."""
    need = Need("cpu float32", 1000, (10,), (100,), buffers=5000)
    assert need.of(1, 10) == 1100
    assert need.of(3, 10) == 1300 + 2 * 1100
    assert need.of(300, 10) == 31_000 + 5000


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
        longest = int(array[group].max())
        wide = width(longest, min(max(lengths), tokens))
        assert need.of(len(group), wide) <= worst


@pytest.mark.parametrize("square", [0, 2])
def test_what_a_batch_takes_is_foretold(square: int) -> None:
    """From passes of some rows, what sixteen take is known; between lengths, no less."""
    need = measure(Taking(square), rows(), CPU, HELD)

    def takes(count: int, length: int) -> float:
        return count * (40 * length + 4 * square * length**2) * CPU_SPILL

    for length in (40, 512):
        assert need.of(16, length) == pytest.approx(takes(16, length), rel=0.01)
    for length in range(40, 513, 59):
        assert need.of(16, length) >= 0.99 * takes(16, length)
    worst = max(takes(4096 // length, length) for length in range(40, 513))
    assert need.worst(range(40, 513), 4096, 200) == pytest.approx(worst, rel=0.01)


@pytest.mark.parametrize("square", [0, 2])
def test_a_pass_of_the_shortest_row_bounds_all(square: int) -> None:
    """What is concluded from one short row is never less than what a batch takes."""
    work = Taking(square)
    need = at_most(work, rows(), CPU, HELD)
    assert work.seen == [(1, 40)]
    for count, length in ((1, 40), (7, 100), (16, 512)):
        assert need.of(count, length) >= count * (40 * length + 4 * square * length**2)


def test_only_whole_rows_of_the_data_are_tried() -> None:
    """Models and losses may take no cut row: every probe has a row's own tokens and targets."""
    whole = rows()
    seen: list[Batch] = []

    def run(batch: Batch) -> Any:
        seen.append(batch)
        return torch.empty(batch.shape)

    need = measure(run, whole, CPU, HELD)
    find(run, whole, need, CPU)
    try_asked(run, whole, 2048, CPU, HELD)
    own = {len(ids): (ids, labels) for ids, labels in (*whole.longest, whole.shortest or ())}
    assert {batch.shape[1] for batch in seen} == set(own) == {40, 512}
    for batch in seen:
        ids, labels = own[batch.shape[1]]
        assert (batch.tensors["input_ids"].numpy() == ids).all()
        assert (batch.tensors["labels"].numpy() == labels).all()


def test_a_row_too_long_is_stopped_before_memory_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The count stops a pass that takes more than is free, and one line says what to do."""
    _free(monkeypatch, 50 * 2**20)
    expected = r"one row of 4096 tokens .*more than the 50 MiB that are free.*max_tokens"
    with pytest.raises(CurateError, match=expected):
        measure(Taking(square=4), rows(4096), CPU, HELD)
    assert measure(Taking(square=4), rows(1024), CPU, HELD).of(1, 1024) < 50 * 2**20


def test_one_row_that_fits_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one of the longest rows fits and two do not, that one says what a row takes."""
    _free(monkeypatch, 70_000)
    need = measure(Taking(), rows(1024), CPU, HELD)
    assert need.of(1, 1024) == pytest.approx(40 * 1024 * CPU_SPILL, rel=0.01)


def failing(error: Exception, longer: int) -> Callable[[Batch], None]:
    """A pass that fails on rows of more tokens than `longer`."""

    def run(batch: Batch) -> None:
        if batch.shape[1] > longer:
            raise error

    return run


@pytest.mark.parametrize(("longer", "told"), [(0, 40), (100, 512)])
@pytest.mark.parametrize("probe", ["measure", "find", "at_most", "try_asked"])
def test_a_device_that_runs_out_is_told(
    monkeypatch: pytest.MonkeyPatch, longer: int, told: int, probe: str
) -> None:
    """Wherever one row runs out of memory, one line says which; another error comes through."""
    _free(monkeypatch, None)
    probes: dict[str, Callable[[Any], Any]] = {
        "measure": lambda run: measure(run, rows(), CPU, HELD),
        "find": lambda run: find(run, rows(), NEED, CPU),
        "at_most": lambda run: at_most(run, rows(), CPU, HELD),
        "try_asked": lambda run: try_asked(run, rows(), 600, CPU, HELD),
    }
    if probe == "at_most" and told == 512:
        probes[probe](failing(MemoryError(), longer))  # tries the shortest row alone
        return
    told = 512 if probe in ("find", "try_asked") else told
    oom = torch.cuda.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(CurateError, match=f"one row of {told} tokens .*CUDA out of memory"):
        probes[probe](failing(oom, longer))
    with pytest.raises(RuntimeError, match="mat1"):
        probes[probe](failing(RuntimeError("mat1 and mat2"), longer))


def test_a_budget_is_refused_only_where_it_ran_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """What passes what is free is refused; what did fit, and may not again, is warned of."""
    takes = 4 * 40 * 512  # four rows, and no others are tried
    _free(monkeypatch, takes - 1)
    expected = r"4 rows of 512 tokens, the largest .*budget_tokens = 2100 .*smaller"
    with pytest.raises(CurateError, match=expected):
        try_asked(Taking(), rows(), 2100, CPU, HELD)
    _free(monkeypatch, takes)
    with pytest.warns(UserWarning, match=r"batches of 2100 padded tokens may take"):
        try_asked(Taking(), rows(), 2100, CPU, HELD)
    _free(monkeypatch, int(takes * CPU_SPILL) + 1)
    work = Taking()
    try_asked(work, rows(), 2100, CPU, HELD)
    assert work.seen == [(4, 512)]


def test_the_largest_budget_that_fits() -> None:
    """Of 1 MiB, eight rows that take an eighth each have room."""
    need = Need("cpu float32", 0, (100,), (2**17,))
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


@pytest.mark.parametrize("each", [40, 1])
def test_memory_ends_the_search(monkeypatch: pytest.MonkeyPatch, each: int) -> None:
    """No batch takes more than half of what is free, even where much less was foretold."""
    _free(monkeypatch, 2 * 5 * 40 * 512)
    _clocked(monkeypatch, lambda _: 1e-3)
    work = Taking()
    found = find(work, rows(), Need("", 0, (40, 512), (40 * each, 512 * each)), CPU)
    assert found.tokens == 4 * 512
    assert work.seen.count((8, 512)) == (each == 1)  # stopped by its count, and not timed


def test_time_ends_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trying costs at most two seconds or a percent of the run, and never over a twentieth."""
    _free(monkeypatch, 2**40)
    spent: list[float] = []

    def seconds(tokens: int) -> float:
        spent.append(0.1 + tokens * 1e-4)
        return spent[-1]

    _clocked(monkeypatch, seconds)
    find(Taking(), rows(tokens=100_000), NEED, CPU)
    assert 0.4 < sum(spent) < 2
    longer, shorter = rows(tokens=10**7), rows(tokens=10_000)
    spent.clear()
    find(Taking(), longer, NEED, CPU)
    assert 2 < sum(spent) < 10
    spent.clear()
    assert find(Taking(), shorter, NEED, CPU).tokens == 512
    assert len(spent) == 2


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
    found = find(work, rows(), NEED, CPU, fixed="it draws")
    assert (found.tokens, found.why, work.seen) == (DEFAULT, "it draws", [])
