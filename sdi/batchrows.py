"""Which tensors of a batch carry rows, and what one row of it is.

Three layouts are known. *First*: the first axis is B (or, where no tensor's is, one that B divides:
a flattened batch). *Second*: no tensor's first axis is B, and the second axis of every tensor that
has two is. *Packed*: the batch has `cu_seqlens` (B + 1,), and tensors (N, ...) or (1, N, ...) hold
the tokens of all rows one after the other, N = cu_seqlens[-1].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sdi.rowtags import FIRST, Rows, Tag, leaves, settled, tag

ENDS = ("cu_seqlens", "cu_seq_lens", "cu_seq_lens_q", "cu_seq_lens_k")
LONGEST = ("max_seqlen", "max_length_q", "max_length_k")


def tagged(batch: Any, size: int) -> Any:
    """Aliases of the batch's tensors, tagged where they carry rows.

    Beside rows-first tensors one whose first axis B only divides is no row's own: positions (T,),
    say, with T = 2B.
    """
    ends = _ends(batch)
    if ends is not None:
        return _mapped(batch, lambda t: _tag_packed(t, ends, size))
    axis = _axis(batch, size)
    return _mapped(batch, lambda t: _tag_padded(t, size, axis))


def row_alone(batch: Any, row: int, size: int) -> Any:
    """Row `row` of a batch as a batch of one; tensors without a row axis stay as they are."""
    ends = _ends(batch)
    if ends is not None:
        first, last = int(ends[row]), int(ends[row + 1])
        alone = _mapped(batch, lambda t: _cut_packed(t, first, last, int(ends[-1])))
        of_row = {key: ends.new_tensor([0, last - first]) for key in ENDS if key in alone}
        longest = {key: last - first for key in LONGEST if key in alone}
        return type(alone)({**alone, **of_row, **longest})
    if _axis(batch, size) == 1:
        return _mapped(batch, lambda t: t[:, row : row + 1] if t.ndim > 1 else t)
    flat = _axis(batch, size) is None
    return _mapped(batch, lambda t: _cut_padded(t, row, size, flat))


def _ends(batch: Any) -> Tensor | None:
    if not isinstance(batch, Mapping):
        return None
    found = [batch[key] for key in ENDS if isinstance(batch.get(key), Tensor)]
    return found[0] if found else None


def _axis(batch: Any, size: int) -> int | None:
    """0 or 1, the axis of the rows; None for a flattened batch."""
    shapes = [t.shape for t in leaves(batch) if t.ndim]
    if any(shape[0] == size for shape in shapes):
        return 0
    wide = [shape for shape in shapes if len(shape) > 1]
    return 1 if wide and all(shape[1] == size for shape in wide) else None


def _tag_packed(tensor: Tensor, ends: Tensor, size: int) -> Tensor:
    alias, tokens = tensor.detach(), int(ends[-1])
    lead = int(tensor.ndim > 1 and tensor.shape[0] == 1)
    if tensor is ends or not tensor.ndim:
        return alias
    if tensor.shape[lead] == tokens:
        ids = torch.repeat_interleave(torch.arange(size), ends.diff().long().cpu())
        rows: Tag = Rows(tokens, tensor.numel() // tokens, ids.to(tensor.device))
        tag(alias, rows if size > 1 else FIRST)
    elif tensor.shape[0] == size:
        tag(alias)
    return alias


def _tag_padded(tensor: Tensor, size: int, axis: int | None) -> Tensor:
    alias, rows = tensor.detach(), None
    if axis == 1 and tensor.ndim > 1:
        known: Tag = Rows(size, tensor.numel() // (tensor.shape[0] * size))
        rows = settled(known, tensor.shape, size)
    elif axis != 1 and tensor.ndim:
        whole = tensor.shape[0] == size or (axis is None and tensor.shape[0] % size == 0)
        rows = FIRST if whole else None
    if rows is not None:
        tag(alias, rows)
    return alias


def _cut_padded(tensor: Tensor, row: int, size: int, flat: bool) -> Tensor:
    if not tensor.ndim or not (len(tensor) == size or (flat and len(tensor) % size == 0)):
        return tensor
    each = len(tensor) // size
    return tensor[row * each : (row + 1) * each]


def _cut_packed(tensor: Tensor, first: int, last: int, tokens: int) -> Tensor:
    lead = int(tensor.ndim > 1 and tensor.shape[0] == 1)
    if not tensor.ndim or tensor.shape[lead] != tokens:
        return tensor
    return tensor[:, first:last] if lead else tensor[first:last]


def _mapped(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The batch with every tensor changed, in mappings, lists, tuples and named tuples."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        named = {key: _mapped(value, change) for key, value in batch.items()}
        return named if isinstance(batch, dict) else type(batch)(named)  # type: ignore[call-arg]
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_mapped(value, change) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(_mapped(value, change) for value in batch)
    return batch
