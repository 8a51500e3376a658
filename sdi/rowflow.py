"""How the layout of rows passes through a torch call: from the operands' tags to the output's.

Nearly every call keeps rows first where they are first, and that costs nothing here. What moves or
picks axes is tried on numbered places (`sdi.rowmoves`). Reshapes leave a layout as it is. Products,
reductions, concatenations and einsum have a function each. All other calls are taken to keep the
axis, counted from the front, or from the end where they broadcast; a layout that does not fit the
output is LOST.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sdi.rowmoves import MOVES, MOVING_GETTERS, moved, simplest
from sdi.rowtags import FIRST, LOST, Rows, Tag, layout, leaves, settled, tag, tag_of

_RESHAPES = {
    "view", "reshape", "flatten", "unflatten", "ravel", "view_as", "reshape_as", "squeeze",
    "squeeze_", "unsqueeze", "unsqueeze_", "_unsafe_view", "contiguous", "clone",
}  # fmt: skip
_REDUCTIONS = {
    "sum", "mean", "prod", "amax", "amin", "max", "min", "std", "var", "logsumexp", "norm",
    "argmax", "argmin", "any", "all", "median", "nansum", "nanmean", "linalg_vector_norm",
    "count_nonzero",
}  # fmt: skip
_MIXING = {"sort", "argsort", "topk", "cumsum", "cumprod", "logcumsumexp", "cummax", "cummin"}
_UNKNOWN = {
    "nonzero", "unique", "unique_consecutive", "bincount", "histc", "take", "vstack", "row_stack",
    "hstack", "dstack", "column_stack", "addbmm", "addmv", "kron", "block_diag", "transpose_", "t_",
    "swapaxes_", "swapdims_", "_pack_padded_sequence",
}  # fmt: skip
_LENT = {"type_as", "to", "new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"}
_WRITES = {
    f"{name}{end}"
    for name in ("index_add", "index_copy", "index_put", "index_fill", "scatter", "scatter_add",
                 "scatter_reduce", "index_reduce", "masked_scatter")
    for end in ("", "_")
}  # fmt: skip


def pass_on(func: Any, args: Any, kwargs: Any, output: Any, carriers: list[Tensor], b: int) -> Any:
    """Tag the output of a call in which `carriers` held rows of a batch of `b`; returns it."""
    found = leaves(output)
    if not found:
        return output
    name = getattr(func, "__name__", "")
    handler = _moved if func in MOVING_GETTERS else _HANDLERS.get(name)
    if name in _LENT and _lent(name, args, found, carriers):
        return output
    if b == 1 or (handler is None and _plain(args, found, carriers)):
        return tag(output)
    owner = _only_owner(carriers)
    if owner is not None:
        rows: list[Tag] = [owner for _ in found]
    elif handler is None:
        rows = [_kept(carriers, t, b) for t in found]
    else:
        rows = list(handler(func, args, kwargs, found, carriers, b))
    for tensor, known in zip(found, rows, strict=True):
        if known is not LOST or tensor.is_floating_point() or tensor.is_complex():
            tag(tensor, settled(known, tensor.shape, b))  # lost numbers are constants
    return output


def _lent(name: str, args: Any, found: Found, carriers: list[Tensor]) -> bool:
    """Whether rows only lent their type or shape: `positions.to(x)`, `x.new_zeros(1, d)`."""
    source = args[0]
    held = any(source is t for t in carriers)
    return not held or (name.startswith("new_") and found[0].shape != source.shape)


def _only_owner(carriers: list[Tensor]) -> Tag | None:
    """The layout of what belongs to one and the same row as a whole, or None."""
    tags = [_tag(t) for t in carriers]
    rows = [t for t in tags if isinstance(t, Rows) and t.count == 1 and t.ids is not None]
    one = len(rows) == len(tags) and len({int(t.ids) for t in rows if t.ids is not None}) == 1
    return rows[0] if one else None


def _plain(args: Any, found: Found, carriers: list[Tensor]) -> bool:
    """Whether rows are first in every operand, and the output is not broadcast to more axes."""
    if not all(_tag(t) is FIRST for t in carriers):
        return False
    most = max(t.ndim for t in carriers)
    return all(t.ndim <= most or not any(a.ndim == t.ndim for a in leaves(args)) for t in found)


def _tag(tensor: Tensor) -> Tag:
    """A tensor on autograd's graph that no call tagged carries rows as well: first, it is taken."""
    known = tag_of(tensor)
    return FIRST if known is None else known


