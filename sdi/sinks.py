"""Where per-example gradient contributions of one batch are added up, step by step.

Capture hands every use of a parameter to a sink in one of three forms: a sum of outer products, a
sum of embedding rows, or a dense gradient an example. One sink adds sketches, the other adds the
exact gradients, so that both see just the same uses.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from sdi.sketch.countsketch import add_dense, add_rows
from sdi.sketch.plan import Hashing, MatrixPlan, Plan, StackPlan
from sdi.sketch.tensorsketch import (
    ROUNDING,
    Method,
    Products,
    add_fourier,
    add_outer,
    choose,
    rounds,
)


class Sink(Protocol):
    """Receives contributions to φ_step of the parameter `name`; B rows, n tokens a row.

    With `part` they are to one matrix of a stack, (E, R, C).
    """

    def outer(
        self, name: str, step: int, left: Tensor, right: Tensor, part: int | None = None
    ) -> Tensor | None:
        """Σ_n left (B, n, R) ⊗ right (B, n, C); returns Σ_n left, where that came by the way."""

    def rows(self, name: str, step: int, index: Tensor, right: Tensor) -> None:
        """Σ_n e_index (B, n) ⊗ right (B, n, C)."""

    def dense(self, name: str, step: int, gradient: Tensor, part: int | None = None) -> None:
        """A dense gradient an example, (B, *shape)."""


class Plans:
    """The hashes of each parameter, made once a sketcher and kept."""

    def __init__(self, hashing: Hashing, shapes: dict[str, tuple[int, ...]]) -> None:
        self.hashing = hashing
        self._shapes = shapes
        self._made: dict[tuple[str, str], Plan] = {}

    def get(self, name: str, device: torch.device) -> Plan:
        """The hashes of one parameter on one device."""
        at = (name, str(device))
        if at not in self._made:
            self._made[at] = self.hashing.plan(name, self._shapes[name], device)
        return self._made[at]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a parameter."""
        return self._shapes[name]

    def matrix(self, name: str, device: torch.device) -> MatrixPlan:
        """The hashes of a parameter that is a matrix."""
        plan = self.get(name, device)
        assert isinstance(plan, MatrixPlan), name
        return plan


