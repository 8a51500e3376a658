"""One case, measured: step gradients and sketches against per-row autograd, or the refusal.

The step gradients come from `sdi.ExactGradients` and the sketches from `sdi.Sketcher`, both on the
whole batch. The oracle runs each row's own batch, as the case makes it, alone. The self-check runs
as well, for it is what stops a user where rows are not told apart.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import sdi
from sdi.attention import torchs_own
from sdi.errors import SdiError
from sdi.oracle import step_gradients
from sdi.sketch.reference import sketch_of_gradient
from tests.zoo.case import RIGHT, Case, names

DIM = 256
ROUNDING = 2.0**-24  # of a row's whole gradient, in float32
Row = tuple[list[dict[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class Outcome:
    """What one entry gave.

    Attributes:
        name: of the entry.
        expected: "right", or a regular expression of the refusal.
        steps: number of steps; None where refused.
        error: largest relative error of a step gradient, over rows, steps and parameters.
        worst: "parameter, step, row" where that was.
        sketch: largest relative error of a sketch against the sketch of the exact gradient.
        bound: what counts as right.
        refused: the message of the refusal, or "".
        broken: another exception's text, or "".
        seconds: what it took.
    """

    name: str
    expected: str
    bound: float = 1e-4
    steps: int | None = None
    error: float | None = None
    worst: str = ""
    sketch: float | None = None
    refused: str = ""
    broken: str = ""
    seconds: float = 0.0

    @property
    def right(self) -> bool:
        """Whether both errors are within the bound."""
        if self.refused or self.broken or self.error is None or self.sketch is None:
            return False
        return self.error <= self.bound and self.sketch <= self.bound

    @property
    def passes(self) -> bool:
        """Right, or refused as declared."""
        declared = self.expected != RIGHT and bool(re.search(self.expected, self.refused))
        return self.right or bool(self.refused and declared)

    @property
    def verdict(self) -> str:
        """One word."""
        if self.right:
            return "right"
        if self.refused:
            return "refused" if self.passes else "REFUSED"
        return "BROKEN" if self.broken else "WRONG"


def measure(name: str, make: Callable[[], Case], seed: int = 0) -> Outcome:
    """Build the case with torch's generator seeded, and measure it."""
    begin = time.monotonic()
    torch.manual_seed(seed)
    case = make()
    found: dict[str, Any] = {}
    try:
        _compare(case, found)
    except SdiError as error:
        found["refused"] = f"{type(error).__name__}: {error}"
    except Exception as error:
        found["broken"] = f"{type(error).__name__}: {error}"
    return Outcome(name, case.expected, case.bound, **found, seconds=time.monotonic() - begin)


def _compare(case: Case, found: dict[str, Any]) -> None:
    loop = sdi.Loop(case.model, case.body, tied=case.tied, **case.options)
    ids = names(case.rows)
    sketcher = sdi.Sketcher(loop, dim=DIM, loss=case.loss)
    with torchs_own():  # what can be compared closely; the self-check compares the other loosely
        exact = sdi.ExactGradients(loop, case.loss)(case.batch, ids)
        part = sketcher(case.batch, ids)
    oracle = _oracle(case, loop, len(part.steps))
    found["steps"] = len(part.steps)
    if case.steps not in (None, len(part.steps)):
        found["broken"] = f"{len(part.steps)} steps, where {case.steps} were expected"
    found["error"], found["worst"] = _step_error(exact, oracle)
    found["sketch"] = _sketch_error(part, oracle, sketcher)
    hidden = case.reference is not None  # from per-row autograd, which the self-check runs too
    if not hidden or max(found["error"], found["sketch"]) > case.bound:
        sdi.self_check(sketcher, case.batch, ids)


def _oracle(case: Case, loop: sdi.Loop, count: int) -> list[Row]:
    """Each row's step gradients, filled up with zeros to so many steps, and its total."""
    loss = case.reference or case.loss
    wanted = list(loop.parameters())
    found = [step_gradients(loop, case.row(i), loss, wanted) for i in range(case.rows)]
    return [(_filled(steps, total, count, loop.outside), total) for steps, total in found]


def _filled(
    steps: list[dict[str, Tensor]], total: dict[str, Tensor], count: int, outside: bool
) -> list[dict[str, Tensor]]:
    """A row alone may take fewer steps; where there is a coda it stays last."""
    zeros = {name: torch.zeros_like(gradient) for name, gradient in total.items()}
    end = len(steps) - outside
    return [*steps[:end], *([zeros] * (count - len(steps))), *steps[end:]]


def _step_error(exact: sdi.Part, oracle: list[Row]) -> tuple[float, str]:
    """Error over max(‖step‖, 1e-6‖total‖) of a parameter, its maximum and where that is.

    Where step and error are both below float32's rounding of the row's whole gradient there is
    nothing to compare: a key's bias, say, which the softmax cancels.
    """
    worst, where = 0.0, ""
    for row, (steps, total) in enumerate(oracle):
        nothing = ROUNDING * sum(float(t.double().norm()) ** 2 for t in total.values()) ** 0.5
        for name, place in exact.names.items():
            for step, true in enumerate(gradients[name].double() for gradients in steps):
                ours = torch.zeros_like(true)
                if step < exact.values.shape[1]:
                    ours = exact.values[row, step, place].double().view_as(true)
                gap, size = float((ours - true).norm()), float(true.norm())
                error = _relative(gap, max(size, 1e-6 * float(total[name].double().norm())))
                if not error <= worst and not max(gap, size) <= nothing:
                    worst, where = error, f"{name}, step {step + 1}, row {row}"
    return worst, where


def _relative(gap: float, floor: float) -> float:
    return gap / floor if floor else (0.0 if gap == 0 else float("inf"))


def _sketch_error(part: sdi.Part, oracle: list[Row], sketcher: sdi.Sketcher) -> float:
    """Largest error of a row's step sketch over max(‖sketch of the step‖, 1e-6‖of the total‖)."""
    worst = 0.0
    for row, (steps, total) in enumerate(oracle):
        whole = _sketched(total, sketcher)
        for step in range(part.values.shape[1]):
            true = _sketched(steps[step], sketcher)
            floor = max(float(true.norm()), 1e-6 * float(whole.norm()))
            gap = float((part.values[row, step].double() - true).norm())
            error = _relative(gap, floor)
            worst = worst if error <= worst else error  # not `max`, which may drop a NaN
    return worst


def _sketched(gradients: dict[str, Tensor], sketcher: sdi.Sketcher) -> Tensor:
    parts = [sketch_of_gradient(sketcher.hashing, n, g) for n, g in gradients.items()]
    return torch.stack(parts).sum(dim=0)
