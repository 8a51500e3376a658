"""The budget of padded tokens of a batch: what fits into memory, and no more than speeds it up.

How it works. Before the first shard a few small batches are made of the longest rows, cut short at
first, and each is run with one row and with two. The difference is what a row of that length takes;
the next length is run only if what is expected of it is free. So it is known before the run what
any batch will take. Then batches of one, two, four … of the longest rows are timed. It ends when a
batch would take more than half of what is free, when the rate no longer grows, or when enough time
went into it. The smallest budget within 5 % of the best rate is taken: on a CPU the rate is flat
after a few rows, and what is not needed stays free.

Why not the largest that fits. It would be slower on a CPU, whose caches overflow, and no faster on
a GPU that is busy already; and a batch near the limit fails when another process grows.

What it gives up. Timings differ from run to run, so two runs of a recipe may take other budgets,
and differ by rounding (one int8 step). Where that is not wanted the recipe sets the budget. A model
that draws torch's random numbers draws others in other batches; its budget is never timed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from curate.batches import Batch, padded
from curate.errors import CurateError
from curate.memory import available, peak_of, ran_out, sized

#: Taken where nothing can be measured, and where timings may not decide.
DEFAULT = 8192
#: Share of the free memory that a budget found here may take.
SHARE = 0.5
#: A budget whose rate is this share of the best is as good.
AS_GOOD = 0.95
#: What the timings may cost: seconds, or a share of the run where that is more.
SECONDS, SHARE_OF_RUN = 2.0, 0.01
_PARTS = (8, 4, 2, 1)
_SHORTEST = 8

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
    """

    where: str
    base: int
    lengths: tuple[int, ...]
    each: tuple[int, ...]

    def of(self, rows: int, length: int) -> int:
        """Bytes of a batch; a length beyond those measured counts squared, as in attention."""
        one = float(np.interp(length, self.lengths, self.each))
        beyond = max(1.0, length / self.lengths[-1]) ** 2
        return self.base + math.ceil(rows * one * beyond)

    def worst(self, lengths: Iterable[int], budget: int, most_rows: int) -> int:
        """Bytes of the largest batch that rows of these lengths make, `most_rows` at most."""
        return max(self.of(min(most_rows, max(1, budget // n)), n) for n in lengths)


class Rows(NamedTuple):
    """What is to be sketched, as far as batches depend on it.

    `longest` holds the tokens of some of the longest rows, longest first; `lengths` the different
    lengths of all rows, ascending; `most` is the most rows that a batch can have; `tokens` is the
    tokens of the run, all checkpoints.
    """

    longest: Sequence[Tokens]
    lengths: Sequence[int]
    most: int
    tokens: int
    pad_id: int = 0

    def batch(self, count: int, length: int) -> Batch:
        """`count` of the longest rows, cut to `length`; a cut row has all of itself as targets."""
        whole = length >= self.lengths[-1]
        given = [self.longest[at % len(self.longest)] for at in range(count)]
        rows = [row if whole else (row[0][:length],) * 2 for row in given]
        ids = [f"probe {at}" for at in range(count)]
        return Batch(np.arange(count), ids, padded(rows, self.pad_id))


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


def measure(run: Pass, rows: Rows, device: torch.device, held: Sequence[Tensor]) -> Need:
    """What a row takes, by its length.

    Args:
        run: sketches a batch.
        rows: what is to be sketched.
        device: where it runs.
        held: the model's tensors, which are there anyway; the first tells the data type.

    Raises:
        CurateError: one row of the longest length does not fit, by what shorter ones took.
    """
    free = available(device)
    lengths = _probed(rows)
    run(rows.batch(1, lengths[0]))  # makes the hashes, which stay
    base, known = 0, dict[int, int]()
    for length in lengths:
        _refuse_too_long(known, base, length, rows.lengths[-1], free, device)
        pair = free is None or not known or base + 2 * expected(known, length) <= free
        taken = _peaks(run, rows, length, 2 if pair else 1, device, held)
        if taken is None:
            raise CurateError(_does_not_fit(rows.lengths[-1], None, free, device, known))
        known[length] = max(1, taken[-1] - (taken[0] if pair else base))
        base = max(base, taken[0] - known[length])
    return Need(where(device, held[0].dtype), base, tuple(known), tuple(known.values()))


def _probed(rows: Rows) -> list[int]:
    """Lengths to measure, ascending: parts of the longest, and the shortest."""
    longest, shortest = rows.lengths[-1], rows.lengths[0]
    least = min(longest, _SHORTEST)
    return sorted({max(least, n) for n in (shortest, *(longest // part for part in _PARTS))})


def _peaks(
    run: Pass, rows: Rows, length: int, most: int, device: torch.device, held: Sequence[Tensor]
) -> list[int] | None:
    """Bytes of passes over 1 … `most` rows of a length; None where memory ran out."""
    given = [rows.batch(count, length) for count in range(1, most + 1)]
    try:
        return [peak_of(lambda batch=batch: run(batch), device, held) for batch in given]  # type: ignore[misc]
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
    release(device)
    return None


def _refuse_too_long(
    known: dict[int, int],
    base: int,
    length: int,
    longest: int,
    free: int | None,
    device: torch.device,
) -> None:
    """Refuse before a row of a length is run that is not expected to fit."""
    if free is None or not known or base + expected(known, length) <= free:
        return
    need = base + expected(known, longest)
    raise CurateError(_does_not_fit(longest, need, free, device, known))


def expected(known: dict[int, int], length: int) -> int:
    """Bytes of a row of `length` tokens, from shorter ones: a power of the length, 1 to 2.

    The power is that between the longest known and one of two thirds of it or less. Without such a
    one it is 1, so that nothing is refused but for a growth that was seen.
    """
    last = max(known)
    shorter = [n for n in known if 3 * n <= 2 * last]
    power = 1.0
    if shorter:
        power = math.log(known[last] / known[max(shorter)]) / math.log(last / max(shorter))
    return math.ceil(known[last] * math.pow(length / last, min(2.0, max(1.0, power))))


def _does_not_fit(
    longest: int, need: int | None, free: int | None, device: torch.device, known: dict[int, int]
) -> str:
    seen = f"measured on rows of at most {max(known)} tokens" if known else "tried with one row"
    takes = f"about {sized(need)}" if need is not None else "more memory than there is"
    has = f"; {device} has {sized(free)} free" if free is not None else ""
    return (
        f"one row of {longest} tokens, the longest of this data, needs {takes} for its pass "
        f"({seen}){has}. Cut rows with max_tokens, run the model with gradient checkpointing, "
        f"take a smaller sketch.dim, or a device with more memory"
    )


def refuse_too_large(need: Need, rows: Rows, budget: int, device: torch.device) -> None:
    """Refuse a budget that was asked for and is not expected to fit, before it is tried.

    Raises CurateError with what it takes, what is free and the largest that fits.
    """
    free = available(device)
    takes = need.worst(rows.lengths, budget, rows.most)
    if free is None or takes <= free:
        return
    fits = largest(need, rows, free)
    raise CurateError(
        f"batches of {budget} padded tokens need about {sized(takes)} at their peak; {device} has "
        f"{sized(free)} free. Leave sketch.budget_tokens out to have it found, or give at most "
        f"{fits}, or cut rows with max_tokens"
    )


def largest(need: Need, rows: Rows, free: float) -> int:
    """The largest budget, the longest row times a power of two, that is expected to fit."""
    budget = int(rows.lengths[-1])
    while budget < rows.most * rows.lengths[-1]:
        if need.worst(rows.lengths, 2 * budget, rows.most) > free:
            break
        budget *= 2
    return budget


def find(run: Pass, rows: Rows, need: Need, device: torch.device, *, timed: bool = True) -> Found:
    """The budget to take.

    Args:
        run: sketches a batch.
        rows: what is to be sketched.
        need: from `measure`.
        device: where it runs.
        timed: whether the rate may decide; else it is `DEFAULT`, or less where that does not fit.
    """
    free = available(device)
    fits = largest(need, rows, SHARE * free) if free is not None else DEFAULT
    if not timed:
        return Found(min(DEFAULT, fits), "the model draws random numbers", need, free, {})
    rates: dict[int, float] = {}
    why = "the rate no longer grows"
    for budget, rate in _timed(run, rows, device, fits):
        rates[budget] = rate
        if _flat(list(rates.values())):
            break
    else:
        why = "a larger one does not fit, has no rows, or takes too long to try"
    good = [budget for budget, rate in rates.items() if rate >= AS_GOOD * max(rates.values())]
    return Found(min(good) if good else fits, why, need, free, rates)


def _flat(rates: Sequence[float]) -> bool:
    """Whether the last two rates are no gain on the best before them."""
    return len(rates) > 2 and AS_GOOD * max(rates[-2:]) <= max(rates[:-2])


def _timed(run: Pass, rows: Rows, device: torch.device, fits: int) -> Iterator[tuple[int, float]]:
    """Budgets and their rates, doubling, until one does not fit or takes too long to try."""
    longest, spent, rate = int(rows.lengths[-1]), 0.0, 0.0
    count = 1
    while count <= rows.most and count * longest <= max(fits, longest):
        size = count * longest
        if rate and spent + 2 * size / rate > max(SECONDS, SHARE_OF_RUN * rows.tokens / rate):
            return
        try:
            seconds = [_seconds(run, rows.batch(count, longest), device) for _ in range(2)]
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error) or not rate:
                raise
            release(device)
            return
        spent, rate = spent + sum(seconds), size / min(seconds)
        yield size, rate
        count *= 2


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
