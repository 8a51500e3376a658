"""Rounds that alternate between workers, and what is made of their seconds."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tests.benchmarks.hired import Worker, WorkerError

BASE = "training step"
PAUSE = 0.02  # seconds in which the threads of the last worker fall asleep


def interleaved(turns: Mapping[str, tuple[Worker, int]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each round by name, from (worker, rows); every round begins with another."""
    names = list(turns)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            worker, rows = turns[name]
            time.sleep(PAUSE)
            seconds[name].append(worker.ask("round", rows=rows)["seconds"])
    return seconds


def best_size(worker: Worker, sizes: Sequence[int], repeats: int) -> tuple[int, dict[int, float]]:
    """The batch size with the most rows a second, and what every size tried gave.

    Sizes are tried in turn until one is a tenth slower than the best, or does not fit.
    """
    speeds: dict[int, float] = {}
    for size in sorted(sizes):
        try:
            worker.ask("round", rows=size)  # allocates, plans
            runs = [worker.ask("round", rows=size)["seconds"] for _ in range(repeats)]
        except WorkerError as problem:
            if not speeds or worker.process.poll() is not None:
                raise
            print(f"  {problem}", file=sys.stderr)  # noqa: T201
            break
        speeds[size] = size / statistics.median(runs)
        if speeds[size] < 0.9 * max(speeds.values()):
            break
    return max(speeds, key=lambda size: speeds[size]), speeds


def summed(
    seconds: Mapping[str, Sequence[float]], rows: Mapping[str, int], base: str = BASE
) -> dict[str, dict[str, Any]]:
    """Medians and quartiles by name, and the ratio of each round to the base's of that round.

    Ratios are of seconds a row: 2 is half as many rows a second.
    """
    found = {}
    for name, runs in seconds.items():
        pairs = zip(runs, seconds[base], strict=True)
        ratios = [one * rows[base] / (two * rows[name]) for one, two in pairs]
        low, middle, high = statistics.quantiles(runs, n=4, method="inclusive")
        left, ratio, right = statistics.quantiles(ratios, n=4, method="inclusive")
        found[name] = {
            "rows": rows[name],
            "rounds": len(runs),
            "seconds": [low, middle, high],
            "ratio": [left, ratio, right],
            "rows_per_second": rows[name] / middle,
        }
    return found


def error(found: Sequence[Sequence[float]], exact: Sequence[Sequence[float]]) -> float:
    """‖found − exact‖ / ‖(‖g_i‖ ‖g_j‖)_ij‖ over all pairs of two different rows.

    The root mean square of what a score is off by, in units in which the two gradients have length
    one: 1/√m for an ideal random projection of rows that are not alike. Exact scores have norms on
    their diagonal.
    """
    off, size = 0.0, 0.0
    for i, row in enumerate(exact):
        for j, value in enumerate(row):
            if i != j:
                off += (found[i][j] - value) ** 2
                size += exact[i][i] * exact[j][j]
    return math.sqrt(off / size)


def over_seeds(errors: Sequence[float]) -> float:
    """The root mean square."""
    return math.sqrt(sum(e * e for e in errors) / len(errors))
