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

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from curate.blocks import Block, open_rows
from curate.multiply import Operand, as_tensor
from curate.queryvectors import Doubles, QueryVectors
from sdi import team

if TYPE_CHECKING:
    from curate.rundir import RunDirectory

EXTRA = ("total", "early", "late", "total_var", "early_var", "late_var", "window_cov", "noise")
"""What stands behind the step columns of `Product.score`; `noise` is the energy of noise alone."""
_BLOCK = 8 << 20
"""Bytes of sketches in a block: with what comes of them they fit in a processor's cache."""
_LEAST, _MOST = 16, 4096
_PRODUCTS = 2 << 20
"""Bytes of products in float64 that a block may have."""
_MANY = 1 << 26
"""Scores for which kernels are loaded: half a second, in which torch makes as many."""


@dataclass(frozen=True)
class Bound:
    """Query vectors of all checkpoints, on the device that multiplies.

    Attributes:
        vectors: by checkpoint and slot, G · C vectors each, those of a group side by side.
        shape: (G, C).
    """

    vectors: tuple[tuple[Operand, ...], ...]
    grams: tuple[Doubles, ...]
    shape: tuple[int, int]

    @property
    def groups(self) -> int:
        """G."""
        return self.shape[0]


@dataclass(frozen=True)
class Columns:
    """Some vectors of all groups, for scores without standard errors.

    Attributes:
        vectors: by checkpoint and slot; the groups' vectors of one column are side by side.
        shape: (U · C, G).
        kernels: `sdi.compiled.scores`, where there is so much to do that loading it pays.
    """

    vectors: tuple[tuple[Operand, ...], ...]
    shape: tuple[int, int]
    kernels: ModuleType | None = None

    @property
    def width(self) -> int:
        """How many columns each row is multiplied with, all digits included."""
        return sum(operand.width for one in self.vectors for operand in one)


