"""Calls that move, pick or repeat what a tensor holds: where its rows went.

Not interpreted, argument by argument, but tried: the same call on a tensor that holds the number of
the place in every element shows where the places went. It has stride 0 along all other axes, so
that it takes no memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdi.rowtags import FIRST, LOST, Rows, Tag, layout, leaves

_GETTERS: Any = Tensor  # property objects, which the stubs declare as tensors
MOVING_GETTERS = {getattr(_GETTERS, name).__get__ for name in ("T", "mT", "H", "mH")}
MOVES = {
    "t", "transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis",
    "adjoint", "rot90", "flip", "roll", "expand", "expand_as", "broadcast_to", "select", "narrow",
    "unbind", "chunk", "split", "tensor_split", "split_with_sizes", "unfold", "diagonal",
    "__getitem__", "index_select", "masked_select", "take_along_dim", "repeat", "tile",
    "repeat_interleave", "gather", "unsafe_chunk", "unsafe_split", "hsplit", "vsplit", "dsplit",
}  # fmt: skip
VIEWS = MOVES - {
    "rot90", "flip", "roll", "index_select", "masked_select", "take_along_dim", "repeat", "tile",
    "repeat_interleave", "gather",
}  # fmt: skip


_KNOWN: dict[Any, list[Tag]] = {}
_KNOWN_LIMIT = 4096


def moved(
    func: Any, args: Any, kwargs: Any, source: Tensor, rows: Tag, found: Sequence[Tensor], b: int
) -> list[Tag]:
    """The layouts of the outputs `found` of a call that moves or picks what `source` holds.

    Args:
        source: the first operand, or the one called `input`.
        rows: its tag.
        b: B.
    """
    key = _key(func, args[1:], kwargs, source, rows, b)
    if key is None:
        return _tried(func, args, kwargs, source, rows, found, b)
    answer = _KNOWN.get(key)
    if answer is None:  # a loop makes the same calls over and over
        answer = _tried(func, args, kwargs, source, rows, found, b)
        if len(_KNOWN) >= _KNOWN_LIMIT:
            _KNOWN.clear()
        _KNOWN[key] = answer
    return answer


def _key(func: Any, rest: Any, kwargs: Any, source: Tensor, rows: Tag, b: int) -> Any:
    """All that the answer depends on, or None where it depends on what a tensor holds."""
    if isinstance(rows, Rows) and rows.ids is not None:
        return None
    where = (rows.count, rows.stride) if isinstance(rows, Rows) else rows
    said = _hashable((rest, *((k, v) for k, v in kwargs.items() if k not in ("input", "out"))))
    return None if said is None else (func, said, source.shape, source.device, where, b)


def _hashable(value: Any) -> Any:
    """Numbers, slices and nested sequences of them as tuples; None where there is anything else."""
    if value is None or value is Ellipsis or isinstance(value, int | str):
        return (type(value), value)
    if isinstance(value, slice):
        return _hashable((slice, value.start, value.stop, value.step))
    if value is slice:
        return (slice,)
    if isinstance(value, list | tuple):
        items = tuple(_hashable(item) for item in value)
        return None if None in items else (type(value), items)
    return None


def _tried(
    func: Any, args: Any, kwargs: Any, source: Tensor, rows: Tag, found: Sequence[Tensor], b: int
) -> list[Tag]:
    """The answer, from the call itself."""
    rest = args[1:] if args else ()
    named = {k: v for k, v in kwargs.items() if k not in ("input", "out")}
    name = getattr(func, "__name__", "")
    indexed = (name not in VIEWS and name != "__get__") or any(_is_index(v) for v in rest)
    if not indexed and rows is FIRST and all(t._is_view() and _leads_as(source, t) for t in found):
        return [FIRST for _ in found]
    known = layout(rows, source.shape, b)
    at = known.axis(source.shape) if known is not None else None
    if known is None or at is None:
        return [FIRST if rows is FIRST else LOST for _ in found]
    axis, shape, tail = at[0], source.shape, torch.Size()
    if name == "__getitem__":
        taken = max(axis + 1, _axes_taken(args[1], len(shape)))
        shape, tail = shape[:taken], shape[taken:]
    line = torch.arange(shape[axis], device=source.device if indexed else None)
    probe = line.view([-1 if i == axis else 1 for i in range(len(shape))]).expand(shape)
    with torch.no_grad():
        tried = leaves(func(probe, *rest, **named))
    owners = known.places(source.shape)
    if owners is None:
        return [LOST for _ in found]
    return [_described(known, owners.to(where.device), where, tail.numel()) for where in tried]


def _is_index(value: Any) -> bool:
    """Whether a part of a call's arguments picks single elements, so that the result is a copy."""
    if isinstance(value, tuple):
        return any(_is_index(v) for v in value)
    return isinstance(value, list | range | Tensor | np.ndarray)


def _leads_as(source: Tensor, view: Tensor) -> bool:
    """Whether a view still has the source's first axis first, and whole."""
    step = source.stride(0) if source.ndim else 0
    return bool(step and view.ndim and len(view) == len(source) and view.stride(0) == step)


def _axes_taken(index: Any, ndim: int) -> int:
    """How many leading axes an index tells about; all of them where it has an ellipsis."""
    items = index if isinstance(index, tuple) else (index,)
    if any(item is Ellipsis for item in items):
        return ndim
    masks = [i.ndim if getattr(i, "dtype", None) in (torch.bool, bool) else 1 for i in items]
    return sum(n for n, item in zip(masks, items, strict=True) if item is not None)


def _described(known: Rows, owners: Tensor, where: Tensor, below: int) -> Tag:
    """The layout of an output of which `where` tells the place on the source's row axis.

    Args:
        owners: the row of every place.
        where: as the output, less trailing axes of `below` elements.
    """
    if where.numel() == 0:
        return LOST
    for axis in reversed(range(where.ndim)):  # what has stride 0 was never the row axis
        if where.shape[axis] > 1 and where.stride(axis):
            break
        below *= where.shape[axis]
        where = where.select(axis, 0)
    while where.ndim and (where.shape[0] == 1 or not where.stride(0)):
        where = where[0]
    ids = owners[where]
    while ids.ndim > 1 and bool((ids == ids[..., :1]).all()):
        below *= ids.shape[-1]
        ids = ids[..., 0]
    while ids.ndim > 1 and bool((ids == ids[:1]).all()):
        ids = ids[0]
    return simplest(ids.reshape(-1), below, known)


def simplest(ids: Tensor, stride: int, known: Rows) -> Rows:
    """Each place's row, equal neighbours and repeated runs of places taken together."""
    ends = torch.nonzero(ids.diff(append=ids[-1:] + 1)).flatten() + 1
    run = int(np.gcd.reduce(ends.diff(prepend=ends.new_zeros(1)).cpu().numpy()))
    ids, stride = ids[::run], stride * run
    cycle = ids[: known.count]
    if len(ids) % len(cycle) == 0 and bool((ids.view(-1, len(cycle)) == cycle).all()):
        ids = cycle
    plain = known.ids is None and len(ids) == known.count
    if plain and bool((ids == torch.arange(len(ids), device=ids.device)).all()):
        return Rows(known.count, stride)
    return Rows(len(ids), stride, ids)
