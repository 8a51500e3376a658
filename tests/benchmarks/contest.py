"""One case measured: passes in turn, each in a process of its own, and what their scores are worth.

What a process has done before would be in its memory and in its caches; so batch sizes are tried in
processes of their own, and every pass that is timed has a fresh one, whose first round is watched
for its peak of anonymous memory and not timed.
"""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from tests.benchmarks.cases import DIMS, Case
from tests.benchmarks.hired import BERGSON, PUBLISHED, Shop, Worker
from tests.benchmarks.rounds import BASE, best_size, error, interleaved, over_seeds, summed

OURS = ("outer", "fourier", "auto")
FLOOR, BEST = "floor", "auto, best size"
OTHER, THEIRS = "published, best size", "bergson, best size"


@dataclass(frozen=True)
class Contestant:
    """A pass: worker script, the kind of pass, rows of a batch, its library where not ours."""

    script: str
    kind: str
    rows: int
    library: str | None = None


@dataclass(frozen=True)
class Effort:
    """How much is measured: rounds, whether batch sizes are tried, seeds; and without whom."""

    rounds: int = 9
    search: bool = True
    seeds: int = 8
    without: tuple[str, ...] = ()

    def has(self, library: str) -> bool:
        """Whether the other library takes part."""
        return library not in self.without


Workers = Mapping[str, Worker]


def looped(case: Case, shop: Shop, effort: Effort) -> dict[str, Any]:
    """Training step, floor, our evaluations, ours and the published package at their best size."""
    entrants = _ours_and_plain(case)
    if effort.has(PUBLISHED):
        entrants[OTHER] = Contestant("with_published.py", "", case.rows, PUBLISHED)
    return _contest(entrants, case, shop, effort)


def ordinary(case: Case, shop: Shop, effort: Effort) -> dict[str, Any]:
    """Ours at the m that has bergson's error, beside bergson, on a model without a loop."""
    entrants = _ours_and_plain(case)
    if effort.has(BERGSON):
        entrants[THEIRS] = Contestant("with_bergson.py", "", case.rows, BERGSON)
        case = replace(case, dim=equal_dim(case, entrants, shop, effort))
    return _contest(entrants, case, shop, effort)


def _ours_and_plain(case: Case) -> dict[str, Contestant]:
    entrants = {kind: Contestant("with_plain.py", kind, case.rows) for kind in (BASE, FLOOR)}
    entrants |= {kind: Contestant("with_ours.py", kind, case.rows) for kind in OURS}
    return entrants | {BEST: Contestant("with_ours.py", "auto", case.rows)}


def _contest(
    entrants: dict[str, Contestant], case: Case, shop: Shop, effort: Effort
) -> dict[str, Any]:
    """Batch sizes, then a race, then scores; lines by pass, and what every size gave."""
    entrants, sizes = sized(entrants, case, shop, effort)
    alias = entrants[BEST].rows == case.rows  # then it is "auto" once more
    if alias:
        del entrants[BEST]
    with hired(entrants, case, shop) as workers:
        lines = raced(entrants, workers, case, min(effort.rounds, case.rounds))
        exact = exact_scores(workers[FLOOR], case)
        for name, one in entrants.items():
            if one.script != "with_plain.py":
                lines[name] |= scored(workers[name], one, case, exact, effort)
            if one.script == "with_ours.py":
                lines[name]["dim"] = case.dim
    if alias:
        lines[BEST] = lines["auto"]
    return {"passes": lines, "sizes": sizes}


@contextmanager
def hired(entrants: Mapping[str, Contestant], case: Case, shop: Shop) -> Iterator[Workers]:
    """A worker for each, with the case's model built."""
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(Worker(shop, one.script, one.library))
            for name, one in entrants.items()
        }
        for name, one in entrants.items():
            workers[name].tell("make", case=case.asked(), kind=one.kind)
        for worker in workers.values():
            worker.answer()
        yield workers


def sized(
    entrants: dict[str, Contestant], case: Case, shop: Shop, effort: Effort
) -> tuple[dict[str, Contestant], dict[str, dict[int, float]]]:
    """The entrants that run at their best size with that size, and what all sizes gave."""
    found, speeds = dict(entrants), {}
    for name in (BEST, OTHER, THEIRS):
        if name in entrants and effort.search:
            say(f"{case.name}: batch sizes of {name}")
            with hired({name: entrants[name]}, case, shop) as workers:
                repeats = 1 if case.rounds < 5 else 2
                size, speeds[name] = best_size(workers[name], case.sizes, repeats)
            found[name] = replace(entrants[name], rows=size)
    return found, speeds


def raced(
    entrants: Mapping[str, Contestant], workers: Workers, case: Case, rounds: int
) -> dict[str, dict[str, Any]]:
    """Seconds and ratios of all, interleaved, and the peak of each one's memory."""
    peaks = {}
    for name, one in entrants.items():
        say(f"{case.name}: {name}, {one.rows} rows")
        workers[name].peak = 0
        workers[name].ask("round", rows=one.rows)
        peaks[name] = workers[name].peak
    rows = {name: one.rows for name, one in entrants.items()}
    say(f"{case.name}: {rounds} rounds")
    turns = {name: (workers[name], rows[name]) for name in entrants}
    result = summed(interleaved(turns, rounds), rows)
    return {name: {**line, "peak_anonymous": peaks[name]} for name, line in result.items()}


def exact_scores(worker: Worker, case: Case) -> dict[str, Any]:
    """Of the case's first rows, and the digest of the model that they are of."""
    say(f"{case.name}: exact scores")
    return worker.ask("scores", count=case.scored)


def scored(
    worker: Worker, one: Contestant, case: Case, exact: dict[str, Any], effort: Effort
) -> dict[str, Any]:
    """Error of the scores over seeds, and the bytes of a row that they come from.

    Raises:
        ValueError: if the worker's model is not the one that exact scores are of.
    """
    say(f"{case.name}: scores of {one.script} {one.kind} at m = {case.dim}")
    errors = []
    for seed in range(min(effort.seeds, case.seeds)):
        size = min(one.rows, case.scored)
        reply = worker.ask("scores", count=case.scored, size=size, seed=seed, dim=case.dim)
        same(reply["digest"], exact["digest"], one.script)
        errors.append(error(reply["scores"], exact["scores"]))
    return {"error": over_seeds(errors), "bytes_per_row": reply["bytes"]}


def equal_dim(case: Case, entrants: Mapping[str, Contestant], shop: Shop, effort: Effort) -> int:
    """The smallest of `DIMS` at which our error is at most bergson's, else the largest."""
    chosen = {name: entrants[name] for name in (FLOOR, THEIRS, "auto")}
    with hired(chosen, case, shop) as workers:
        exact = exact_scores(workers[FLOOR], case)

        def at(name: str, dim: int) -> float:
            one = replace(case, dim=dim)
            found = scored(workers[name], chosen[name], one, exact, effort)["error"]
            return float(found)

        wanted = at(THEIRS, case.dim)
        place = bisect_left(DIMS, True, key=lambda dim: at("auto", dim) <= wanted)
        return DIMS[min(place, len(DIMS) - 1)]


def same(found: float, expected: float, who: str) -> None:
    """Refuse to compare scores of two models."""
    if abs(found - expected) > 1e-6 * abs(expected):
        raise ValueError(
            f"{who} has a model whose weights add up to {found:g}, expected {expected:g}: the same "
            "seed gave other weights, so compare the torch versions of the two environments"
        )


def say(text: str) -> None:
    """What is being done, on stderr."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201