@dataclass(frozen=True)
class Part:
    """Of the scores of B rows with some vectors, what one checkpoint and slot adds.

    Attributes:
        slot: the vectors are the columns slot · C and so on.
        rows: int8 (B, M).
        factors: float32 (B,), of each row's products.
    """

    slot: int
    rows: torch.Tensor
    operand: Operand
    factors: torch.Tensor


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

    @property
    def threads(self) -> int:
        """How many blocks are worked on at once."""
        return torch.get_num_threads() if self.device.type == "cpu" else 1

    def bind(self, vectors: Sequence[QueryVectors]) -> Bound:
        """Bring query vectors to the device, in the order of the checkpoints."""
        _, groups, columns, dim = vectors[0].values.shape
        laid = tuple(
            tuple(Operand.of(slot.reshape(-1, dim), self.device) for slot in one.values)
            for one in vectors
        )
        return Bound(laid, tuple(one.gram for one in vectors), (groups, columns))

    def bind_columns(self, chosen: Sequence[npt.NDArray[np.float32]]) -> Columns:
        """Bring vectors (U, G, C, M) of each checkpoint to the device."""
        slots, groups, columns, dim = chosen[0].shape
        laid = tuple(
            tuple(Operand.of(slot.transpose(1, 0, 2).reshape(-1, dim), self.device) for slot in one)
            for one in chosen
        )
        scores = self.rows * len(chosen) * slots * columns * groups
        on_cpu = self.device.type == "cpu"
        kernels = team.kernels("scores") if scores >= _MANY and on_cpu else None
        return Columns(laid, (slots * columns, groups), kernels)

    def block(self, bound: Bound | Columns) -> int:
        """How many rows to score at once."""
        most = _PRODUCTS // (8 * self.slots * bound.shape[0] * bound.shape[1])
        return max(_LEAST, min(_MOST, most, _BLOCK // (self.slots * self.dim)))

    def blocks(self, bound: Bound | Columns, start: int, stop: int) -> list[tuple[int, int]]:
        """Rows start..stop cut into what is scored at once."""
        first = next(iter(self.sources.values()))
        return first.spans(start, stop, self.block(bound))

    def score(self, bound: Bound, start: int, stop: int) -> npt.NDArray[np.float64]:
        """Scores of rows start..stop, (B, G, τ + 8): the steps, then the columns of `EXTRA`.

        A step that an untied row does not have is NaN.
        """
        return self._score(bound, [s.read(start, stop) for s in self.sources.values()])

    def score_rows(self, bound: Bound, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """`score` of any rows."""
        return self._score(bound, [s.take(rows) for s in self.sources.values()])

    def _score(self, bound: Bound, blocks: list[Block]) -> npt.NDArray[np.float64]:
        norms = [_widen(block.norm.astype(np.float64), self.slots) for block in blocks]
        joint, factor = self._factor(norms)
        total = _Sums()
        for number, (eta, block) in enumerate(zip(self.weights.values(), blocks, strict=True)):
            products = self._multiply(block, bound.vectors[number], bound.shape)
            products *= factor[:, :, None, None]
            total.add(eta, products, (norms[number] * factor) ** 2, bound.grams[number], self.dim)
        return total.table(absent=(joint == 0) if self.slots > 1 else None)

    def _factor(self, norms: Sequence[Doubles]) -> tuple[Doubles, Doubles]:
        """Norms over all checkpoints, and what cosine scores are multiplied with; both (B, U)."""
        square = sum(eta * norm**2 for eta, norm in zip(self.weights.values(), norms, strict=True))
        joint = np.sqrt(np.asarray(square))
        if not self.cosine:
            return joint, np.ones_like(joint)
        with np.errstate(divide="ignore"):
            return joint, np.where(joint > 0, 1.0 / joint, 0.0)

    def _multiply(
        self, block: Block, vectors: Sequence[Operand], shape: tuple[int, int]
    ) -> Doubles:
        """int8 (B, U, M) times U lots of G · C vectors → float64 (B, U, G, C)."""
        rows = as_tensor(block.values)
        all_slots = rows.shape[1] == self.slots
        out = (np.empty if all_slots else np.zeros)((len(rows), self.slots, *shape))
        for slot in range(rows.shape[1]):
            product = vectors[slot].times(rows[:, slot]).numpy()
            scale = block.scale[:, slot, None].astype(np.float64)
            np.multiply(product, scale, out=out[:, slot].reshape(len(rows), -1))
        return out

    def parts(self, bound: Columns, start: int, stop: int) -> Iterator[Part]:
        """What the scores of rows start..stop add up from."""
        blocks = [source.read(start, stop) for source in self.sources.values()]
        factor = np.ones((1, self.slots))
        if self.cosine:
            norms = [_widen(block.norm.astype(np.float64), self.slots) for block in blocks]
            _, factor = self._factor(norms)
        for eta, block, vectors in zip(self.weights.values(), blocks, bound.vectors, strict=True):
            rows = as_tensor(block.values)
            scale = np.float32(eta) * factor[:, : rows.shape[1]] * block.scale
            factors = torch.from_numpy(np.ascontiguousarray(scale.T, dtype=np.float32))
            for slot in range(rows.shape[1]):
                yield Part(slot, rows[:, slot], vectors[slot], factors[slot])

    def columns(self, bound: Columns, start: int, stop: int) -> torch.Tensor:
        """Scores of rows start..stop, float32 (B, U · C, G); 0 where a row's slot is absent."""
        columns, groups = bound.shape
        shape = (stop - start, self.slots, columns // self.slots * groups)
        whole = torch.zeros(shape, dtype=torch.float32, device="cpu")
        for part in self.parts(bound, start, stop):
            own = part.operand.times(part.rows, torch.float32)
            whole[:, part.slot] += own.mul_(part.factors[:, None])
        return whole.view(stop - start, columns, groups)


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
    missing = slots - array.shape[1]
    return np.pad(array, ((0, 0), (0, missing))) if missing else array
