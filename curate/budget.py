"""The budget of padded tokens of a batch: what fits into memory, and no more than speeds it up.

How it works. Before the first shard one row and some rows of the shortest length and of the longest
are sketched, whole rows of the data: some models and losses take no others. The difference is what
rows take, and the base is what is left. A count that passes what is free stops the pass, before the
system does. Then batches of one, two, four … of the longest rows are weighed and timed. It ends
when a batch would take more than half of what is free, when the rate no longer grows, or when
enough time went into it. The smallest budget within 5 % of the best rate is taken: on a CPU the
rate is flat after a few rows, and what is not needed stays free.

Why two lengths are enough. Memory grows with the length at least as fast as a straight line, so
between the two it is below the line, and no batch takes more than the worse of the two ends.

Why not the largest that fits. It would be slower on a CPU, whose caches overflow, and no faster on
a GPU that is busy already; and a batch near the limit fails when another process grows.

What it gives up. Timings differ from run to run, so two runs of a recipe may take other budgets,
and differ by rounding (one int8 step). Where that is not wanted the recipe sets the budget. A model
that draws torch's random numbers draws others in other batches; its budget is never timed.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from curate.batches import Batch, padded, width
from curate.errors import CurateError
from curate.memory import available, peak_of, ran_out, sized

#: Taken where nothing can be measured, and where timings may not decide.
DEFAULT = 8192
#: Share of the free memory that a budget found here may take.
SHARE = 0.5
#: A budget whose rate is this share of the best is as good.
AS_GOOD = 0.95
#: What the timings may cost: seconds, or a share of the run where that is more; at most a share.
SECONDS, SHARE_OF_RUN, MOST_OF_RUN = 2.0, 0.01, 0.05
# Tokens of the rows that are held against one row, and the most rows. What a row takes is hidden
# where a buffer is larger: of 64 wide rows of 36 tokens, two and four left 13 % untold; of 64 of 10
# tokens, with buffers in float32, 16 left 16 %.
_TOKENS, _ROWS = 1024, 64

Tokens = tuple[NDArray[np.int32], NDArray[np.int32]]
Lengths = NDArray[np.int64]
Pass = Callable[[Batch], Any]


@dataclass(frozen=True)
class Need:
    """Bytes that a pass takes: `base`, and for each row what `each` says for its length.

    Attributes:
        where: the device and the data type that it was measured with.
        base: bytes of a pass that do not depend on its rows.
        lengths: tokens of a row, ascending.
        each: bytes a row at these lengths.
        buffers: bytes that buffers may grow to, which were measured with room for one row. They
            grow with the rows, by no more than all that one row takes.
    """

    where: str
    base: int
    lengths: tuple[int, ...]
    each: tuple[int, ...]
    buffers: int = 0

    def of(self, rows: int, length: int) -> int:
        """Bytes of a batch; a length beyond those measured counts squared, as in attention."""
        beyond = max(1.0, length / self.lengths[-1]) ** 2
        one = beyond * float(np.interp(length, self.lengths, self.each))
        grown = min(self.buffers, (rows - 1) * (self.base + one))
        return self.base + math.ceil(rows * one + grown)

    def worst(self, lengths: Iterable[int], budget: int, most_rows: int) -> int:
        """Bytes of the largest batch that rows of these lengths make, `most_rows` at most."""
        lengths = list(lengths)
        most = min(budget, max(lengths))
        widths = {width(length, most) for length in lengths}
        return max(self.of(min(most_rows, max(1, budget // wide)), wide) for wide in widths)


class Rows(NamedTuple):
    """What is to be sketched, as far as batches depend on it.

    `longest` holds the tokens of some of the longest rows, longest first; `lengths` the different
    lengths of all rows, ascending; `most` is the most rows that a batch can have; `tokens` is the
    tokens of the run, all checkpoints; `shortest` is one of the shortest rows.
    """

    longest: Sequence[Tokens]
    lengths: Sequence[int]
    most: int
    tokens: int
    pad_id: int = 0
    shortest: Tokens | None = None

    def batch(self, count: int, length: int) -> Batch:
        """`count` whole rows: of the longest, or the shortest for any `length` below theirs."""
        short = self.shortest if length < self.lengths[-1] else None
        chosen = self.longest if short is None else [short]
        rows = [chosen[at % len(chosen)] for at in range(count)]
        ids = [f"probe {at}" for at in range(count)]
        return Batch(np.arange(count), ids, padded(rows, self.pad_id))

    def of_budget(self, budget: int) -> Batch:
        """The batch of the longest rows that a budget makes."""
        return self.batch(min(self.most, max(1, budget // self.lengths[-1])), self.lengths[-1])


@dataclass(frozen=True)
class Found:
    """A budget, and what it was decided by; `rates` are padded tokens a second by budget."""

    tokens: int
    why: str
    need: Need
    free: int | None
    rates: dict[int, float]

    def as_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return asdict(self) | {"rates": list(self.rates.items())}


def where(device: torch.device, dtype: torch.dtype) -> str:
    """The device and the data type that memory depends on, as one word each."""
    return f"{device.type} {str(dtype).removeprefix('torch.')}"


def measure(
    run: Pass, rows: Rows, device: torch.device, held: Sequence[Tensor], buffers: int = 0
) -> Need:
    """What a row takes, by its length.

    Args:
        run: sketches a batch.
        rows: what is to be sketched.
        device: where it runs.
        held: the model's tensors, which are there anyway; the first tells the data type.
        buffers: as in `Need`.

    Raises:
        CurateError: one row does not fit.
    """
    with one_row(rows.lengths[0], device):
        run(rows.batch(1, rows.lengths[0]))  # makes the hashes, which stay
    base, known = 0, dict[int, int]()
    for length in sorted({rows.lengths[0], rows.lengths[-1]}):
        one = _of_one(run, rows, length, device, held)
        count, more = _of_more(run, rows, length, device, held) or (2, 2 * one - base)
        known[length] = max(1, (more - one) // (count - 1))
        base = max(base, one - known[length])
    here = where(device, held[0].dtype)
    return Need(here, base, tuple(known), tuple(known.values()), buffers)


def at_most(run: Pass, rows: Rows, device: torch.device, held: Sequence[Tensor]) -> Need:
    """What a row takes at most, from one pass of the shortest row: all of it counts for each row.

    No part of a pass grows faster than the rows times the square of their length. Raises
    CurateError where not even this row fits.
    """
    shortest = rows.lengths[0]
    taken = _of_one(run, rows, shortest, device, held)
    return Need(where(device, held[0].dtype), 0, (shortest,), (taken,))


def _of_one(
    run: Pass, rows: Rows, length: int, device: torch.device, held: Sequence[Tensor]
) -> int:
    batch = rows.batch(1, length)
    with one_row(length, device):
        return peak_of(lambda: run(batch), device, held, available(device))


def _of_more(
    run: Pass, rows: Rows, length: int, device: torch.device, held: Sequence[Tensor]
) -> tuple[int, int] | None:
    """How many rows were passed, two or more, and the bytes of it; None where two do not fit."""
    for count in sorted({2, min(_ROWS, max(2, _TOKENS // length))}, reverse=True):
        try:
            work = partial(run, rows.batch(count, length))
            return count, peak_of(work, device, held, available(device))
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
        release(device)
    return None


@contextmanager
def one_row(length: int, device: torch.device) -> Iterator[None]:
    """Where memory runs out with one row of `length` tokens: one line that says what to do."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        raise too_long(length, device, error) from error


