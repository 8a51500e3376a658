"""Any operation: its vector-Jacobian product, one row of the batch after another.

Row b's gradient is the vector-Jacobian product of the operation at δ with every other row set to
zero. That is the definition, and needs no knowledge of the operation. Where operands and output
are rows-first, the operation is run on row b alone, which costs a B-th; the rows' sum is held
against the operation's own gradient, and the masked form, always right, serves where they differ.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sdi.errors import CaptureError
from sdi.rules.use import Use

Gradients = dict[tuple[str, Any], Tensor | None]


def generic_rule(use: Use) -> bool:
    """Per-example vector-Jacobian products of one operation; serves whatever has no rule."""
    if use.delta.ndim == 0 or use.delta.shape[0] % use.batch:
        raise CaptureError(
            f"{use.label}: the output of shape {tuple(use.delta.shape)} cannot be split into the "
            f"{use.batch} rows of the batch. Put the batch axis first, or sketch one row a batch."
        )
    rows = _sliced(use) if use.batch > 1 else None
    if rows is None:
        rows = [_row(use, b, False) for b in range(use.batch)]
    for at, weight in use.weights.items():
        found = [row[at] for row in rows]
        if any(g is not None for g in found):
            zero = torch.zeros_like(weight.tensor)
            weight.emit(use.sink, use.step, torch.stack([zero if g is None else g for g in found]))
    return True


def _sliced(use: Use) -> list[Gradients] | None:
    """Every row's gradients by running the operation on that row alone; None where that is wrong.

    All rows are checked at once: their sum must be the gradient that the whole operation has.
    """
    try:
        rows = [_row(use, b, True) for b in range(use.batch)]
    except (RuntimeError, IndexError, ValueError, TypeError):
        return None
    whole = _row(use, None, False)
    return rows if all(_adds_up([row[at] for row in rows], whole[at]) for at in whole) else None


def _adds_up(rows: list[Tensor | None], whole: Tensor | None) -> bool:
    found = [row for row in rows if row is not None]
    if whole is None or not found:
        return whole is None and not found
    tolerance = 1e-2 if whole.dtype in (torch.bfloat16, torch.float16) else 1e-5
    gap = whole - torch.stack(found).sum(dim=0)
    size = sum((row.norm() for row in found), whole.norm())
    return bool(gap.norm() <= tolerance * size + 1e-30)


def _row(use: Use, row: int | None, sliced: bool) -> Gradients:
    """Gradient of every weight of the use for one row, or for all rows where it is None."""
    leaves = {at: w.tensor.detach().requires_grad_() for at, w in use.weights.items()}
    delta, size = use.delta, use.delta.shape[0] // use.batch
    own = slice(None) if row is None else slice(row * size, (row + 1) * size)

    def pick(at: tuple[str, Any], value: Any) -> Any:
        if at in leaves:
            return leaves[at]
        if isinstance(value, tuple | list):
            return type(value)(pick((at[0], (at[1], j)), v) for j, v in enumerate(value))
        if not isinstance(value, Tensor):
            return value
        if sliced and use.is_rowwise(value) and value.ndim and value.shape[0] % use.batch == 0:
            each = value.shape[0] // use.batch
            return value if row is None else value[row * each : (row + 1) * each]
        return value

    with torch.enable_grad():
        args = [pick(("args", i), v) for i, v in enumerate(use.args)]
        kwargs = {k: pick(("kwargs", k), v) for k, v in use.kwargs.items()}
        output = use.function(*args, **kwargs)
    if not output.requires_grad:  # only its shape or type was taken from the weight
        return dict.fromkeys(leaves)
    if sliced:
        grad = delta[own]
        if output.shape != grad.shape:
            raise ValueError("not sliceable")
    else:
        grad = torch.zeros_like(delta)
        grad[own] = delta[own]
    found = torch.autograd.grad(output, list(leaves.values()), grad, allow_unused=True)
    return dict(zip(leaves, found, strict=True))
