"""Which tensors carry rows of the batch: a tag on the tensor object, passed on by every call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
    elif isinstance(value, Mapping):
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
    """Aliases of the batch's tensors, tagged as carrying rows where their first axis is B.

    Where no tensor's is, the batch is flattened, and tensors are tagged whose first axis B divides.
    Beside rows-first tensors such a one is no row's own: positions (T,), say, with T = 2B.
    """
    flat = not any(t.ndim and t.shape[0] == size for t in leaves(batch))
    return _tagged(batch, size, flat)


def _tagged(batch: Any, size: int, flat: bool) -> Any:
    if isinstance(batch, Tensor):
        alias = batch.detach()
        if alias.ndim and (alias.shape[0] == size or (flat and alias.shape[0] % size == 0)):
            setattr(alias, _ROWS, True)
        return alias
    if isinstance(batch, Mapping):
        named = {key: _tagged(value, size, flat) for key, value in batch.items()}
        return named if isinstance(batch, dict) else type(batch)(named)  # type: ignore[call-arg]
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_tagged(value, size, flat) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(_tagged(value, size, flat) for value in batch)
    return batch
