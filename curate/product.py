"""Training sketches times query vectors, one block of rows at a time, with standard errors.

For checkpoint k, training norm n₁ and query vector norm n₂, a sketched score s_k has variance
(n₁²n₂² + s_k²)/M; variances add over checkpoints as η_k². Early, late and total are inner products
with a vector of their own, so they have norms of their own. In an untied model each step has hashes
of its own, so there the variances of the steps add up.

Cosine scores divide the training side by its norm over all checkpoints. The norms count as known,
which makes the error a little too large, never too small.

Letters: B rows of the block, G groups, τ steps, U slots, C vectors a slot, M sketch dimension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from curate.blocks import block_rows, open_rows
from curate.queryvectors import Doubles, QueryVectors

if TYPE_CHECKING:
    from curate.rundir import RunDirectory

EXTRA = ("total", "early", "late", "total_var", "early_var", "late_var", "window_cov", "noise")
"""What stands behind the step columns of `Product.score`; `noise` is the energy of noise alone."""
_TEMPORARIES = 2 << 20


@dataclass(frozen=True)
class Bound:
    """Query vectors of all checkpoints, on the device that multiplies."""

    values: tuple[torch.Tensor, ...]
    grams: tuple[Doubles, ...]

    @property
    def groups(self) -> int:
        """G."""
        return int(self.values[0].shape[1])


class Product:
    """The training side of a score.

    Args:
        weights: η_k by checkpoint.
        device: "auto" takes a GPU where there is one.
    """

    def __init__(
        self,
        run: RunDirectory,
        train_set: str,
        weights: Mapping[str, float],
        *,
        cosine: bool,
        tied: bool,
        device: str = "auto",
    ) -> None:
        kind: Any = "totals" if tied else "steps"
        self.weights = dict(weights)
        self.sources = {name: open_rows(run, train_set, name, kind) for name in weights}
        first = next(iter(self.sources.values()))
        self.rows, self.dim = first.rows, first.dim
        self.slots = max(source.slots for source in self.sources.values())
        self.cosine = cosine
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)

    def bind(self, vectors: Sequence[QueryVectors]) -> Bound:
        """Bring query vectors to the device, in the order of the checkpoints."""
        values = tuple(torch.from_numpy(one.values).to(self.device) for one in vectors)
        return Bound(values, tuple(one.gram for one in vectors))

    def block(self, bound: Bound) -> int:
        """How many rows to score at once."""
        _, groups, columns, _ = bound.values[0].shape
        most = _TEMPORARIES // (8 * self.slots * groups * columns)
        return max(16, min(most, block_rows(self.slots, self.dim)))

    def score(self, bound: Bound, start: int, stop: int) -> npt.NDArray[np.float64]:
        """Scores of rows start..stop, (B, G, τ + 8): the steps, then the columns of `EXTRA`.

        A step that an untied row does not have is NaN.
        """
        blocks = [source.read(start, stop) for source in self.sources.values()]
        norms = [_widen(block.norm.astype(np.float64), self.slots) for block in blocks]
        square = sum(eta * norm**2 for eta, norm in zip(self.weights.values(), norms, strict=True))
        joint = np.sqrt(np.asarray(square))
        with np.errstate(divide="ignore"):
            factor = np.where(joint > 0, 1.0 / joint, 0.0) if self.cosine else np.ones_like(joint)
        total = _Sums()
        for number, (eta, block) in enumerate(zip(self.weights.values(), blocks, strict=True)):
            products = self._multiply(block.values, block.scale, bound.values[number])
            products *= factor[:, :, None, None]
            total.add(eta, products, (norms[number] * factor) ** 2, bound.grams[number], self.dim)
        return total.table(absent=(joint == 0) if self.slots > 1 else None)

    def _multiply(
        self, values: npt.NDArray[np.int8], scale: npt.NDArray[np.float32], vectors: torch.Tensor
    ) -> Doubles:
        """int8 (B, U, M) times (U, G, C, M) → float64 (B, U, G, C)."""
        rows, slots, dim = values.shape
        _, groups, columns, _ = vectors.shape
        out = np.zeros((rows, self.slots, groups, columns))
        whole = torch.from_numpy(np.array(values)).to(self.device)
        for slot in range(slots):
            right = vectors[slot].reshape(groups * columns, dim)
            product = (whole[:, slot].float() @ right.T).cpu().numpy()
            out[:, slot] = product.reshape(rows, groups, columns)
        out *= _widen(scale.astype(np.float64), self.slots)[:, :, None, None]
        return out


class _Sums:
    """Sums over checkpoints of scores and variances."""

    def __init__(self) -> None:
        self._products: Doubles | float = 0.0
        self._step_variance: Doubles | float = 0.0
        self._variance: list[Doubles | float] = [0.0] * 4

    def add(self, eta: float, products: Doubles, squares: Doubles, gram: Doubles, dim: int) -> None:
        """Add one checkpoint.

        Args:
            products: ⟨g, v⟩, (B, U, G, C).
            squares: n₁² (B, U).
            gram: (U, G, C + 2), as `QueryVectors` has it.
        """
        weight = eta**2 / dim
        square = squares[:, :, None]
        total = products[..., :-2].sum(axis=-1)
        early, late = products[..., -2], products[..., -1]
        pairs = [(total, total, -2), (early, early, -4), (late, late, -3), (early, late, -1)]
        for number, (left, right, column) in enumerate(pairs):
            term = square * gram[None, :, :, column] + left * right
            self._variance[number] = self._variance[number] + weight * term.sum(axis=1)
        steps = products[..., :-2]
        term = square[..., None] * gram[None, :, :, :-4] + steps**2
        self._step_variance = self._step_variance + weight * term
        self._products = self._products + eta * products

    def table(self, absent: npt.NDArray[np.bool_] | None) -> Doubles:
        """Everything as (B, G, τ + 8)."""
        products, step_variance = np.asarray(self._products), np.asarray(self._step_variance)
        steps = _flat(products[..., :-2])
        windows = products[..., -2:].sum(axis=1)
        noise = np.sqrt(2 / np.pi) * _flat(np.sqrt(step_variance)).sum(axis=-1)
        total = steps.sum(axis=-1)
        if absent is not None:
            steps = np.where(absent[:, None, :], np.nan, steps)
        extra = [total, windows[..., 0], windows[..., 1], *map(np.asarray, self._variance), noise]
        return np.concatenate([steps, np.stack(extra, axis=-1)], axis=-1)


def _flat(array: Doubles) -> Doubles:
    """(B, U, G, C) → (B, G, U·C): the steps in order, since either U or the steps a slot is 1."""
    rows, slots, groups, columns = array.shape
    return array.transpose(0, 2, 1, 3).reshape(rows, groups, slots * columns)


def _widen(array: Doubles, slots: int) -> Doubles:
    return np.pad(array, ((0, 0), (0, slots - array.shape[1])))