Found = Sequence[Tensor]


def _source(args: Any, kwargs: Any) -> Any:
    return args[0] if args else kwargs.get("input", kwargs.get("tensors"))


def _kept(carriers: list[Tensor], out: Tensor, b: int) -> Tag:
    """The layout of the operand that has the output's shape, or of the largest."""

    def fit(tensor: Tensor) -> tuple[bool, bool, bool, int]:
        same, told = tensor.shape == out.shape, tag_of(tensor) not in (None, LOST)
        return same, tensor.ndim == out.ndim, told, tensor.numel()

    best = max(carriers, key=fit)
    if _tag(best) is FIRST and best.ndim >= out.ndim:
        return FIRST
    known = layout(_tag(best), best.shape, b)
    at = known.axis(best.shape) if known else None
    if known is None or at is None:
        return known if known is not None and best.shape == out.shape else LOST
    axis, inner = at
    size = best.shape[axis]
    places = [axis] if best.ndim == out.ndim else [axis, axis + out.ndim - best.ndim]
    if best.ndim < out.ndim:
        places.reverse()  # broadcasting counts from the end
    fits = [p for p in places if 0 <= p < out.ndim and out.shape[p] == size]
    return _on_axis(known, out.shape, fits[0], inner) if fits else LOST


def _on_axis(known: Rows, shape: torch.Size, axis: int, inner: int) -> Rows:
    """The same places along `axis` of another shape."""
    return Rows(known.count, inner * shape[axis + 1 :].numel(), known.ids)


def _reshaped(_func: Any, args: Any, kwargs: Any, found: Found, carriers: Any, b: int) -> list[Tag]:
    source = _source(args, kwargs)
    if not any(source is t for t in carriers):
        return [_kept(carriers, t, b) for t in found]
    rows = _tag(source)
    known = layout(rows, source.shape, b)
    out: list[Tag] = []
    for tensor in found:
        same = tensor.numel() == source.numel()
        first = rows is FIRST and tensor.ndim > 0 and tensor.shape[0] % b == 0
        out.append(rows if first or known is None else known if same else LOST)
    return out


def _moved(func: Any, args: Any, kwargs: Any, found: Found, carriers: Any, b: int) -> list[Tag]:
    source = _source(args, kwargs)
    if not any(source is t for t in carriers):  # rows come by way of an index
        return [_looked_up(t, carriers, b) for t in found]
    return moved(func, args, kwargs, source, _tag(source), found, b)


def _looked_up(out: Tensor, carriers: list[Tensor], b: int) -> Tag:
    """A table read at indices that carry rows: their axes come first in the output."""
    index = max(carriers, key=lambda t: t.numel())
    rows = _tag(index)
    known = layout(rows, index.shape, b)
    if rows is FIRST or known is None:
        return rows
    if out.shape[: index.ndim] != index.shape:
        return LOST
    return Rows(known.count, known.stride * out.shape[index.ndim :].numel(), known.ids)


def _embedded(_f: Any, _a: Any, _k: Any, found: Found, carriers: Any, b: int) -> list[Tag]:
    return [_looked_up(t, carriers, b) for t in found]


def _reduced(func: Any, args: Any, kwargs: Any, found: Found, carriers: Any, b: int) -> list[Tag]:
    source = _source(args, kwargs)
    if not any(source is t for t in carriers):
        return [_kept(carriers, t, b) for t in found]
    dim = kwargs.get("dim", kwargs.get("axis", _second(func, args)))
    if isinstance(dim, Tensor):  # torch.max(x, y)
        return [_kept(carriers, t, b) for t in found]
    known = layout(_tag(source), source.shape, b)
    at = known.axis(source.shape) if known is not None else None
    if known is None or at is None:
        return [LOST for _ in found]
    dims = range(source.ndim) if dim is None else [dim] if isinstance(dim, int) else list(dim)
    gone = {d % source.ndim for d in dims}
    if at[0] in gone or not dims:
        return [LOST for _ in found]
    out: list[Tag] = []
    for tensor in found:
        keep = tensor.ndim == source.ndim
        axis = at[0] if keep else at[0] - sum(d < at[0] for d in gone)
        out.append(_on_axis(known, tensor.shape, axis, at[1]))
    return out


