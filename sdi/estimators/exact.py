"""Exact step gradients, all parameters of the body side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sdi.capture import Loss, capture
from sdi.loop import Loop
from sdi.losses import causal_lm_loss, check_losses
from sdi.part import Part
from sdi.sinks import ExactSink


class ExactGradients:
    """φ_s(z) itself: (B, S, D) for a body small enough to hold it.

    Args:
        loop: model and body.
        loss: (model, batch) → (B,).

    The values are exact to rounding; the cost is that of a backward pass plus B·S·D numbers.
    """

    def __init__(self, loop: Loop, loss: Loss = causal_lm_loss) -> None:
        self.loop = loop
        self.loss = loss

    def __call__(self, batch: Any, ids: Sequence[str]) -> Part:
        """Step gradients of one batch; `ids` are the B examples' own strings.

        Raises:
            CaptureError, LoopError, LossError: as `sdi.Sketcher`.
        """
        ids = tuple(ids)
        shapes = {n: tuple(p.shape) for n, p in self.loop.parameters().items()}
        sink = ExactSink(shapes)

        def check(losses: Tensor) -> None:
            check_losses(losses, ids)

        trace = capture(self.loop, batch, self.loss, sink, ids, check)
        names, values = flatten(sink, shapes, len(ids), trace.steps)
        return Part(
            ids,
            values,
            values.norm(dim=2),
            trace.labels,
            trace.losses,
            trace.detached,
            names,
        )


def flatten(
    sink: ExactSink, shapes: dict[str, tuple[int, ...]], rows: int, steps: int
) -> tuple[dict[str, slice], Tensor]:
    """The sink's gradients as one (rows, S, D) tensor, and where each parameter lies in D."""
    names: dict[str, slice] = {}
    end = 0
    for name, shape in shapes.items():
        size = int(torch.Size(shape).numel())
        names[name] = slice(end, end + size)
        end += size
    wide = any(g.dtype == torch.float64 for g in sink.gradients.values())
    dtype = torch.float64 if wide else torch.float32
    device = next((g.device for g in sink.gradients.values()), torch.device("cpu"))
    values = torch.zeros(rows, steps, end, dtype=dtype, device=device)
    for (name, step), gradient in sink.gradients.items():
        values[:, step, names[name]] = gradient.reshape(rows, -1).to(dtype)
    return names, values
