"""Where the rows of the batch lie in a tensor.

A tensor computed from the batch carries a tag. Most have the row axis first, `(B, ...)` or
flattened `(B·T, ...)`: FIRST. Any other layout is written as `Rows`: element e, counted in logical
order, belongs to row `ids[(e // stride) % count]`. A reshape leaves that true as it stands, so that
only what moves, picks or merges axes has to be followed (`sdi.rowflow`). With the row axis second,
count is B and stride what one (t, b) holds; tokens picked for an expert, or packed one after the
other, have a place each, and `ids` says whose it is. LOST is a tensor in which rows were mixed, or
could not be followed: harmless until a parameter meets it.

Letters: B rows of the batch, n elements of one row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sdi.errors import CaptureError

_ROWS = "_sdi_rows"


@dataclass(frozen=True, eq=False)
class Rows:
    """A layout; see the module's docstring.

    Attributes:
        count: places along the row axis: B, or more where `ids` says whose each is.
        stride: elements between a place and the next.
        ids: int64 (count,), the row of each place, -1 for nobody's; None where place b is row b.
    """

    count: int
    stride: int
    ids: Tensor | None = None

    def places(self, shape: torch.Size) -> Tensor | None:
        """Row of each index along the axis that holds the rows; None where no one axis does."""
        found = self.axis(shape)
        if found is None:
            return None
        axis, inner = found
        place = torch.arange(shape[axis], device="cpu") // inner % self.count
        return place if self.ids is None else self.ids[place.to(self.ids.device)]

    def axis(self, shape: torch.Size) -> tuple[int, int] | None:
        """(axis, elements of it between two places) for a tensor of that shape, or None."""
        if self.count == 1 and shape:
            return 0, shape[0]
        below = 1
        for axis in reversed(range(len(shape))):
            above = below * shape[axis]
            if self.stride < above:
                inner, rest = divmod(self.stride, below)
                whole = not rest and shape[axis] % (inner * self.count) == 0
                return (axis, inner) if whole else None
            below = above
        return None

    @cached_property
    def _order(self) -> tuple[Tensor, Tensor, Tensor, int]:
        """Places sorted by row, their rows, their number within the row, and the largest such."""
        assert self.ids is not None
        order = torch.argsort(self.ids, stable=True)
        owner = self.ids[order]
        order, owner = order[owner >= 0], owner[owner >= 0]
        sizes = torch.bincount(owner) if len(owner) else owner
        starts = torch.cumsum(sizes, 0) - sizes
        within = torch.arange(len(owner), device=owner.device) - starts[owner]
        return order, owner, within, int(sizes.max()) if len(owner) else 0

    def gathered(self, tensor: Tensor, batch: int) -> Tensor:
        """(count, n, ...) to (B, n', ...): each row's places side by side, then zeros."""
        if self.ids is None:
            return tensor
        order, owner, within, most = self._order
        out = tensor.new_zeros(batch, max(most, 1), *tensor.shape[1:])
        out[owner, within] = tensor[order]
        return out.flatten(1, 2)


class _Mark:
    """A tag without contents."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


FIRST = _Mark("FIRST")
LOST = _Mark("LOST")
Tag = Rows | _Mark


_PLAIN = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device, slice})


def leaves(value: Any) -> list[Tensor]:
    """The tensors in nested lists, tuples and dicts."""
    found: list[Tensor] = []
    _gather((value,), found)
    return found


def _gather(values: Iterable[Any], found: list[Tensor]) -> None:
    """Called for every torch call of a pass, so what holds no tensor is passed over first."""
    for value in values:
        if type(value) in _PLAIN:
            continue
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            _gather(value, found)
        elif isinstance(value, Mapping):
            _gather(value.values(), found)


def tag_of(value: Any) -> Tag | None:
    """The tag of a tensor, or None."""
    found: Tag | None = getattr(value, _ROWS, None) if isinstance(value, Tensor) else None
    return found


def is_tagged(value: Any) -> bool:
    """Whether the value is a tensor tagged as carrying rows."""
    return isinstance(value, Tensor) and getattr(value, _ROWS, None) is not None


def tag(output: Any, rows: Tag = FIRST) -> Any:
    """Tag every tensor of an output; returns it."""
    if isinstance(output, Tensor):
        setattr(output, _ROWS, rows)
        return output
    for tensor in leaves(output):
        setattr(tensor, _ROWS, rows)
    return output


def untag(tensor: Tensor) -> None:
    """Take the tag off a tensor that outlives the pass."""
    vars(tensor).pop(_ROWS, None)


def settled(rows: Tag, shape: torch.Size, batch: int) -> Tag:
    """FIRST where the layout is just that, so that the usual case stays the quick one."""
    if isinstance(rows, Rows) and rows.count == 1:  # all of it is one row's
        return Rows(1, max(shape.numel(), 1), rows.ids)
    if not isinstance(rows, Rows) or rows.count != batch or not shape or shape[0] % batch:
        return rows
    if rows.stride * batch != shape.numel():
        return rows
    plain = rows.ids is None or rows.ids.tolist() == list(range(batch))
    return FIRST if plain else rows


def layout(rows: Tag, shape: torch.Size, batch: int) -> Rows | None:
    """The layout of a tensor of that shape written out; None where it is not known."""
    if isinstance(rows, Rows):
        return rows
    if batch == 1 and rows is FIRST:
        return Rows(1, max(shape.numel(), 1))
    if rows is FIRST and shape and shape[0] and shape[0] % batch == 0:
        return Rows(batch, max(shape.numel() // batch, 1))
    return None


def split(tensor: Tensor, rows: Tag, batch: int, what: str, features: int = 1) -> Tensor:
    """A tensor as (B, n, *features), n being whatever a row holds beside its features.

    Args:
        tensor: of any shape in which the rows lie as the tag says.
        rows: its tag.
        batch: B.
        what: how to name it in an error.
        features: how many trailing axes belong to the features.

    Raises:
        CaptureError: the rows are mixed, or lie along the features.
    """
    known = layout(rows, tensor.shape, batch)
    shape = tuple(tensor.shape[tensor.ndim - features :])
    width = torch.Size(shape).numel()
    if known is None or known.stride % width or tensor.numel() % (known.count * known.stride):
        raise cannot_split(tensor.shape, batch, what)
    if rows is FIRST:
        return tensor.reshape(batch, -1, *shape)
    parted = tensor.reshape(-1, known.count, known.stride // width, *shape)
    return known.gathered(parted.transpose(0, 1).flatten(1, 2), batch)


def cannot_split(shape: torch.Size, batch: int, what: str) -> CaptureError:
    """The refusal of a tensor whose rows cannot be told apart."""
    return CaptureError(
        f"{what}: a tensor of shape {tuple(shape)} cannot be split into the {batch} rows of the "
        f"batch: rows were mixed before (a mean over the batch, a sort across rows), or in a way "
        f"that is not followed. Keep a row axis, or sketch with batches of one row."
    )


def masked(tensor: Tensor, rows: Tag, batch: int, row: int, what: str) -> Tensor:
    """A copy of a tensor in which all but one row is zero."""
    known = layout(rows, tensor.shape, batch)
    if known is None or tensor.numel() % (known.count * known.stride):
        raise cannot_split(tensor.shape, batch, what)
    if known.ids is None:
        own = torch.zeros(known.count, dtype=torch.bool, device=tensor.device)
        own[row] = True
    else:
        own = (known.ids == row).to(tensor.device)
    parted = tensor.reshape(-1, known.count, known.stride)
    return torch.where(own[None, :, None], parted, 0).reshape(tensor.shape)
