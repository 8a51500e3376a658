"""Which tensors of a batch carry rows, and what one row of it is.

Three layouts are known. *First*: the first axis is B (or, where no tensor's is, one that B divides:
a flattened batch). *Second*: no tensor's first axis is B, and the second axis of every tensor that
has two is. *Packed*: the batch has `cu_seqlens` (B + 1,), and tensors (N, ...) or (1, N, ...) hold
the tokens of all rows one after the other, N = cu_seqlens[-1].

Sizes coincide: positions (T,) look like rows where T = B. So what a tensor was taken for in the
first batch, which the self-check holds against autograd, it is taken for in all that follow and
allow it; `known` remembers, by the tensor's place in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from sdi.rowtags import FIRST, Rows, Tag, leaves, settled, tag

ENDS = ("cu_seqlens", "cu_seq_lens", "cu_seq_lens_q", "cu_seq_lens_k")
LONGEST = ("max_seqlen", "max_length_q", "max_length_k")
Kind = Literal["first", "second", "flat", "none"]
Known = dict[str, Kind]


def tagged(batch: Any, size: int, known: Known) -> Any:
    """Aliases of the batch's tensors, tagged where they carry rows; `known` is added to.

    Beside rows-first tensors one whose first axis B only divides is no row's own: positions (T,),
    say, with T = 2B.
    """
    ends = _ends(batch)
    if ends is not None:
        return _mapped(batch, lambda _, t: _tag_packed(t, ends, size))
    kinds = _kinds(batch, size, known)
    if size > 1:
        known.update(kinds)
    return _mapped(batch, lambda path, t: _tag_padded(t, size, kinds[path]))


def row_alone(batch: Any, row: int, size: int, known: Known) -> Any:
    """Row `row` of a batch as a batch of one; tensors without a row axis stay as they are."""
    ends = _ends(batch)
    if ends is not None:
        alone = _mapped(batch, lambda _, t: _cut_packed(t, row, size, ends))
        length = int(ends[row + 1] - ends[row])
        of_row = {key: ends.new_tensor([0, length]) for key in ENDS if key in alone}
        longest = {key: length for key in LONGEST if key in alone}
        return type(alone)({**alone, **of_row, **longest})
    kinds = _kinds(batch, size, known)
    return _mapped(batch, lambda path, t: _cut_padded(t, row, size, kinds[path]))


def _ends(batch: Any) -> Tensor | None:
    if not isinstance(batch, Mapping):
        return None
    found = [batch[key] for key in ENDS if isinstance(batch.get(key), Tensor)]
    return found[0] if found else None


def _kinds(batch: Any, size: int, known: Known) -> Known:
    """What each tensor of a batch that is not packed is, by its place."""
    shapes = [t.shape for t in leaves(batch) if t.ndim]
    first = any(shape[0] == size for shape in shapes)
    wide = [shape for shape in shapes if len(shape) > 1]
    second = not first and bool(wide) and all(shape[1] == size for shape in wide)
    found: Known = {}

    def settle(path: str, tensor: Tensor) -> Tensor:
        fitting = [kind for kind in ("first", "second", "flat") if _fits(kind, tensor, size)]
        before = known.get(path)
        if before is not None and (before == "none" or before in fitting):
            found[path] = before
        elif first or second:
            wanted: Kind = "first" if first else "second"
            found[path] = wanted if wanted in fitting else "none"
        else:
            found[path] = "flat" if "flat" in fitting else "none"
        return tensor

    _mapped(batch, settle)
    return found


def _fits(kind: str, tensor: Tensor, size: int) -> bool:
    if kind == "second":
        return tensor.ndim > 1 and tensor.shape[1] == size
    if not tensor.ndim:
        return False
    return len(tensor) == size if kind == "first" else len(tensor) % size == 0


def _tag_packed(tensor: Tensor, ends: Tensor, size: int) -> Tensor:
    alias, tokens = tensor.detach(), int(ends[-1])
    lead = int(tensor.ndim > 1 and tensor.shape[0] == 1)
    if tensor is ends or not tensor.ndim:
        return alias
    if tensor.shape[lead] == tokens:
        owners = torch.arange(size, device="cpu")
        ids = torch.repeat_interleave(owners, ends.diff().long().cpu())
        rows: Tag = Rows(tokens, tensor.numel() // tokens, ids.to(tensor.device))
        tag(alias, rows if size > 1 else FIRST)
    elif tensor.shape[0] == size:
        tag(alias)
    return alias


def _tag_padded(tensor: Tensor, size: int, kind: Kind) -> Tensor:
    alias = tensor.detach()
    if kind == "second":
        rows: Tag = Rows(size, tensor.numel() // (tensor.shape[0] * size))
        tag(alias, settled(rows, tensor.shape, size))
    elif kind != "none":
        tag(alias)
    return alias


def _cut_padded(tensor: Tensor, row: int, size: int, kind: Kind) -> Tensor:
    if kind == "none":
        return tensor
    if kind == "second":
        return tensor[:, row : row + 1]
    each = len(tensor) // size
    return tensor[row * each : (row + 1) * each]


def _cut_packed(tensor: Tensor, row: int, size: int, ends: Tensor) -> Tensor:
    lead = int(tensor.ndim > 1 and tensor.shape[0] == 1)
    if tensor is ends or not tensor.ndim:
        return tensor
    first, last = int(ends[row]), int(ends[row + 1])
    if tensor.shape[lead] == int(ends[-1]):
        return tensor[:, first:last] if lead else tensor[first:last]
    return tensor[row : row + 1] if len(tensor) == size else tensor


def _mapped(batch: Any, change: Callable[[str, Tensor], Tensor], path: str = "") -> Any:
    """The batch with every tensor changed, in mappings, lists, tuples and named tuples."""
    if isinstance(batch, Tensor):
        return change(path, batch)
    if isinstance(batch, Mapping):
        named = {key: _mapped(value, change, f"{path}/{key}") for key, value in batch.items()}
        return named if isinstance(batch, dict) else type(batch)(named)  # type: ignore[call-arg]
    if isinstance(batch, list | tuple):
        items = [_mapped(value, change, f"{path}/{n}") for n, value in enumerate(batch)]
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    return batch
