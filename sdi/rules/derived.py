"""What is still a plain matrix of a parameter: its transpose, or one matrix of a stack.

Its gradient is an outer product and needs no pulling back through autograd.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sdi.rules.use import Weight

_GETTERS: Any = Tensor  # property objects, which the stubs declare as tensors
_TURNS = {Tensor.t, torch.t, _GETTERS.T.__get__, _GETTERS.mT.__get__}


def part_of_weight(
    func: Any, args: Any, kwargs: Any, parent: Weight, tensor: Tensor, number: int
) -> Weight | None:
    """The output `tensor` of a call on the weight `parent` as a weight with a name, if it is one.

    Args:
        number: which of the call's outputs it is.
    """
    if parent.name is None or not args or args[0] is not parent.tensor or kwargs:
        return None
    if tensor.ndim == parent.tensor.ndim > 1 and _turns(func, args, tensor.ndim):
        return parent.turned(tensor)
    if parent.tensor.ndim == 3 and tensor.ndim == 2 and parent.part is None:
        place = _place(func, args, number)
        if place is not None:
            return parent.matrix(place % len(parent.tensor), tensor)
    return None


def _turns(func: Any, args: Any, ndim: int) -> bool:
    """Whether a call swaps the last two axes and does nothing else."""
    if func in _TURNS:
        return ndim == 2 or func == _GETTERS.mT.__get__
    swaps = getattr(func, "__name__", "") in ("transpose", "swapaxes", "swapdims")
    return swaps and {a % ndim for a in args[1:]} == {ndim - 2, ndim - 1}


def _place(func: Any, args: Any, number: int) -> int | None:
    """Which matrix of a stack a call picks: `w[2]`, `w.select(0, 2)`, or one of `w.unbind()`."""
    name = getattr(func, "__name__", "")
    if name == "unbind" and not any(args[1:]):
        return number
    if name == "select" and args[1] == 0:
        return int(args[2])
    if name == "__getitem__" and isinstance(args[1], int):
        return int(args[1])
    if name == "__getitem__" and isinstance(args[1], Tensor) and args[1].ndim == 0:
        return None if args[1].dtype == torch.bool else int(args[1])
    return None
