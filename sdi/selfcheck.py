"""The check at the start of every run: a few rows of the first batch against per-row autograd."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from sdi.attention import served, torchs_own
from sdi.batchrows import row_alone
from sdi.capture import capture
from sdi.errors import LoopError, SelfCheckError
from sdi.estimators.sketched import Sketcher
from sdi.losses import check_losses
from sdi.oracle import step_gradients
from sdi.part import Part
from sdi.partial import OnlySome, groups_of
from sdi.sinks import ExactSink
from sdi.sketch.reference import sketch_of_gradient

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
SMALL = 1e-3  # of the largest gradient: below, what ought to be zero (a key's bias) is rounding
LOOSE = 2e-2  # bf16 and fp16, in the model or in our products
BROAD = 0.5  # between two roundings of attention in half precision: deep recurrences enlarge them


@dataclass(frozen=True)
class SelfCheck:
    """What was compared, and how well it agreed.

    Attributes:
        rows: ids of the rows compared.
        steps: number of steps.
        parameters: how many parameters were compared, of `of`.
        of: how many the body has.
        worst: largest relative error of a parameter's step gradient, over the largest of ‖step‖,
            1e-6 times its largest step, and 1e-3 times the largest gradient of any parameter.
        worst_at: "parameter, step" where that was.
        conservation: largest relative error of Σ_t φ_t against plain autograd.
        sketch: largest relative error of a sketch against the sketch of the exact gradient; None
            where time did not allow all parameters.
        seconds: what it took.
    """

    rows: tuple[str, ...]
    steps: int
    parameters: int
    of: int
    worst: float
    worst_at: str
    conservation: float
    sketch: float | None
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return asdict(self)


def self_check(
    sketcher: Sketcher,
    batch: Any,
    ids: Sequence[str],
    rows: int = 2,
    *,
    seconds: float = 10.0,
    memory: int = 512 << 20,
) -> SelfCheck:
    """Compare a few rows of a batch with per-row autograd, parameter group by parameter group.

    Closely without what a pass rounds or does otherwise than autograd, products in bfloat16 and
    attention in half precision; with them loosely.

    Args:
        sketcher: the estimator that is about to be used.
        batch: its first batch, B rows, laid out as `sdi.batchrows` knows.
        ids: the B ids.
        rows: how many rows to compare, spread over the batch.
        seconds: stop after this long; at least one group is compared.
        memory: bytes that the exact gradients of a group may take.

    Raises:
        SelfCheckError: at a mismatch; names the parameter, the step and the error.
        LoopError: where the body runs once only, so that there is no loop to resolve.
    """
    begin, ids = time.monotonic(), tuple(ids)
    before = served()
    part = rounded = sketched = sketcher(batch, ids)
    otherwise = served() > before
    with torchs_own():
        if otherwise:
            part = rounded = sketcher(batch, ids)
        if sketcher.rounded:  # what can be checked closely
            part = sketcher.traced(batch, ids, "float32")[0]
        _refuse_single_step(sketcher, part)
        chosen = sorted({round(i * (len(ids) - 1) / max(1, rows - 1)) for i in range(rows)})
        state = _Comparison(sketcher, part, chosen)
        groups = list(groups_of(sketcher.shapes, len(part.steps) * len(chosen), memory))
        done = 0
        for group in groups:
            state.compare(batch, group)
            done += len(group)
            if time.monotonic() - begin > seconds:
                break
    _refuse_attention(sketched, rounded)
    _refuse_rough(rounded, part)
    sketch = state.sketch_error() if done == len(sketcher.shapes) else None
    return SelfCheck(
        tuple(ids[i] for i in chosen), len(part.steps), done, len(sketcher.shapes), state.worst,
        state.worst_at, state.conservation, sketch, time.monotonic() - begin,
    )  # fmt: skip


def _refuse_single_step(sketcher: Sketcher, part: Part) -> None:
    if len(part.steps) - 2 * sketcher.loop.outside < 2:
        raise LoopError(
            f"the body {', '.join(sketcher.loop.names)} was called once: expected a loop of two "
            f"steps or more. Name the module that is called repeatedly (sdi.find_loops lists "
            f"them), or use tied=False for an ordinary stack of layers."
        )


def _refuse_attention(sketched: Part, own: Part) -> None:
    """Refuse attention in half precision that is wrong outright; `own` was made with torch's."""
    error = _largest_error(sketched, own)
    lost = float((sketched.losses - own.losses).abs().max())
    if not (error <= BROAD and lost <= 1e-3 * float(own.losses.abs().max())):
        raise SelfCheckError(
            f"attention in half precision moves a sketch by {error:.2g} of its norm (expected "
            f"below {BROAD:g}) and a loss by {lost:.2g} (expected 0). This is a defect: please "
            f"report it, and sketch within sdi.attention.torchs_own()."
        )


def _refuse_rough(rounded: Part, whole: Part) -> None:
    """Refuse products in bfloat16 that are no sketch any more; `whole` was made without."""
    error = _largest_error(rounded, whole)
    if not error <= LOOSE:
        raise SelfCheckError(
            f"products in bfloat16 move a sketch by {error:.2g} of its norm (expected below "
            f"{LOOSE:g}): the gradients of tokens cancel. Sketch with products: float32."
        )