def too_long(length: int, device: torch.device, error: object) -> CurateError:
    """What to say where one row of `length` tokens does not fit."""
    return CurateError(
        f"memory ran out on {device} with one row of {length} tokens in the batch "
        f"({first_line(error)}). Free memory, cut rows with max_tokens, run the model with "
        f"gradient checkpointing or take a smaller sketch.dim; what is sketched stays"
    )


def first_line(error: object) -> str:
    """What an allocator said first."""
    return str(error).partition("\n")[0]


def try_asked(
    run: Pass, rows: Rows, budget: int, device: torch.device, held: Sequence[Tensor]
) -> None:
    """Sketch the largest batch of a budget that was asked for; refuse only where it ran out.

    What may not fit, but did, is warned of. Raises CurateError for a batch that ran out.
    """
    free = available(device)
    batch = rows.of_budget(budget)
    count, length = batch.shape
    try:
        taken = peak_of(lambda: run(batch), device, held, free)
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        if count == 1:
            raise too_long(length, device, error) from error
        raise CurateError(
            f"memory ran out on {device} with {count} rows of {length} tokens, the largest batch "
            f"that sketch.budget_tokens = {budget} makes ({first_line(error)}). Give a smaller "
            f"one, leave it out to have it found, or cut rows with max_tokens"
        ) from error
    if free is not None and taken > free:
        warnings.warn(
            f"batches of {budget} padded tokens may take {sized(taken)}; {device} has "
            f"{sized(free)} free. Should memory run out, give a smaller sketch.budget_tokens",
            stacklevel=2,
        )


