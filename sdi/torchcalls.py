"""Facts about torch calls and autograd graphs that capture relies on."""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LENDING = {"type_as", "to", "view_as", "reshape_as", "expand_as"}
_GETTERS: Any = Tensor  # property objects, which the stubs declare as tensors
FACTS = {
    *(getattr(_GETTERS, name).__get__ for name in (
        "shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "is_cuda",
    )),
    Tensor.size, Tensor.dim, Tensor.stride, Tensor.numel, Tensor.nelement, Tensor.__len__,
    Tensor.data_ptr, Tensor.is_contiguous, Tensor.is_floating_point, Tensor.is_complex,
}  # fmt: skip
"""What a tensor is asked that is no tensor."""
CONSTANTS = {Tensor.detach, torch.detach, _GETTERS.data.__get__}
IN_PLACE: dict[Any, Any] = {
    Tensor.__iadd__: Tensor.add,
    Tensor.__imul__: Tensor.mul,
    Tensor.__isub__: Tensor.sub,
}
IN_PLACE |= {Tensor.__itruediv__: Tensor.div, Tensor.add_: Tensor.add, Tensor.mul_: Tensor.mul}
IN_PLACE |= {Tensor.sub_: Tensor.sub, Tensor.div_: Tensor.div}


def is_composite(func: Any) -> bool:
    """A function of torch.nn.functional that is written in Python."""
    return isinstance(func, types.FunctionType) and func.__module__ == F.__name__


def entered(func: Any) -> types.FunctionType:
    """A copy of a composite function that does not dispatch itself, so its inner calls are seen."""
    off = {
        name: (lambda *_: False)
        for name in func.__globals__
        if name.startswith("has_torch_function")
    }
    scope = {**func.__globals__, **off}
    copy = types.FunctionType(
        func.__code__, scope, func.__name__, func.__defaults__, func.__closure__
    )
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy


def autocast_of(output: Tensor) -> tuple[str, torch.dtype] | None:
    """(device type, data type) of the autocast that is on where a call ran, or None."""
    kind = output.device.type
    return (kind, torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None


def graph_nodes(losses: Tensor) -> set[Any]:
    """Every node of the loss's graph."""
    seen: set[Any] = set()
    todo: list[Any] = [losses.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo.extend(parent for parent, _ in node.next_functions)
    return seen


def reachable(losses: Tensor, names: dict[int, str]) -> set[str]:
    """Names of the parameters at the leaves of the loss's graph."""
    variables = (getattr(node, "variable", None) for node in graph_nodes(losses))
    return {names[id(v)] for v in variables if v is not None and id(v) in names}


def origin(output: Tensor) -> Tensor:
    """Where to hook an output: its base if it is a plain reshape of it, else the output itself.

    `F.linear` returns a view of its product. An in-place activation rewrites the view's history,
    and a hook on it would never be called; the base keeps its own.
    """
    base = output._base
    whole = base is not None and base.numel() == output.numel() and base.grad_fn is not None
    whole = whole and base is not None and base.is_contiguous() and output.is_contiguous()
    return base if whole and base is not None else output


def unchanged(tensor: Tensor) -> Tensor:
    """The tensor: a pair of these keeps what is saved out of checkpointing."""
    return tensor