class SketchSink:
    """Adds pooled sketches: (B, S, M) float32, and their spectra where `fourier` is cheaper.

    Args:
        plans: hashes.
        batch: B.
        scales: parameter name → factor √(η_p/η̄), 1 where absent.
        method: "auto" picks per use; "outer" and "fourier" force one.
        products: in which type `outer` multiplies; "auto" picks per use.
        limit: bytes that the buffers of one evaluation may take.

    Attributes:
        rounded: whether a product was taken in bfloat16 somewhere.
    """

    def __init__(
        self,
        plans: Plans,
        batch: int,
        scales: dict[str, float],
        method: Method,
        products: Products,
        limit: int,
    ) -> None:
        self._plans, self._batch, self._scales = plans, batch, scales
        self._method, self._products, self._limit = method, products, limit
        self.rounded = False
        self._noise: dict[int, Tensor] = {}
        self._sums: dict[int, Tensor] = {}
        self._spectra: dict[int, Tensor] = {}

    def outer(
        self, name: str, step: int, left: Tensor, right: Tensor, part: int | None = None
    ) -> Tensor | None:
        """See `Sink.outer`."""
        given, left = left, self._scaled(name, left)
        plan = self._plans.get(name, left.device)
        if isinstance(plan, StackPlan) and part is not None:
            plan = plan.parts[part]
        if not isinstance(plan, MatrixPlan):  # a stack of thin matrices
            product = left.float().transpose(1, 2) @ right.float()
            if part is not None:
                product = stacked(product, part, self._plans.shape(name))
            add_dense(plan, product, self._sum(step, left.device))
            return None
        half = rounds(self._products, plan, left, right)
        method = self._method
        if method == "auto":
            method = choose(plan, left, right, half=half)
        if method == "outer":
            self.rounded = self.rounded or half
            total = self._sum(step, left.device)
            if half and step not in self._noise:
                self._noise[step] = total.new_zeros(self._batch)
            noise = self._noise.get(step)
            summed = add_outer(plan, left, right, total, self._limit, half=half, noise=noise)
            return summed if left is given else None
        spectrum = self._spectrum(step, left.device)
        add_fourier(plan, left.float(), right.float(), spectrum, self._limit)
        return None

    def rows(self, name: str, step: int, index: Tensor, right: Tensor) -> None:
        """See `Sink.rows`."""
        right = self._scaled(name, right).float()
        plan = self._plans.matrix(name, right.device)
        add_rows(plan, index, right, self._sum(step, right.device))

    def dense(self, name: str, step: int, gradient: Tensor, part: int | None = None) -> None:
        """See `Sink.dense`."""
        gradient = self._scaled(name, gradient).float()
        plan = self._plans.get(name, gradient.device)
        if isinstance(plan, StackPlan) and part is not None:
            plan = plan.parts[part]
        elif part is not None:
            gradient = stacked(gradient, part, self._plans.shape(name))
        add_dense(plan, gradient, self._sum(step, gradient.device))

    def result(self, steps: int, device: torch.device) -> Tensor:
        """(B, S, M) float32 on the CPU or the device the sums live on."""
        out = torch.zeros(self._batch, steps, self._plans.hashing.dim, device=device)
        for step, total in self._sums.items():
            out[:, step] += total
        for step, spectrum in self._spectra.items():
            out[:, step] += torch.fft.irfft(spectrum, n=out.shape[2])
        return out

    def too_rough(self, values: Tensor) -> Tensor:
        """(B,) bool: rows in which rounding may be over half of a step's own error 1/√M, or 1 %.

        Args:
            values: the result, (B, S, M).
        """
        found = torch.zeros(self._batch, dtype=torch.bool, device=values.device)
        for step, noise in self._noise.items():
            bound = min(0.25 / values.shape[2], 1e-4) * values[:, step].square().sum(dim=1)
            found |= ROUNDING**2 * noise > bound
        return found

    def _scaled(self, name: str, tensor: Tensor) -> Tensor:
        scale = self._scales.get(name, 1.0)
        return tensor if scale == 1.0 else tensor.float() * scale

    def _sum(self, step: int, device: torch.device) -> Tensor:
        if step not in self._sums:
            self._sums[step] = torch.zeros(self._batch, self._plans.hashing.dim, device=device)
        return self._sums[step]

    def _spectrum(self, step: int, device: torch.device) -> Tensor:
        if step not in self._spectra:
            shape = (self._batch, self._plans.hashing.dim // 2 + 1)
            self._spectra[step] = torch.zeros(shape, dtype=torch.complex64, device=device)
        return self._spectra[step]


class ExactSink:
    """Adds the gradients themselves, float32 or wider, for chosen rows of the batch.

    Args:
        shapes: parameter name → shape.
        rows: row numbers to keep; all B by default.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], rows: list[int] | None = None) -> None:
        self._shapes = shapes
        self._rows = rows
        self.gradients: dict[tuple[str, int], Tensor] = {}

    def outer(
        self, name: str, step: int, left: Tensor, right: Tensor, part: int | None = None
    ) -> None:
        """See `Sink.outer`."""
        left, right = self._picked(left), self._picked(right)
        self._add(name, step, left.transpose(1, 2) @ right, part)

    def rows(self, name: str, step: int, index: Tensor, right: Tensor) -> None:
        """See `Sink.rows`."""
        index = index if self._rows is None else index[self._rows]
        right = self._picked(right)
        gradient = right.new_zeros(right.shape[0], *self._shapes[name])
        spread = index[..., None].expand(right.shape)
        self._add(name, step, gradient.scatter_add_(1, spread, right))

    def dense(self, name: str, step: int, gradient: Tensor, part: int | None = None) -> None:
        """See `Sink.dense`."""
        self._add(name, step, self._picked(gradient), part)

    def _picked(self, tensor: Tensor) -> Tensor:
        tensor = tensor if self._rows is None else tensor[self._rows]
        return tensor if tensor.dtype == torch.float64 else tensor.float()

    def _add(self, name: str, step: int, gradient: Tensor, part: int | None = None) -> None:
        at = (name, step)
        known = self.gradients.get(at)
        if part is not None:
            if known is None:
                self.gradients[at] = stacked(gradient, part, self._shapes[name])
            else:
                known[:, part] += gradient
            return
        self.gradients[at] = gradient.clone() if known is None else known + gradient


def stacked(gradient: Tensor, part: int, shape: tuple[int, ...]) -> Tensor:
    """(B, R, C) as the gradient of the whole stack, (B, E, R, C)."""
    whole = gradient.new_zeros(gradient.shape[0], *shape)
    whole[:, part] = gradient
    return whole
