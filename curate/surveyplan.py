"""What a survey multiplies, and what it takes from a block of rows.

The windows of a query are sums of its steps. Either the steps are multiplied and their products
added up, or the sums are, whichever are fewer columns: a step is one int8 digit, a sum needs three
(`curate.multiply`).

Letters: Q queries, B rows of a block, τ steps, U slots, C columns that a query has, M sketch
dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from curate.columns import Moments
from curate.errors import CurateError
from curate.multiply import BASE
from curate.product import Columns, Part, Product
from curate.queryvectors import QueryVectors
from sdi import team

Rows = npt.NDArray[np.int64]
Vectors = npt.NDArray[np.float32]
Masks = tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]
Keys = npt.NDArray[np.float32]
Hits = tuple[Rows, Rows, Keys]
"""Query, row and key of each."""
NAMED = 10
"""How many rows an error names."""


@dataclass(frozen=True)
class Ranking:
    """What orders the rows of a query.

    Attributes:
        name: total, early, late, energy or step.
        step: of the last, its index from 0.
    """

    name: str
    step: int = 0

    @classmethod
    def of(cls, name: str, ranked: tuple[int, ...]) -> Ranking:
        """From a column's name and its place among the raw columns, as `ranked_by` has them."""
        return cls(name) if name in ("total", "early", "late", "energy") else cls("step", ranked[0])


@dataclass(frozen=True)
class Taken:
    """What windows and key are of the columns C of a row's scores.

    Attributes:
        shares: (3, C, Q) float32, what early, late and the key take of each.
        sizes: whether the key takes it of their sizes.
    """

    shares: Tensor
    sizes: bool = False

    def of(
        self, product: Product, bound: Columns, limits: Tensor, start: int, stop: int
    ) -> tuple[Moments, Hits]:
        """Moments of the windows of a block of rows, and the keys that exceed limits (Q,).

        Raises:
            CurateError: scores that are NaN or infinite, which nothing can be ranked by.
        """
        found = None
        if bound.kernels is not None:
            found = self._compiled(bound.kernels, product, bound, limits, start, stop)
        return found or self._by_torch(product.columns(bound, start, stop), limits, start)

    def _compiled(
        self,
        kernels: ModuleType,
        product: Product,
        bound: Columns,
        limits: Tensor,
        start: int,
        stop: int,
    ) -> tuple[Moments, Hits] | None:
        """In one pass over the products; None where a score is not finite."""
        parts = list(product.parts(bound, start, stop))
        wholes = [
            part.operand.products(part.rows, place, tiled=True) for place, part in enumerate(parts)
        ]
        plan = np.array([_numbers(*each) for each in zip(parts, wholes, strict=True)])
        rows, (columns, queries) = stop - start, bound.shape
        assert self.shares.shape == (3, columns, queries) and limits.shape == (queries,)
        assert all(one.operand.count * product.slots == columns * queries for one in parts)
        new = partial(torch.empty, device="cpu")
        space, keys = (new(n, queries, dtype=torch.float32) for n in (3 + columns, rows))
        sums = new(3, 2, queries, dtype=torch.float64)
        hits, count = (new(n, dtype=torch.int32) for n in (rows * queries, 1))
        unit = team.bits(1 / BASE)
        given = (self.shares, limits, sums, hits, keys, space, count)
        sizes = (len(parts), rows, product.slots, columns, queries, int(self.sizes), unit)
        addresses = (plan.ctypes.data, *(each.data_ptr() for each in given))
        team.run(kernels.surveyed, (0, *sizes, *addresses), 1)
        number = int(count)
        if number < 0:
            return None
        first, off, squares = sums.numpy()
        square = np.maximum(squares - off**2 / rows, 0)
        row, query = np.divmod(hits[:number].numpy().astype(np.int64), queries)
        key = keys.flatten()[:number].numpy().copy()  # the room for all of them is not kept
        return Moments(rows, first + off / rows, square), (query, row + start, key)

    def _by_torch(self, scores: Tensor, limits: Tensor, start: int) -> tuple[Moments, Hits]:
        """From scores (B, C, Q)."""
        columns = scores.unbind(dim=1)
        taken = torch.zeros(3, *columns[0].shape, dtype=torch.float32, device="cpu")
        for column, share in zip(columns, self.shares.unbind(dim=1), strict=True):
            taken[:2].addcmul_(column, share[:2, None])
            taken[2].addcmul_(column.abs() if self.sizes else column, share[2])
        finite = taken.isfinite().all(dim=0)
        if not finite.all():
            raise not_finite("training", (~finite).any(dim=1).nonzero()[:, 0].numpy() + start)
        row, query = (taken[2] > limits).nonzero(as_tuple=True)
        windows = taken[:2].double()
        mean = windows.mean(dim=1)
        square = (windows - mean[:, None]).square_().sum(dim=1)
        hits = (query.numpy(), row.numpy() + start, taken[2][row, query].numpy())
        return Moments(len(scores), mean.numpy(), square.numpy()), hits


