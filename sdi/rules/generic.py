"""Any operation: its vector-Jacobian product, one row of the batch after another.

Row b's gradient is the vector-Jacobian product of the operation at δ with every other row set to
zero. That is the definition, and needs no knowledge of the operation. Where operands and output
have their rows first, the operation is run on row b alone, which costs a B-th; the rows' sum is
held against the operation's own gradient, and the masked form, always right, serves where they
differ.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sdi.rowtags import FIRST, Tag, cannot_split, layout, leaves, masked, tag_of
from sdi.rules.use import Use

Gradients = dict[tuple[str, Any], Tensor | None]


def generic_rule(use: Use) -> bool:
    """Per-example vector-Jacobian products of one operation; serves whatever has no rule."""
    if use.batch > 1 and layout(use.rows, use.delta.shape, use.batch) is None:
        raise cannot_split(use.delta.shape, use.batch, use.label)
    plain = use.batch > 1 and all(t is FIRST for t in (use.rows, *_tags(use)))
    rows = _sliced(use) if plain else None
    if rows is None:
        rows = [_row(use, b, False) for b in range(use.batch)]
    for at, weight in use.weights.items():
        found = [row[at] for row in rows]
        if any(g is not None for g in found):
            zero = torch.zeros_like(weight.tensor)
            weight.emit(use.sink, use.step, torch.stack([zero if g is None else g for g in found]))
    return True


def _tags(use: Use) -> list[Tag]:
    found = [tag_of(t) for t in leaves((use.args, use.kwargs))]
    return [t for t in found if t is not None]


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
    aliases = {at: w.tensor.detach().requires_grad_() for at, w in use.weights.items()}

    device, dtype = use.autocast or (use.delta.device.type, torch.bfloat16)
    with torch.enable_grad(), torch.autocast(device, dtype, use.autocast is not None):
        own = row if sliced else None
        args = [_picked(use, aliases, ("args", i), v, own) for i, v in enumerate(use.args)]
        kwargs = {k: _picked(use, aliases, ("kwargs", k), v, own) for k, v in use.kwargs.items()}
        output = use.function(*args, **kwargs)
    if not output.requires_grad:  # only its shape or type was taken from the weight
        return dict.fromkeys(aliases)
    if row is None or use.batch == 1:
        grad = use.delta
    elif sliced:
        size = use.delta.shape[0] // use.batch
        grad = use.delta[row * size : (row + 1) * size]
        if output.shape != grad.shape:
            raise ValueError("not sliceable")
    else:
        grad = masked(use.delta, use.rows, use.batch, row, use.label)
    found = torch.autograd.grad(output, list(aliases.values()), grad, allow_unused=True)
    return dict(zip(aliases, found, strict=True))


def _picked(
    use: Use,
    aliases: dict[tuple[str, Any], Tensor],
    at: tuple[str, Any],
    value: Any,
    row: int | None,
) -> Any:
    """An operand: the alias of a weight, the row asked for of what has rows, or as it is."""
    if at in aliases:
        return aliases[at]
    if isinstance(value, tuple | list):
        items = (_picked(use, aliases, (at[0], (at[1], j)), v, row) for j, v in enumerate(value))
        return type(value)(items)
    rowwise = use.is_rowwise(value) and value.ndim and value.shape[0] % use.batch == 0
    if row is None or not rowwise:
        return value
    each = value.shape[0] // use.batch
    return value[row * each : (row + 1) * each]
