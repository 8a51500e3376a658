"""Batches by a padded-token budget: a function of the rows' lengths and the budget alone.

Rows are sorted by length, longest first and ties by row, and cut where rows × width would pass the
budget; the width is that of the longest, rounded up. Little is padding then, and the first batch is
the one that needs the most memory. Padding is on the right, masked out and no target, so that a
row's loss does not depend on the batch it is in. A row longer than the budget is alone in a batch.

Why widths are rounded. oneDNN keeps what it compiles for each shape of a product, and memory freed
at one size does not fit the next: a hundred batches of 4,096 tokens, in rows of 400 to 500, made a
process grow by 455 MiB instead of 123. The padding costs what compiling did, some 2 % of the time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from curate.errors import UsageError
from curate.tokens import IGNORE

if TYPE_CHECKING:
    from curate.examples import ExampleSet

Rows = NDArray[np.int64]
Tokens = tuple[NDArray[np.int32], NDArray[np.int32]]  # input_ids and labels of a row, (T,) each


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right: `rows` int64 (B,), `ids`, and tensors (B, T) int64.

    `tensors` holds input_ids, attention_mask (1 on the row's own tokens) and labels (-100 where a
    token is no target). Labels are aligned with input_ids: the loss shifts, not the batch.
    """

    rows: Rows
    ids: list[str]
    tensors: dict[str, torch.Tensor]

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T), the padded one."""
        rows, width = self.tensors["input_ids"].shape
        return rows, width

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self.tensors["attention_mask"].sum())


def width(length: int, most: int) -> int:
    """`length` rounded up to one of sixteen widths between two powers of two, `most` at most.

    So of T tokens at most T/16 are added, and rows of up to 2^k tokens have at most 16·k widths.
    A length above `most` stays as it is.
    """
    step = 1 << max(0, length.bit_length() - 5)
    return min(-(-length // step) * step, max(length, most))


def plan(lengths: Rows, budget_tokens: int) -> list[Rows]:
    """Places in `lengths` (N,), grouped into batches, each place once, the longest first."""
    if budget_tokens < 1:
        raise UsageError(f"the token budget of a batch is {budget_tokens}; it must be at least 1")
    order = np.lexsort((np.arange(len(lengths)), -lengths))
    most = _most(lengths, budget_tokens)
    groups, at = [], 0
    while at < len(order):
        count = max(1, budget_tokens // max(1, width(int(lengths[order[at]]), most)))
        groups.append(order[at : at + count])
        at += count
    return groups


def has_padding(lengths: Rows, budget_tokens: int) -> bool:
    """Whether some batch of rows of these lengths (N,) is wider than one of its rows."""
    return any(wide > int(lengths[group[-1]]) for group, wide in _shaped(lengths, budget_tokens))


def batches(
    examples: ExampleSet,
    *,
    budget_tokens: int,
    pad_id: int | None = None,
    rows: Sequence[int] | Rows | None = None,
) -> Iterator[Batch]:
    """Yield every row of `rows` (all by default) once, longest first, B × T ≤ budget_tokens.

    No batch is wider than the longest of the rows, which may be all that a model has positions for.

    `pad_id` is the set's own by default. Whatever order `rows` come in, the batches are the same.
    """
    chosen = np.arange(len(examples)) if rows is None else np.sort(np.asarray(rows, dtype=np.int64))
    lengths = examples.lengths_of(chosen)
    ids = examples.ids(chosen)
    pad = examples.pad_id if pad_id is None else pad_id
    for group, wide in _shaped(lengths, budget_tokens):
        tensors = padded([examples.tokens(int(row)) for row in chosen[group]], pad, wide)
        yield Batch(chosen[group], [ids[place] for place in group], tensors)


def alone_and_padded(
    row: int, identity: str, tokens: Tokens, pad_id: int, wide: int
) -> tuple[Batch, Batch]:
    """One row as a batch of its own: as it is, and padded to a width."""
    without, with_padding = (
        Batch(np.array([row]), [identity], padded([tokens], pad_id, most)) for most in (0, wide)
    )
    return without, with_padding


def _shaped(lengths: Rows, budget_tokens: int) -> Iterator[tuple[Rows, int]]:
    """The groups of a plan, each with the width of its batch."""
    most = _most(lengths, budget_tokens)
    for group in plan(lengths, budget_tokens):
        yield group, width(int(lengths[group[0]]), most)


def _most(lengths: Rows, budget_tokens: int) -> int:
    """What no width is rounded past: the longest row, and the budget."""
    return min(int(lengths.max(initial=0)), budget_tokens)


def padded(rows: Sequence[Tokens], pad_id: int, wide: int = 0) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels (B, T) of B pairs (input_ids, labels), each (T_b,).

    T is the longest T_b, or `wide` if that is more.
    """
    shape = (len(rows), max(wide, max(len(ids) for ids, _ in rows)))
    tokens = np.full(shape, pad_id, dtype=np.int64)
    labels = np.full(shape, IGNORE, dtype=np.int64)
    mask = np.zeros(shape, dtype=np.int64)
    for at, (own, targets) in enumerate(rows):
        tokens[at, : len(own)], labels[at, : len(own)] = own, targets
        mask[at, : len(own)] = 1
    named = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    return {name: torch.from_numpy(array) for name, array in named.items()}
