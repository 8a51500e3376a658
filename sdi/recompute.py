"""Gradient checkpointing: what is dropped after the forward pass and computed again later.

*Non-reentrant* checkpointing drops what autograd saves and, when the first of it is needed, runs
the region again. The operands that a rule needs are therefore saved by autograd too (`Operands`):
they are dropped and come back with the rest, and so keep to the memory that checkpointing gives, or
are offloaded where a user offloads saved tensors.

*Reentrant* checkpointing runs the region without gradients first. `reentrant` gives each region
what its second run needs: the step it began in, and where the rows lie in its inputs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor

from sdi.errors import CaptureError
from sdi.rowtags import FIRST, Tag, leaves, tag, tag_of
from sdi.rules.use import Use


class _Save(torch.autograd.Function):
    """A node of autograd's graph for nothing but its saved tensors."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.detach()

    @staticmethod
    def backward(_ctx: Any, *_gradients: Tensor) -> None:
        raise AssertionError("nothing is differentiated through what is only kept")


@dataclass(frozen=True)
class _Slot:
    """Stands for the n-th saved tensor in a call's arguments."""

    number: int


class Operands:
    """Arguments of a recorded call, its activations saved as autograd saves its own.

    Args:
        args, kwargs: the call's.
        dropped: ids of the activations; weights and constants are kept as they are.

    Raises:
        RuntimeError: from `restored`, where a tensor was changed in place since.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], dropped: set[int]) -> None:
        tensors: list[Tensor] = []
        self._args = _slotted(args, dropped, tensors)
        self._kwargs = _slotted(kwargs, dropped, tensors)
        self._tags = [tag_of(t) or FIRST for t in tensors]
        self._likes = [(t.shape, t.dtype) for t in tensors]
        with torch._C.DisableTorchFunction():
            anchor = torch.empty(0, requires_grad=True)
            saved = _Save.apply(anchor, *(t.detach() for t in tensors))  # type: ignore[no-untyped-call]
        self._node = saved.grad_fn

    def restored(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments as they were, recomputed where they had been dropped."""
        tensors = list(self._node.saved_tensors)  # may run a whole region, which must be seen
        with torch._C.DisableTorchFunction():
            return self._filled(tensors)

    def shapes(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with tensors that have no data, for a rule that needs none."""
        with torch._C.DisableTorchFunction():
            return self._filled([torch.empty(s, dtype=d, device="meta") for s, d in self._likes])

    def _filled(self, tensors: list[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        tagged = [tag(t.detach(), known) for t, known in zip(tensors, self._tags, strict=True)]
        return _filled(self._args, tagged), _filled(self._kwargs, tagged)


# Functions of their own: a recursive closure would keep its tensors until the next collection.


def _slotted(value: Any, dropped: set[int], tensors: list[Tensor]) -> Any:
    """`value` with a slot for each tensor that may be dropped; these are appended to `tensors`."""
    if isinstance(value, Tensor) and id(value) in dropped:
        tensors.append(value)
        return _Slot(len(tensors) - 1)
    if type(value) in (list, tuple):
        return type(value)(_slotted(item, dropped, tensors) for item in value)
    if isinstance(value, dict):
        return {key: _slotted(item, dropped, tensors) for key, item in value.items()}
    return value


def _filled(value: Any, tensors: list[Tensor]) -> Any:
    """`value` with tensors in the place of slots."""
    if isinstance(value, _Slot):
        return tensors[value.number]
    if type(value) in (list, tuple):
        return type(value)(_filled(item, tensors) for item in value)
    if isinstance(value, dict):
        return {key: _filled(item, tensors) for key, item in value.items()}
    return value


def restored(use: Use, operands: Operands) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`operands.restored()`, refused where one was changed in place after the use."""
    try:
        return operands.restored()
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        raise CaptureError(
            f"{use.label}: an activation was modified in place after it was used, so its gradient "
            f"cannot be had. Make the in-place operation out of place."
        ) from error


def in_replayed_region() -> bool:
    """Whether a non-reentrant region runs again just now."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


Around = Callable[[], Any]


@contextmanager
def reentrant(first: Around, again: Callable[[], Around]) -> Iterator[None]:
    """While active, reentrant regions run inside `first()` and, again, inside `again()()`.

    `again` is called where a region begins in the forward pass, to note the state there.
    """
    with _patched(lambda original: _Regions(original, first, again)):
        yield


@contextmanager
def plain_regions() -> Iterator[None]:
    """While active, reentrant regions run as they are, on the graph: for per-row autograd."""
    with _patched(lambda _original: _Plain):
        yield


_ONE = threading.RLock()  # the function is torch's own, so one capture at a time


@contextmanager
def _patched(make: Callable[[Any], Any]) -> Iterator[None]:
    with _ONE:
        original = torch.utils.checkpoint.CheckpointFunction
        torch.utils.checkpoint.CheckpointFunction = make(original)  # type: ignore[misc]
        try:
            yield
        finally:
            torch.utils.checkpoint.CheckpointFunction = original  # type: ignore[misc]


class _Plain:
    """A region that is not checkpointed."""

    @staticmethod
    def apply(function: Any, _preserve: bool, *args: Any) -> Any:
        """As `CheckpointFunction.apply`."""
        return function(*args)


class _Regions:
    """Takes the place of torch's function of reentrant checkpointing."""

    def __init__(self, original: Any, first: Around, again: Callable[[], Around]) -> None:
        self._original, self._first, self._again = original, first, again

    def apply(self, function: Any, preserve: bool, *args: Any) -> Any:
        """As `CheckpointFunction.apply`."""
        if not torch.is_grad_enabled():
            return self._original.apply(function, preserve, *args)
        if not any(t.requires_grad for t in leaves(args)):
            args = tuple(_differentiable(a) for a in args)  # what feeds the first step is frozen
        tags = [tag_of(a) for a in args]
        around = self._again()
        outputs: list[Tag] = []
        done = False

        def run(*inputs: Any) -> Any:
            nonlocal done
            if not done:
                done = True
                with self._first():
                    found = function(*inputs)
                outputs.extend(tag_of(t) or FIRST for t in leaves(found))
                return found
            for value, known in zip(inputs, tags, strict=True):
                _retag(value, known)
            with around():
                return function(*inputs)

        result = self._original.apply(run, preserve, *args)
        for tensor, known in zip(leaves(result), outputs, strict=True):
            tag(tensor, known)
        return result


def _differentiable(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return tag(value.detach().requires_grad_().clone(), tag_of(value) or FIRST)


def _retag(value: Any, known: Tag | None) -> None:
    if known is not None:
        tag(value, known)
