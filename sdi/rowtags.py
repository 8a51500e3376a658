"""Which tensors carry rows of the batch: a tag on the tensor object, passed on by every call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

_ROWS = "_sdi_rows"


def leaves(value: Any) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from leaves(item)


def is_tagged(value: Any) -> bool:
    """Whether the value is a tensor tagged as carrying rows."""
    return isinstance(value, Tensor) and getattr(value, _ROWS, False)


def tag(output: Any) -> Any:
    """Tag every tensor of an output; returns it."""
    for tensor in leaves(output):
        setattr(tensor, _ROWS, True)
    return output


def tagged(batch: Any, size: int) -> Any:
    """Aliases of the batch's tensors, tagged as carrying rows where B divides their first axis."""
    if isinstance(batch, Tensor):
        alias = batch.detach()
        if alias.ndim and alias.shape[0] % size == 0:
            setattr(alias, _ROWS, True)
        return alias
    if isinstance(batch, dict):
        return {key: tagged(value, size) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(tagged(value, size) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(tagged(value, size) for value in batch)
    return batch
