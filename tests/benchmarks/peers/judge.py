"""What a driver does: hands each case to each way of using a library and prints a JSON verdict.

A way of using a library (`Way`) maps a case to inner products of per-row gradients, (N, Q), or
resolved by steps, (N, Q, S). It is *right* where their relative error (Frobenius) against per-row
autograd in float64 is below `EXACT`; for a random projection below `WITHIN` times the error that
its dimension explains. An exception is a *refusal* where the library's own words say that it does
not do this (`refusals`, phrases read off its source), and a *crash* otherwise.
"""

from __future__ import annotations

import json
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import permutations
from typing import Literal

import torch
from cases import Case, Exact, exact, mistakes
from torch import Tensor

EXACT = 1e-4
WITHIN = 3.0
Status = Literal["right", "wrong", "crash", "refused"]


@dataclass(frozen=True)
class Way:
    """One way of using a library.

    Attributes:
        name: as printed.
        scores: case → (N, Q) or (N, Q, S).
        dim: of the random projection, where it cannot be switched off.
        refusals: phrases that mark an exception as a refusal.
        note: why the loop goes wrong, read off the library's source; printed only if it does.
        only: names of the cases that it is asked; all if empty.
        again: the same with other seeds of a projection.
    """

    name: str
    scores: Callable[[Case], Tensor]
    dim: int | None = None
    refusals: tuple[str, ...] = ()
    note: str = ""
    only: tuple[str, ...] = ()
    again: tuple[Callable[[Case], Tensor], ...] = ()


@dataclass(frozen=True)
class Verdict:
    """One line of the table.

    Attributes:
        way, case: names.
        status: see the module's docstring.
        error: relative error of the (N, Q) matrix; None where there is none.
        steps: relative error of the (N, Q, S) one; None where steps are not resolved.
        expected: error that the projection alone explains; 0 without one.
        message: the exception, or what the wrong numbers are.
        note: see `Way`.
        warned: warnings that came with numbers.
        versions: of what took part.
    """

    way: str
    case: str
    status: Status
    error: float | None
    steps: float | None
    expected: float
    message: str
    note: str = ""
    warned: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)


def judge(way: Way, case: Case) -> Verdict:
    """Run one way of using a library on one case."""
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            runs = [scores(case).detach().double().cpu() for scores in (way.scores, *way.again)]
    except Exception as problem:  # whatever a library raises is a line of the table
        print(traceback.format_exc(), file=sys.stderr)  # noqa: T201
        said = f"{type(problem).__name__}: {problem}".replace("\n", " ").strip()
        refused = any(phrase in said for phrase in way.refusals)
        status: Status = "refused" if refused else "crash"
        return Verdict(way.name, case.name, status, None, None, 0.0, said, way.note)
    said = tuple(sorted({re.sub(r"\s*(See )?http.*|\n.*", "", str(w.message)) for w in caught}))
    return replace(_compare(way, case, torch.stack(runs), exact(case)), warned=said)


def _compare(way: Way, case: Case, found: Tensor, true: Exact) -> Verdict:
    """The verdict on `found`, (runs, N, Q) or (runs, N, Q, S)."""
    noise, step_noise = (0.0, 0.0) if way.dim is None else true.noise(way.dim)
    if case.later:  # a shuffling loader gives no ids: the best order of the rows is granted
        found = torch.stack([_best_order(run, true) for run in found])
    resolved = found.ndim == 4
    total = found.sum(3) if resolved else found
    error, steps = _error(total, true.tracin), None
    problems = []
    if error > max(EXACT, WITHIN * noise):
        problems.append(_explain(case, total.mean(0), noise * float(true.tracin.norm())))
    if resolved and found.shape[1:] == true.steps.shape:
        steps = _error(found, true.steps)
        if not problems and steps > max(EXACT, WITHIN * step_noise):
            problems.append("the sum over steps is right, the steps are not")
    elif resolved:
        counts = f"reports {found.shape[3]} steps where the loop has {true.steps.shape[2]}"
        problems = [counts, *(problems or ["the sum is right"])]
    status: Status = "wrong" if problems else "right"
    message = "; ".join(problem for problem in problems if problem)
    return Verdict(way.name, case.name, status, error, steps, noise, message, way.note)


def _error(found: Tensor, true: Tensor) -> float:
    """Relative error, root mean square over the first axis."""
    if found.shape[1:] != true.shape or not bool(torch.isfinite(found).all()):
        return float("inf")
    squares = (found - true).square().flatten(1).sum(1).mean()
    return float(squares.sqrt() / true.norm())


def _best_order(found: Tensor, true: Exact) -> Tensor:
    target = true.tracin if found.ndim == 2 else true.steps
    orders = (found[list(order)] for order in permutations(range(len(found))))
    return min(orders, key=lambda rows: _error(rows[None], target))


def _explain(case: Case, found: Tensor, noise: float) -> str:
    """The known mistake whose numbers these are, if any; `noise` is an absolute error."""
    for what, mistaken in mistakes(case).items():
        size = min(float(mistaken.norm()), float(exact(case).tracin.norm()))
        if _error(found[None], mistaken) <= max(EXACT, WITHIN * noise / size):
            return what
    return "no row order makes it right" if case.later else ""


def drive(ways: Sequence[Way], cases: Sequence[Case], packages: Sequence[str]) -> None:
    """Judge every way on every case; print one JSON list as the last line."""
    torch.set_num_threads(1)
    versions = {name: _version(name) for name in ("torch", *packages)}
    asked = [(way, case) for way in ways for case in cases]
    verdicts = [judge(way, case) for way, case in asked if not way.only or case.name in way.only]
    print()  # noqa: T201
    print(json.dumps([{**asdict(v), "versions": versions} for v in verdicts]))  # noqa: T201


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
