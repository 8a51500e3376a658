"""Random numbers that are a function of the row: a random initial state, made reproducible.

Models such as Huginn draw the state they start from. Then a row's gradient depends on its company
in the batch and on the run, and the self-check refuses it. Inside of `seeded_rows` each draw of
normal or uniform numbers whose first axis is the batch's is made row by row, from a counter-based
generator keyed by the row's id and the number of the draw: the same alone and in any batch,
whatever the padding behind it, and on every device. The law of the numbers is the model's own; the
numbers are not those that torch would have drawn. A draw with a generator of its own is left alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sdi import hashes
from sdi.rowtags import tag

_LIKE = {"randn_like": "normal", "rand_like": "uniform"}
_FILL = {"normal_": "normal", "uniform_": "uniform"}
_NEW = {"randn": "normal", "rand": "uniform"}


class _SeededRows(TorchFunctionMode):
    """Makes the draws of a forward pass; see the module's docstring."""

    def __init__(self, ids: Sequence[str]) -> None:
        super().__init__()
        self._ids, self._draws = tuple(ids), 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        law = _LIKE.get(name) or _FILL.get(name) or _NEW.get(name)
        if law is None or kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        output = func(*args, **kwargs)  # its shape, type and place, and torch's state moves on
        if not output.ndim or len(output) != len(self._ids):
            return output
        low, high = (0.0, 1.0)
        if name in _FILL:
            names = ("mean", "std") if law == "normal" else ("from", "to")
            low, high = (
                float(args[n + 1]) if len(args) > n + 1 else float(kwargs.get(key, default))
                for n, (key, default) in enumerate(zip(names, (0.0, 1.0), strict=True))
            )
        with torch.no_grad():
            output.copy_(self._drawn(output, law, low, high))
        return tag(output)

    def _drawn(self, like: Tensor, law: str, low: float, high: float) -> Tensor:
        self._draws += 1
        size = like[0].numel()
        rows = []
        for identity in self._ids:
            key = hashes.key("row", identity, self._draws)
            source = np.random.Generator(np.random.Philox(key=key))
            rows.append(source.standard_normal(size) if law == "normal" else source.random(size))
        spread = high if law == "normal" else high - low
        drawn = torch.from_numpy(np.stack(rows)) * spread + low
        return drawn.view(like.shape).to(like.device, like.dtype)


@contextmanager
def seeded_rows(ids: Sequence[str], wanted: bool) -> Iterator[None]:
    """While active, where `wanted`, draws are functions of the ids (B,) of the rows."""
    if not wanted:
        yield
        return
    with _SeededRows(ids):
        yield
