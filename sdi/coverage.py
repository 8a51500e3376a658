"""How much of a model is attributed: by parameters, by squared gradient norm, and by which rules.

The gradient's share is measured by plain autograd on single rows, so that it owes nothing to
capture and is there for a model that capture refuses. Each parameter's gradient is dropped as soon
as its norm is known; what a pass holds is one gradient, not one of the whole model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sdi.batchrows import row_alone
from sdi.capture import Loss
from sdi.eager import eager
from sdi.loop import Loop, canonical


@dataclass(frozen=True)
class GradientShare:
    """What of the gradient is attributed; squared norms, added up over the rows measured.

    Attributes:
        rows: ids of the rows.
        of_model: ‖∇ of the attributed parameters‖² over ‖∇ of all that require a gradient‖²; None
            where there is no gradient at all.
        of_body: the same over the body's parameters that require a gradient.
        skipped: name → share of the body's squared norm, for what was skipped by request.
        norms: name → root mean square over the rows of the norm of its gradient, for every
            parameter of the model that requires a gradient.
    """

    rows: tuple[str, ...]
    of_model: float | None
    of_body: float | None
    skipped: dict[str, float] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For the manifest: the shares, without the norms."""
        return {"of_model": self.of_model, "of_body": self.of_body, "skipped": self.skipped}


def gradient_share(
    loop: Loop, batch: Any, ids: Sequence[str], loss: Loss, rows: Sequence[str] | None = None
) -> GradientShare:
    """Measure the share of the gradient that the attributed parameters have.

    Args:
        loop: model and body.
        batch: B rows, as the loss takes them.
        ids: the B ids.
        loss: (model, batch) → (B,).
        rows: ids of the rows to measure, each alone; all by default.

    The model is left as it was found: gradients that parameters held are put back.
    """
    ids = tuple(ids)
    chosen = ids if rows is None else tuple(name for name in ids if name in set(rows))
    squares: dict[str, float] = {}
    for name in chosen:
        row = row_alone(batch, ids.index(name), len(ids), loop.layouts)
        for parameter, square in squared_norms(loop.model, row, loss).items():
            squares[parameter] = squares.get(parameter, 0.0) + square
    body = {name: squares.get(name, 0.0) for name in loop.all_parameters()}
    attributed = sum(body[name] for name in loop.parameters())
    inside = sum(body.values())
    skipped = {name: _ratio(body[name], inside) or 0.0 for name in sorted(loop.skipped)}
    count = max(1, len(chosen))
    return GradientShare(
        rows=chosen,
        of_model=_ratio(attributed, sum(squares.values())),
        of_body=_ratio(attributed, inside),
        skipped=skipped,
        norms={name: (square / count) ** 0.5 for name, square in squares.items()},
    )


def squared_norms(model: nn.Module, row: Any, loss: Loss) -> dict[str, float]:
    """Canonical name → ‖∇‖² of Σ loss, for each parameter of the model that requires a gradient."""
    named = {canonical(n): p for n, p in model.named_parameters() if p.requires_grad}
    found = dict.fromkeys(named, 0.0)
    with _measuring(named, found), eager(), torch.enable_grad():
        value = loss(model, row).sum()
        if value.requires_grad:  # a loss that ran under no_grad has a gradient of zero
            value.backward()  # type: ignore[no-untyped-call]
    return found


@contextmanager
def _measuring(named: Mapping[str, nn.Parameter], found: dict[str, float]) -> Iterator[None]:
    """Meanwhile a gradient that reaches a parameter is measured and dropped."""
    kept = [(parameter, parameter.grad) for parameter in named.values()]
    handles = []
    for name, parameter in named.items():
        parameter.grad = None
        hook: Any = partial(_measure, found, name)
        handles.append(parameter.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, gradient in kept:
            parameter.grad = gradient


def _measure(found: dict[str, float], name: str, parameter: Tensor) -> None:
    gradient = parameter.grad
    parameter.grad = None
    if gradient is None:
        return
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    found[name] += float(torch.linalg.vector_norm(values, dtype=dtype)) ** 2


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None


def served(loop: Loop, rules: Mapping[str, Sequence[str]]) -> dict[str, dict[str, int]]:
    """Rules → how many tensors and parameters they serve; "unused" are those no use was seen of.

    Args:
        loop: model and body.
        rules: parameter name → names of the rules that served it, as `Sketcher.coverage` has them.
    """
    counts: dict[str, dict[str, int]] = {}
    for name, parameter in loop.parameters().items():
        kind = " + ".join(sorted(rules.get(name, ()))) or "unused"
        count = counts.setdefault(kind, {"tensors": 0, "parameters": 0})
        count["tensors"] += 1
        count["parameters"] += parameter.numel()
    return dict(sorted(counts.items(), key=lambda item: -item[1]["parameters"]))