def _numbers(part: Part, products: Tensor) -> tuple[int, ...]:
    """A part as `sdi.compiled.scores` reads it."""
    operand = part.operand
    sizes = (operand.digits, products.shape[1])
    scales = 0 if operand.single_scale is None else operand.single_scale.data_ptr()
    return (products.data_ptr(), *sizes, scales, part.factors.data_ptr(), part.slot)


def _of_sums(
    values: Sequence[Vectors], masks: Masks, ranking: Ranking
) -> tuple[Taken, list[Vectors]]:
    """Products with the windows' own vectors, and with the key's where it is none of their sums.

    Args:
        values: by checkpoint, (1, Q, τ + 2, M).
    """
    name, queries = ranking.name, values[0].shape[1]
    whole = all(_covered(one[0], masks) for one in values)  # the windows together are the total
    shares = torch.zeros(3, 3, queries, dtype=torch.float32, device="cpu")
    shares[0, 0] = shares[1, 1] = 1
    if name == "step" or (name == "total" and not whole):
        shares[2, 2] = 1
        return Taken(shares), [_with_key(one, ranking) for one in values]
    shares[2, 0], shares[2, 1] = name != "late", name != "early"
    return Taken(shares[:, :2].contiguous()), [one[:, :, -2:] for one in values]


def _with_key(values: Vectors, ranking: Ranking) -> Vectors:
    """The windows' vectors and the key's, (1, Q, 3, M)."""
    steps = values[:, :, :-2]
    own = steps.sum(axis=2) if ranking.name == "total" else steps[:, :, ranking.step]
    return np.concatenate([values[:, :, -2:], own[:, :, None]], axis=2)


def _of_steps(
    values: Sequence[Vectors], masks: Masks, ranking: Ranking
) -> tuple[Taken, list[Vectors]]:
    """Products with the vectors of all steps, from which windows and key are added up."""
    name, windows = ranking.name, [torch.from_numpy(mask.T.astype(np.float32)) for mask in masks]
    key = torch.ones_like(windows[0])
    if name == "step":
        key = torch.zeros_like(key)
        key[ranking.step] = 1
    elif name in ("early", "late"):
        key = windows[int(name == "late")]
    taken = Taken(torch.stack([*windows, key]), sizes=name == "energy")
    return taken, [one[:, :, :-2] for one in values]


def planned(
    product: Product, vectors: Sequence[QueryVectors], masks: Masks, ranking: Ranking
) -> tuple[Taken, Columns]:
    """The cheaper way, with what it multiplies; arguments as for `survey`."""
    values = [one.values for one in vectors]
    plans = [_of_steps(values, masks, ranking)]
    if len(values[0]) == 1 and ranking.name != "energy":  # else each slot has its step only
        plans.insert(0, _of_sums(values, masks, ranking))
    found: list[tuple[Taken, Columns]] = []
    for taken, chosen in plans:
        least = sum(one.size // product.dim for one in chosen)  # a digit each
        if not found or least < found[0][1].width:
            found.append((taken, product.bind_columns(chosen)))
    return min(found, key=lambda pair: pair[1].width)


def _covered(values: Vectors, masks: Masks) -> bool:
    """Whether every step that has a vector, in (Q, τ + 2, M), is in just one window, of (Q, τ)."""
    early, late = masks
    return not values[:, :-2][early == late].any()


def not_finite(side: str, rows: Rows) -> CurateError:
    """What is wrong with rows of the training or the query side."""
    named = ", ".join(map(str, rows[:NAMED])) + (", …" if len(rows) > NAMED else "")
    return CurateError(
        f"{side} rows {named}: their scores are NaN or infinite, and cannot be ranked. Their "
        "sketches are damaged (check the run with `curate doctor RUN`), or so large that products "
        "overflow float32: then leave these rows out, and sketch and score again"
    )