def largest(need: Need, rows: Rows, free: float) -> int:
    """The largest budget, the longest row times a power of two, that is expected to fit."""
    budget = int(rows.lengths[-1])
    while budget < rows.most * rows.lengths[-1]:
        if need.worst(rows.lengths, 2 * budget, rows.most) > free:
            break
        budget *= 2
    return budget


def find(
    run: Pass,
    rows: Rows,
    need: Need,
    device: torch.device,
    held: Sequence[Tensor] = (),
    *,
    fixed: str | None = None,
) -> Found:
    """The budget to take.

    Args:
        run: sketches a batch.
        rows: what is to be sketched.
        need: from `measure`.
        device: where it runs.
        held: the model's tensors.
        fixed: why the rate may not decide; then it is `DEFAULT`, or less where that does not fit.

    Raises CurateError where one row of the longest length does not fit.
    """
    free = available(device)
    fits = DEFAULT if free is None else largest(need, rows, SHARE * free)
    if fixed is not None:
        return Found(min(DEFAULT, fits), fixed, need, free, {})
    rates: dict[int, float] = {}
    why = "the rate no longer grows"
    for budget, rate in _timed(run, rows, device, held, fits):
        rates[budget] = rate
        if _flat(list(rates.values())):
            break
    else:
        why = "a larger one does not fit, has no rows, or takes too long to try"
    good = [budget for budget, rate in rates.items() if rate >= AS_GOOD * max(rates.values())]
    return Found(min(good), why, need, free, rates)


def _flat(rates: Sequence[float]) -> bool:
    """Whether the last two rates are no gain on the best before them."""
    return len(rates) > 2 and AS_GOOD * max(rates[-2:]) <= max(rates[:-2])


def _timed(
    run: Pass, rows: Rows, device: torch.device, held: Sequence[Tensor], fits: int
) -> Iterator[tuple[int, float]]:
    """Budgets and their rates, doubling, until one does not fit or takes too long to try.

    A few rows cannot tell all: what is little in them may grow faster than their peak. So a batch
    is weighed once before it is timed, and stopped at the share of what is free.
    """
    longest, spent, rate = int(rows.lengths[-1]), 0.0, 0.0
    count, free = 1, available(device)
    while count <= rows.most and count * longest <= max(fits, longest):
        size, batch = count * longest, rows.batch(count, longest)
        if rate and spent + 3 * size / rate > _allowed(rows.tokens / rate):
            return
        most = None if free is None else int(free * SHARE) if count > 1 else free
        try:
            peak_of(partial(run, batch), device, held, most)
            seconds = [_seconds(run, batch, device) for _ in range(2)]
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            if count == 1:
                raise too_long(longest, device, error) from error
            release(device)
            return
        spent, rate = spent + 3 * max(seconds), size / min(seconds)
        yield size, rate
        count *= 2


def _allowed(seconds: float) -> float:
    """Seconds that the timings of a run of so many seconds may take."""
    return min(max(SECONDS, SHARE_OF_RUN * seconds), MOST_OF_RUN * seconds)


def _seconds(run: Pass, batch: Batch, device: torch.device) -> float:
    begin = time.perf_counter()
    run(batch)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def release(device: torch.device) -> None:
    """Give what torch keeps for later back to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
