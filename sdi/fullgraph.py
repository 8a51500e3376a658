"""Running loops that a model keeps out of the graph, where it allows that.

Models that truncate backpropagation (HRM, TRM, Huginn) run their first loops under `no_grad`. In
`full_graph`, switching gradients off has no effect, so that these loops take part. What a model
cuts by `detach` or in inference mode stays cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _KeepGradients(TorchFunctionMode):
    """Ignores that gradients are switched off."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._C._set_grad_enabled:
            args, kwargs = (True,), {}
        return func(*args, **(kwargs or {}))


@contextmanager
def full_graph(wanted: bool) -> Iterator[None]:
    """While active, where `wanted`, `no_grad` and `set_grad_enabled(False)` do nothing."""
    if not wanted:
        yield
        return
    with _KeepGradients():
        yield
