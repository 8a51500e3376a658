"""Times and peak memory of several pieces of work, round by round, on a GPU or the CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Work = Callable[[], Any]


@dataclass
class Timed:
    """Of one piece of work: seconds of each round, peak bytes on the GPU, or what went wrong."""

    seconds: list[float] = field(default_factory=list)
    peak: int = 0
    error: str = ""

    @property
    def median(self) -> float:
        """Of the rounds."""
        return statistics.median(self.seconds)

    def ratios(self, base: float) -> tuple[float, float, float]:
        """Quartiles of the rounds beside a time in seconds."""
        if len(self.seconds) == 1:
            return (self.seconds[0] / base,) * 3
        low, middle, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low / base, middle / base, high / base


def interleaved(
    work: Mapping[str, Work], device: str, budget: float, *, repeat: int = 1, most: int = 50
) -> dict[str, Timed]:
    """Run each piece in turn until `budget` seconds are over, three rounds at least.

    With `repeat` a piece is run so often in a row and the time divided, so that what the CPU takes
    to launch a short kernel is hidden behind the one before.

    A piece that fails in its first, untimed run (which compiles and allocates) is left out, with
    its error; the others go on.
    """
    found = {name: Timed() for name in work}
    for name, run in work.items():
        _forget_peak(device)
        try:
            run()
            once(run, device)
        except Exception as error:
            found[name].error = described(error)
            _empty(device)
        else:
            found[name].peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    begin, rounds = time.perf_counter(), 0
    while rounds < 3 or (rounds < most and time.perf_counter() - begin < budget):
        for name, run in work.items():
            if not found[name].error:
                found[name].seconds.append(once(run, device, repeat))
        rounds += 1
    return found


def once(run: Work, device: str, repeat: int = 1) -> float:
    """Seconds of a run, by the GPU's own events where there is one."""
    if device != "cuda":
        begin = time.perf_counter()
        for _ in range(repeat):
            run()
        return (time.perf_counter() - begin) / repeat
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeat):
        run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1000 / repeat


def described(error: BaseException) -> str:
    """One line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160] if lines else ''}"


def _forget_peak(device: str) -> None:
    if device == "cuda":
        _empty(device)
        torch.cuda.reset_peak_memory_stats()


def _empty(device: str) -> None:
    if device == "cuda":
        torch.cuda.empty_cache()
