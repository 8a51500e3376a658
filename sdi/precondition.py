"""Precondition influence by the second moment of the training gradients.

Scores become gᵀ (C + λI)⁻¹ φ_t with the uncentred C = E[g gᵀ] of the training totals, which
discounts the directions that all examples share. The inverse is applied to the query side only,
once per query vector; it is linear, so Σ_t SDI_t = TracIn still holds. In an untied model each
step has a moment of its own.

λ is given relative to the mean eigenvalue, trace(C) / M, so that one number serves models whose
gradients differ by orders of magnitude. At M = 4096 the accumulator takes 128 MiB and the
factorisation a few seconds on a CPU. Preconditioned scores have no closed-form standard error.

Letters: B examples, M sketch dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sdi.errors import SpecError


class SecondMoment:
    """Accumulates C = E[g gᵀ], (M, M), from blocks of training sketches.

    Blocks are multiplied in their own precision and added in float64 (float32 on devices without
    it), so that thousands of blocks lose nothing.

    Args:
        dim: M.
        device: where to accumulate; by default the CPU.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        if dim < 1:
            raise SpecError(f"the sketch dimension is {dim}; expected at least 1")
        place = torch.device(device)
        dtype = torch.float32 if place.type == "mps" else torch.float64
        self._sum = torch.zeros(dim, dim, dtype=dtype, device=place)
        self._count = 0

    @property
    def dim(self) -> int:
        """M."""
        return int(self._sum.shape[0])

    @property
    def count(self) -> int:
        """Number of rows added so far."""
        return self._count

    def add(self, block: Tensor) -> None:
        """Add the rows of ``block`` (B, M).

        Raises:
            SpecError: another width, or NaN or infinite values.
        """
        if block.ndim != 2 or block.shape[1] != self.dim:
            raise SpecError(f"a block is {tuple(block.shape)}; expected (rows, {self.dim})")
        rows = block.detach().to(self._sum.device)
        rows = rows if rows.dtype == torch.float64 else rows.float()
        product = rows.T @ rows
        if not bool(torch.isfinite(product.diagonal()).all()):
            raise SpecError("a block of training sketches is not finite; sketch these rows again")
        self._sum += product
        self._count += int(block.shape[0])

    def matrix(self) -> Tensor:
        """Return C, (M, M), a copy.

        Raises:
            SpecError: no rows were added.
        """
        if not self._count:
            raise SpecError("the second moment has no rows; add at least one block")
        return self._sum / self._count

    def factor(self, strength: float) -> Preconditioner:
        """Factor C + λI with λ = ``strength`` · trace(C) / M.

        Raises:
            SpecError: a negative or non-finite strength, training gradients that are all zero, or
                a matrix that is singular in working precision.
        """
        if not (math.isfinite(strength) and strength >= 0):
            raise SpecError(f"lambda is {strength}; expected a finite number, 0 or larger")
        moment = self.matrix()
        scale = float(moment.diagonal().mean())
        if scale <= 0:
            raise SpecError("every training sketch is zero, so there is nothing to precondition by")
        # Working at a mean eigenvalue of one keeps tiny gradients clear of underflow.
        moment /= scale
        moment.diagonal().add_(strength)
        lower, failed = torch.linalg.cholesky_ex(moment)
        if int(failed) or not bool(torch.isfinite(lower.diagonal()).all()):
            raise SpecError(
                f"the second moment of {self._count} rows with lambda {strength} is singular in "
                f"{moment.dtype}; use a larger lambda (0.1 is a fair start) or more rows"
            )
        return Preconditioner(lower=lower, scale=scale, strength=strength)


@dataclass(frozen=True)
class Preconditioner:
    """The factored C + λI of one checkpoint.

    Attributes:
        lower: Cholesky factor (M, M) of (C + λI) / scale.
        scale: trace(C) / M.
        strength: λ / scale.
    """

    lower: Tensor
    scale: float
    strength: float

    def apply(self, vectors: Tensor) -> Tensor:
        """Return (C + λI)⁻¹ v for each v of ``vectors`` (..., M), in their shape, type and place.

        Raises:
            SpecError: vectors of another width.
        """
        dim = int(self.lower.shape[0])
        if vectors.ndim < 1 or vectors.shape[-1] != dim:
            raise SpecError(f"vectors are {tuple(vectors.shape)}; expected (..., {dim})")
        columns = vectors.detach().reshape(-1, dim).T.to(self.lower.device, self.lower.dtype)
        solved = torch.cholesky_solve(columns, self.lower).T / self.scale
        return solved.reshape(vectors.shape).to(vectors.device, vectors.dtype)
