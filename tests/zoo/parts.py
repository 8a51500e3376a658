"""What the layer kinds are made of: a body after a function, and a registry by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.case import RIGHT, WIDTH

Run = Callable[[Any, Tensor, int], Tensor]
Part = nn.Parameter | nn.Module


class Body(nn.Module):
    """(..., d) → (..., d) by a function of (module, x, loop index)."""

    def __init__(self, run: Run, **parts: Part) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor, t: int = 0) -> Tensor:
        return self.run(self, x, t)


@dataclass(frozen=True)
class Kind:
    """A layer kind.

    Attributes:
        name: what the table calls it.
        make: a fresh body, from torch's global generator.
        token: whether it treats each token alone, whatever the leading axes are.
        expected: "right", or a regular expression of the refusal.
        needs: "wide" where the layer does not run in bf16, "single" where not in float64, else "".
    """

    name: str
    make: Callable[[], nn.Module]
    token: bool
    expected: str = RIGHT
    needs: str = ""


def weight(*shape: int, scale: float = 0.2) -> nn.Parameter:
    """A random parameter."""
    return nn.Parameter(torch.randn(shape) * scale)


def linear(rows: int = WIDTH, columns: int = WIDTH, *, bias: bool = True) -> nn.Linear:
    """`nn.Linear`, columns → rows."""
    return nn.Linear(columns, rows, bias=bias)


class Kinds(dict[str, Kind]):
    """Kinds by name; `add` takes the function and how to make its parts."""

    def add(
        self,
        name: str,
        run: Run,
        parts: Callable[[], dict[str, Part]],
        *,
        token: bool = True,
        expected: str = RIGHT,
        needs: str = "",
    ) -> None:
        """Register a kind; `parts` makes fresh parameters and modules by attribute name."""
        assert name not in self, name
        self[name] = Kind(name, lambda: Body(run, **parts()), token, expected, needs)
