"""Work on many blocks in a few threads, with the results in order.

A block fits in a core's own cache and a product of such a size gains little from being cut up
further; so each thread works on a block of its own with one of torch's threads, and what is done
between the products runs side by side too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")
Span = tuple[int, int]
WAITING = 2
"""Blocks a thread that may be done, or waiting to be, ahead of the one that is asked for."""


def in_order(
    work: Callable[[int, int], Result], blocks: Iterable[Span], *, threads: int | None = None
) -> Generator[tuple[Span, Result]]:
    """Yield each block (start, stop) with `work(start, stop)`, in the order of the blocks.

    Close the generator where it is left early: it waits for its threads then.

    Args:
        threads: as many as torch has by default.
    """
    before = torch.get_num_threads()
    count = threads or before
    if count == 1:
        for span in blocks:
            yield span, work(*span)
        return
    pending: deque[tuple[Span, Future[Result]]] = deque()
    torch.set_num_threads(1)
    # Each thread is told: what calls OpenMP by itself, such as an integer product, would not know.
    pool = ThreadPoolExecutor(count, "curate-block", torch.set_num_threads, (1,))
    try:
        for span in blocks:
            pending.append((span, pool.submit(work, *span)))
            if len(pending) >= WAITING * count:
                first, future = pending.popleft()
                yield first, future.result()
        while pending:
            first, future = pending.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(before)