def _second(func: Any, args: Any) -> Any:
    at = 2 if getattr(func, "__name__", "") in ("norm", "linalg_vector_norm") else 1
    return args[at] if len(args) > at else None


def _mixed(func: Any, args: Any, kwargs: Any, found: Found, _c: Any, b: int) -> list[Tag]:
    """Sorts and running sums along an axis: lost where that is the rows' own."""
    source = _source(args, kwargs)
    name = getattr(func, "__name__", "")
    default = -1 if name in ("sort", "argsort", "topk") else None
    position = 2 if name == "topk" else 1
    dim = kwargs.get("dim", args[position] if len(args) > position else default)
    known = layout(_tag(source), source.shape, b) if isinstance(source, Tensor) else None
    at = known.axis(source.shape) if known is not None else None
    if known is None or at is None or not isinstance(dim, int) or dim % source.ndim == at[0]:
        return [LOST for _ in found]
    return [_on_axis(known, t.shape, *at) for t in found]


def _joined(func: Any, args: Any, kwargs: Any, found: Found, carriers: Any, b: int) -> list[Tag]:
    """`cat` and `stack`."""
    tensors = list(_source(args, kwargs))
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    stacked = getattr(func, "__name__", "") == "stack"
    out = found[0]
    dim %= out.ndim
    known_ids = {id(t) for t in carriers}
    held = [t for t in tensors if id(t) in known_ids]
    first = max(held, key=Tensor.numel)  # an expert without tokens says nothing
    known = layout(_tag(first), first.shape, b)
    at = known.axis(first.shape) if known is not None else None
    if known is None or at is None:
        return [LOST]
    axis, inner = at
    if stacked:
        return [_on_axis(known, out.shape, axis + (dim <= axis), inner)]
    if dim != axis:
        return [_on_axis(known, out.shape, axis, inner)]
    tensors = [t for t in tensors if t.numel()]
    parts = [layout(_tag(t), t.shape, b) for t in tensors]
    owners = [p.places(t.shape) if p else None for p, t in zip(parts, tensors, strict=True)]
    whose = [o.to(out.device) for o in owners if o is not None]
    if len(whose) < len(owners):
        return [LOST]
    return [simplest(torch.cat(whose), out.shape[dim + 1 :].numel(), Rows(b, 1))]


def _multiplied(
    func: Any, args: Any, kwargs: Any, found: Found, carriers: Any, b: int
) -> list[Tag]:
    """A matrix product: batch axes from the end, rows of the left, columns of the right."""
    operands = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    if getattr(func, "__name__", "") in ("addmm", "baddbmm"):
        operands = operands[1:]
    if getattr(func, "__name__", "") == "__rmatmul__":
        operands.reverse()
    out = found[0]
    for side, operand in enumerate(operands[:2]):
        if not any(operand is t for t in carriers):
            continue
        known = layout(_tag(operand), operand.shape, b)
        at = known.axis(operand.shape) if known is not None else None
        if known is None or at is None:
            return [_tag(operand) if operand.ndim > 2 else LOST]
        from_end = at[0] - operand.ndim
        summed = -1 if side == 0 or operand.ndim == 1 else -2
        vector = operands[1 - side].ndim == 1 and side == 0  # x @ v has lost its last axis
        if from_end == summed:
            return [LOST]
        axis = from_end + out.ndim + int(vector)
        if 0 <= axis < out.ndim and out.shape[axis] == operand.shape[at[0]]:
            return [_on_axis(known, out.shape, axis, at[1])]
        return [LOST]
    return [_kept(carriers, out, b)]


def _einsum(_f: Any, args: Any, _k: Any, found: Found, carriers: Any, b: int) -> list[Tag]:
    equation, *operands = args
    tensors = leaves(operands)
    if not isinstance(equation, str):
        return [LOST]
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow:
        joined = "".join(terms)
        right = "".join(sorted(c for c in set(joined) if joined.count(c) == 1 and c.isalpha()))
        right = "..." * ("..." in joined) + right
    for term, tensor in zip(terms, tensors, strict=True):
        if not any(tensor is t for t in carriers):
            continue
        known = layout(_tag(tensor), tensor.shape, b)
        at = known.axis(tensor.shape) if known is not None else None
        if known is None or at is None:
            return [LOST]
        axis = _letter(term, right, at[0], tensor.ndim, found[0].ndim)
        return [LOST if axis is None else _on_axis(known, found[0].shape, axis, at[1])]
    return [LOST]


