"""Each parameter's gradient at each step: its norm, and how far it is from per-row autograd.

The self-check says whether a body can be attributed; this says what its steps look like. It goes
one group of parameters at a time, so that memory is bounded for a body of any size, and repeats the
pass for each group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdi.batchrows import row_alone
from sdi.capture import Loss, capture
from sdi.loop import Loop
from sdi.losses import check_losses
from sdi.oracle import step_gradients
from sdi.partial import OnlySome, groups_of
from sdi.selfcheck import SMALL
from sdi.sinks import ExactSink


@dataclass(frozen=True)
class StepNorms:
    """One parameter of the body.

    Attributes:
        name: canonical name.
        shape: of the parameter.
        norms: S numbers, the root mean square over the rows of ‖φ_s‖.
        error: largest relative error of a step gradient against per-row autograd, as the
            self-check measures it; infinite where a row alone runs more steps than in its batch.
    """

    name: str
    shape: tuple[int, ...]
    norms: tuple[float, ...]
    error: float


def step_norms(
    loop: Loop,
    batch: Any,
    ids: Sequence[str],
    loss: Loss,
    steps: int,
    *,
    memory: int = 512 << 20,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[StepNorms]:
    """Every attributed parameter in turn.

    Args:
        loop: model and body.
        batch: B rows, as the loss takes them; all are measured.
        ids: the B ids.
        loss: (model, batch) → (B,).
        steps: S, as a sketch of the same batch has it.
        memory: bytes that the exact gradients of a group may take.
        progress: called with (parameters done, parameters in all).

    Raises:
        CaptureError, LoopError, LossError: as `sdi.Sketcher`.
    """
    ids = tuple(ids)
    shapes = {name: tuple(p.shape) for name, p in loop.parameters().items()}
    groups = list(groups_of(shapes, steps * len(ids), memory))
    done = 0
    for names in groups:
        if progress is not None and len(groups) > 1:
            progress(done, len(shapes))
        sink = ExactSink({name: shapes[name] for name in names})
        chosen = OnlySome(sink, set(names))
        capture(loop, batch, loss, chosen, ids, lambda found: check_losses(found, ids))
        errors = _errors(loop, batch, ids, loss, names, sink, steps)
        for name in names:
            norms = tuple(_rms(sink.gradients.get((name, step))) for step in range(steps))
            yield StepNorms(name, shapes[name], norms, errors[name])
        done += len(names)


def _rms(gradient: Tensor | None) -> float:
    """Root mean square over the rows of the norm of a (B, ...) gradient; 0 where there is none."""
    if gradient is None:
        return 0.0
    return float(gradient.double().flatten(1).square().sum(dim=1).mean().sqrt())


def _errors(
    loop: Loop,
    batch: Any,
    ids: Sequence[str],
    loss: Loss,
    names: list[str],
    sink: ExactSink,
    steps: int,
) -> dict[str, float]:
    """Parameter name → largest relative error over rows and steps."""
    worst = dict.fromkeys(names, 0.0)
    for row, identity in enumerate(ids):
        alone = row_alone(batch, row, len(ids), loop.layouts)
        true, total = step_gradients(loop, alone, loss, names, identity)
        floor = SMALL * max(float(t.double().norm()) for t in total.values())
        for name in names:
            zero = torch.zeros_like(total[name])
            if len(true) > steps:
                worst[name] = float("inf")
                continue
            captured = [sink.gradients.get((name, step)) for step in range(steps)]
            ours = [zero if g is None else g[row] for g in captured]
            theirs = [step[name] for step in true]
            end = len(theirs) - loop.outside  # before the coda
            theirs[end:end] = [zero] * (steps - len(theirs))
            worst[name] = max(worst[name], _error(ours, theirs, total[name], floor))
    return worst


def _error(ours: list[Tensor], theirs: list[Tensor], total: Tensor, floor: float) -> float:
    """Over the largest of ‖step‖, 1e-6‖total‖ (no smaller than the largest step) and `floor`."""
    wide = [step.double() for step in theirs]
    largest = max(float(total.double().norm()), *(float(step.norm()) for step in wide))
    found = [
        float((mine.double() - true).norm()) / max(float(true.norm()), 1e-6 * largest, floor, 1e-12)
        for mine, true in zip(ours, wide, strict=True)
    ]
    return float("inf") if any(e != e for e in found) else max(found)
