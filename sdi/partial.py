"""Exact gradients of a body too large to hold at once: one group of its parameters at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from sdi.sinks import ExactSink


def groups_of(
    shapes: Mapping[str, tuple[int, ...]], copies: int, memory: int
) -> Iterator[list[str]]:
    """Names in groups of which so many copies, eight bytes a number, fit into `memory`.

    At least one a group.
    """
    group: list[str] = []
    size = 0
    for name, shape in shapes.items():
        need = 8 * copies * torch.Size(shape).numel()
        if group and size + need > memory:
            yield group
            group, size = [], 0
        group.append(name)
        size += need
    yield group


class OnlySome:
    """A sink that passes on the contributions to some parameters."""

    def __init__(self, sink: ExactSink, names: set[str]) -> None:
        self._sink, self._names = sink, names

    def outer(
        self, name: str, step: int, left: Tensor, right: Tensor, part: int | None = None
    ) -> None:
        """See `Sink.outer`."""
        if name in self._names:
            self._sink.outer(name, step, left, right, part)

    def rows(self, name: str, step: int, index: Tensor, right: Tensor) -> None:
        """See `Sink.rows`."""
        if name in self._names:
            self._sink.rows(name, step, index, right)

    def dense(self, name: str, step: int, gradient: Tensor, part: int | None = None) -> None:
        """See `Sink.dense`."""
        if name in self._names:
            self._sink.dense(name, step, gradient, part)
