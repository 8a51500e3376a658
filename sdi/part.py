"""What a pass over one batch returns."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Part:
    """Step-resolved vectors of one batch: sketches, or exact gradients.

    Attributes:
        ids: B strings, the examples' own ids.
        values: (B, S, M) float32; row b, step s holds the sketch of φ_s(z_b). Exact: (B, S, D).
        norms: (B, S) float32, ‖values‖ over the last axis.
        steps: S labels, in the order of time.
        losses: (B,) float32, the losses the gradients belong to.
        detached: labels of the steps that ran without a gradient (no_grad, detached); their
            vectors are true zeros.
        names: for exact gradients, parameter name → slice of the last axis.
    """

    ids: tuple[str, ...]
    values: Tensor
    norms: Tensor
    steps: tuple[str, ...]
    losses: Tensor
    detached: tuple[str, ...] = ()
    names: dict[str, slice] = field(default_factory=dict)

    @property
    def totals(self) -> Tensor:
        """(B, M): Σ_s values, the sketch of the whole gradient."""
        return self.values.sum(dim=1)