def _largest_error(found: Part, expected: Part) -> float:
    """Of a step's sketch, relative to its norm or to a millionth of the row's."""
    norms = expected.values.norm(dim=2)
    floor = torch.maximum(norms, 1e-6 * norms.sum(dim=1, keepdim=True)).clamp_min(1e-12)
    return float(((found.values - expected.values).norm(dim=2) / floor).max())


class _Comparison:
    """Running maxima over the groups, and the sketch of the oracle's gradients."""

    def __init__(self, sketcher: Sketcher, part: Part, rows: list[int]) -> None:
        self._sketcher, self._part, self._rows = sketcher, part, rows
        dtype = next(iter(sketcher.loop.parameters().values())).dtype
        self._tolerance = TOLERANCE.get(dtype, LOOSE)
        shape = (len(rows), len(part.steps), sketcher.dim)
        self._reference = torch.zeros(shape, dtype=torch.float64)
        self._largest = 0.0
        self.worst, self.worst_at, self.conservation = 0.0, "", 0.0

    def compare(self, batch: Any, names: list[str]) -> None:
        """Compare one group of parameters."""
        sketcher, rows = self._sketcher, self._rows
        loop, loss = sketcher.loop, sketcher.loss
        sink = ExactSink({n: sketcher.shapes[n] for n in names}, rows)
        wanted = OnlySome(sink, set(names))
        ids = self._part.ids
        trace = capture(loop, batch, loss, wanted, ids, lambda found: check_losses(found, ids))
        if trace.narrow:  # autocast
            self._tolerance = LOOSE
        for at, row in enumerate(rows):
            steps, total = step_gradients(
                loop, row_alone(batch, row, len(ids), loop.layouts), loss, names, ids[row]
            )
            if len(steps) > len(self._part.steps):
                raise SelfCheckError(
                    f"row {ids[row]} alone runs {len(steps)} steps, in its batch "
                    f"{len(self._part.steps)}: the depth depends on the batch. Fix the number of "
                    f"steps while sketching, or use batches of one row."
                )
            largest = max(float(t.double().norm()) for t in total.values())
            self._largest = max(self._largest, largest)
            for name in names:
                zero = torch.zeros_like(total[name])
                ours = [sink.gradients.get((name, s)) for s in range(len(self._part.steps))]
                mine = [zero if g is None else g[at] for g in ours]
                # Steps that the row has in its batch and not alone must be zero.
                theirs = [s[name] for s in steps]
                end = len(steps) - loop.outside  # before the coda
                theirs[end:end] = [zero] * (len(ours) - len(steps))
                self._judge(at, name, mine, theirs, total[name])

    def _judge(
        self, at: int, name: str, ours: list[Tensor], theirs: list[Tensor], total: Tensor
    ) -> None:
        wide = [t.double() for t in theirs]
        scale = float(total.double().norm())
        largest = max([scale, *(float(t.norm()) for t in wide)])
        factor = self._sketcher.scales.get(name, 1.0)
        for step, (mine, true) in enumerate(zip(ours, wide, strict=True)):
            sketch = sketch_of_gradient(self._sketcher.hashing, name, true * factor)
            self._reference[at, step] += sketch
            floor = max(float(true.norm()), SMALL * self._largest, 1e-6 * largest, 1e-12)
            error = float((mine.double() - true).norm()) / floor
            if error > self.worst:
                self.worst, self.worst_at = error, f"{name}, step {step + 1}"
            if not error <= self._tolerance:
                raise SelfCheckError(
                    f"the step gradient of {name} at step {step + 1} differs from per-row autograd "
                    f"by {error:.2g} for row {self._part.ids[self._rows[at]]} (expected below "
                    f"{self._tolerance:g}). Causes: dropout left on (call model.eval()), rows that "
                    f"influence each other (batch norm, a loss averaged over the batch), or random "
                    f"numbers (seeded_rows of the loop makes them a function of the row)."
                )
        floor = max(largest, SMALL * self._largest, 1e-12)
        gap = float((torch.stack(wide).sum(dim=0) - total.double()).norm()) / floor
        self.conservation = max(self.conservation, gap)
        if not gap <= self._tolerance:
            raise SelfCheckError(
                f"the steps of {name} do not add up to its gradient: {gap:.2g} of it is missing "
                f"(expected below {self._tolerance:g}). The parameter is used outside of the body, "
                f"or the loss is random (dropout: call model.eval())."
            )

    def sketch_error(self) -> float:
        """Relative error of the sketches against the sketches of the oracle's gradients."""
        ours = self._part.values[self._rows].double().cpu()
        total = self._reference.sum(dim=1).norm(dim=1)[:, None]
        floor = torch.maximum(self._reference.norm(dim=2), 1e-6 * total).clamp_min(1e-12)
        error = float(((ours - self._reference).norm(dim=2) / floor).max())
        if not error <= self._tolerance:
            raise SelfCheckError(
                f"the sketches differ from the sketches of the exact gradients by {error:.2g} "
                f"(expected below {self._tolerance:g}). This is a defect: please report it."
            )
        return error
