"""Any operation: its vector-Jacobian product, one row of the batch after another.

Row b's gradient is the vector-Jacobian product of the operation at δ with every other row set to
zero. That is the definition, and needs no knowledge of the operation. Where operands and output
are rows-first, the operation is run on row b alone, which costs a B-th; the two are compared on
the first row, and the masked form, always right, serves where they differ.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sdi.errors import CaptureError
from sdi.rules.use import Use


def generic_rule(use: Use) -> bool:
    """Per-example vector-Jacobian products of one operation; serves whatever has no rule."""
    if use.delta.ndim == 0 or use.delta.shape[0] % use.batch:
        raise CaptureError(
            f"{use.label}: the output of shape {tuple(use.delta.shape)} cannot be split into the "
            f"{use.batch} rows of the batch. Put the batch axis first, or sketch one row a batch."
        )
    sliced = use.batch > 1 and _agrees(use)
    rows = [_row(use, b, sliced) for b in range(use.batch)]
    for at, weight in use.weights.items():
        found = [row[at] for row in rows]
        if any(g is not None for g in found):
            zero = torch.zeros_like(weight.tensor)
            weight.emit(use.sink, use.step, torch.stack([zero if g is None else g for g in found]))
    return True


def _agrees(use: Use) -> bool:
    """Whether running the operation on row 0 alone gives what masking gives."""
    try:
        alone, masked = _row(use, 0, True), _row(use, 0, False)
    except (RuntimeError, IndexError, ValueError, TypeError):
        return False
    return all(_close(alone[at], masked[at]) for at in use.weights)


def _close(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    tolerance = 1e-2 if a.dtype in (torch.bfloat16, torch.float16) else 1e-5
    return bool((a - b).norm() <= tolerance * b.norm() + 1e-30)


def _row(use: Use, row: int, sliced: bool) -> dict[tuple[str, Any], Tensor | None]:
    """Gradient of every weight of the use for one row."""
    leaves = {at: w.tensor.detach().requires_grad_() for at, w in use.weights.items()}
    delta, size = use.delta, use.delta.shape[0] // use.batch
    own = slice(row * size, (row + 1) * size)

    def pick(at: tuple[str, Any], value: Any) -> Any:
        if at in leaves:
            return leaves[at]
        if isinstance(value, tuple | list):
            return type(value)(pick((at[0], (at[1], j)), v) for j, v in enumerate(value))
        if not isinstance(value, Tensor):
            return value
        if sliced and use.is_rowwise(value) and value.ndim and value.shape[0] % use.batch == 0:
            each = value.shape[0] // use.batch
            return value[row * each : (row + 1) * each]
        return value

    with torch.enable_grad():
        args = [pick(("args", i), v) for i, v in enumerate(use.args)]
        kwargs = {k: pick(("kwargs", k), v) for k, v in use.kwargs.items()}
        output = use.function(*args, **kwargs)
    if sliced:
        grad = delta[own]
        if output.shape != grad.shape:
            raise ValueError("not sliceable")
    else:
        grad = torch.zeros_like(delta)
        grad[own] = delta[own]
    found = torch.autograd.grad(output, list(leaves.values()), grad, allow_unused=True)
    return dict(zip(leaves, found, strict=True))
