"""What was demanded, beside what came."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

from tests.benchmarks import cases
from tests.benchmarks.cases import LOOPED, ORDINARY
from tests.benchmarks.contest import BEST, OTHER, THEIRS

Found = dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """A ratio and its bound; `most` where the ratio is to be at most the bound, else at least."""

    what: str
    found: float
    bound: float
    most: bool

    @property
    def met(self) -> bool:
        """Whether the demand is met."""
        return self.found <= self.bound if self.most else self.found >= self.bound


def verdicts(found: Found) -> list[Verdict]:
    """Every demand for which both sides were measured."""
    return [*_steps(found), *_rates(found), *_ordinary(found), *_job(found)]


def _steps(found: Found) -> Iterator[Verdict]:
    bf16 = bool(found["machine"].get("bf16"))
    for case in LOOPED:
        if case.name in found["cases"]:
            ratio = found["cases"][case.name]["passes"]["auto"]["ratio"][1]
            bound = cases.step_demand(case, has_bf16=bf16)
            yield Verdict(f"{case.name}: our pass / training step, seconds", ratio, bound, True)


def _rates(found: Found) -> Iterator[Verdict]:
    for shape, bound in cases.RATES.items():
        same = [case.name for case in LOOPED if case.shape == shape]
        ours, theirs = (_best(found, same, name) for name in (BEST, OTHER))
        if ours and theirs:
            what = f"{shape}: ours / published, rows a second, best size and data type"
            yield Verdict(what, ours / theirs, bound, False)


def _best(found: Found, names: list[str], entrant: str) -> float | None:
    """The most rows a second over the cases that were measured."""
    passes = [found["cases"][name]["passes"] for name in names if name in found["cases"]]
    rates = [lines[entrant]["rows_per_second"] for lines in passes if entrant in lines]
    return max(rates, default=None)


def _ordinary(found: Found) -> Iterator[Verdict]:
    for case in ORDINARY:
        passes = found["cases"].get(case.name, {"passes": {}})["passes"]
        if THEIRS in passes:
            ours, theirs = passes[BEST], passes[THEIRS]
            rate = ours["rows_per_second"] / theirs["rows_per_second"]
            kept = ours["bytes_per_row"] / theirs["bytes_per_row"]
            error = ours["error"] / theirs["error"]
            name = case.name
            yield Verdict(
                f"{name}: ours / bergson, rows a second", rate, cases.ORDINARY_RATE, False
            )
            yield Verdict(f"{name}: ours / bergson, error", error, 1.0, True)
            yield Verdict(f"{name}: ours / bergson, bytes a row", kept, cases.ORDINARY_BYTES, True)


def _job(found: Found) -> Iterator[Verdict]:
    sides = found.get("job", {}).get("job", {})
    if len(sides) < 2:
        return
    ours, theirs = (_seconds(sides[side]) for side in ("ours", "published"))
    for rows in sorted(set(ours) & set(theirs)):
        ratio = theirs[rows] / ours[rows]
        yield Verdict(
            f"gsm8k, {rows} rows: published / ours, seconds", ratio, cases.JOB_TIME, False
        )
    time, memory = (
        [sides[side][what]["whole"] for side in ("ours", "published")]
        for what in ("seconds", "peak_anonymous")
    )
    what = "gsm8k, all rows, extrapolated: "
    if None not in time:
        ratio = time[1] / time[0]
        yield Verdict(f"{what}published / ours, seconds", ratio, cases.JOB_TIME, False)
    if None not in memory:
        ratio = memory[0] / memory[1]
        yield Verdict(f"{what}ours / published, memory", ratio, cases.JOB_MEMORY, True)


def _seconds(side: Found) -> dict[int, float]:
    """The median over runs, by number of rows."""
    rows = {run["rows"] for run in side["runs"]}
    return {n: median(r["seconds"] for r in side["runs"] if r["rows"] == n) for n in rows}