def _letter(term: str, right: str, axis: int, ndim: int, out: int) -> int | None:
    """Where the axis of an operand is in the output of an einsum."""
    dots = ndim - len(term.replace("...", ""))
    letters = list(term.replace("...", "\0" * dots))
    if letters[axis] == "\0":
        after = dots - sum(c == "\0" for c in letters[:axis])
        ahead = right.partition("...")[0]
        wide = out - len(right.replace("...", ""))
        return len(ahead) + wide - after
    plain = list(right.replace("...", "\0" * (out - len(right.replace("...", "")))))
    return plain.index(letters[axis]) if letters[axis] in plain else None


def _lost(_f: Any, _a: Any, _k: Any, found: Found, _c: Any, _b: int) -> list[Tag]:
    return [LOST for _ in found]


def _written(func: Any, args: Any, kwargs: Any, found: Found, carriers: Any, b: int) -> list[Tag]:
    """Places of a tensor are overwritten or added to: its own layout stays.

    A new tensor has that of what is written into it, and its other places are nobody's.
    """
    target = _source(args, kwargs)
    if tag_of(target) is not None:
        return [_tag(target) for _ in found]
    if all(_tag(t) is FIRST for t in carriers):
        whole = target.ndim > 0 and target.shape[0] % b == 0
    else:
        whole = False
    name = getattr(func, "__name__", "").removesuffix("_")
    owners = _owners_written(name, args, target, b) if not kwargs else None
    if owners is None:
        return [FIRST if whole else LOST for _ in found]
    inner, rest = divmod(len(target), b)
    own = torch.arange(len(target), device=owners.device) // max(inner, 1)
    if not rest and inner and bool(((owners == own) | (owners < 0)).all()):
        return [FIRST for _ in found]
    return [Rows(len(target), target.shape[1:].numel(), owners) for _ in found]


def _owners_written(name: str, args: Any, target: Tensor, b: int) -> Tensor | None:
    """(len(target),) the row that was written to each place of the first axis, -1 for none."""
    if name in ("index_add", "index_copy") and len(args) > 3 and args[1] in (0, -target.ndim):
        index, value = args[2], args[3]
    elif name == "index_put" and len(args) > 2 and len(args[1]) == 1:
        index, value = args[1][0], args[2]
    else:
        return None
    index = index.nonzero().flatten() if index.dtype == torch.bool else index
    known = layout(_tag(value), value.shape, b)
    at = known.axis(value.shape) if known is not None and value.ndim else None
    places = known.places(value.shape) if known is not None else None
    if index.ndim != 1 or at is None or at[0] != 0 or places is None or not target.numel():
        return None
    owners = torch.full((len(target),), -1, dtype=torch.long, device=index.device)
    owners[index] = places.to(index.device)
    return owners


def _linear(_f: Any, args: Any, kwargs: Any, found: Found, carriers: Any, b: int) -> list[Tag]:
    source = _source(args, kwargs)
    rows = [_kept(carriers, t, b) for t in found]
    known = layout(_tag(source), source.shape, b)
    at = known.axis(source.shape) if known is not None else None
    summed = at is not None and at[0] == source.ndim - 1
    return [LOST for _ in found] if summed else rows


def _where(func: Any, args: Any, kwargs: Any, found: Found, carriers: Any, b: int) -> list[Tag]:
    return (
        _lost(func, args, kwargs, found, carriers, b)
        if len(args) == 1 and not kwargs
        else [_kept(carriers, t, b) for t in found]
    )


Handler = Callable[[Any, Any, Any, Found, list[Tensor], int], list[Tag]]
_HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(MOVES, _moved),
    **dict.fromkeys(_RESHAPES, _reshaped),
    **dict.fromkeys(_REDUCTIONS, _reduced),
    **dict.fromkeys(_MIXING, _mixed),
    **dict.fromkeys(_UNKNOWN, _lost),
    **dict.fromkeys(("cat", "concat", "concatenate", "stack"), _joined),
    **dict.fromkeys(
        ("matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "addmm", "baddbmm"), _multiplied
    ),
    **dict.fromkeys(_WRITES, _written),
    "einsum": _einsum,
    "linear": _linear,
    "embedding": _embedded,
    "where": _where,
}
