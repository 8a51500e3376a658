"""What a run is checked on before it sketches: a batch of rows, and a row with and without padding.

Batches are made by length, so how much padding a row gets depends on its neighbours. A model that
reads padding (attention without its mask, a halting rule or a norm over all positions) gives a row
another influence in every batch, and no comparison within one batch can show it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from curate.batches import Batch, alone_and_padded, batches, has_padding, plan
from curate.batchpass import sketched
from sdi.errors import SelfCheckError

if TYPE_CHECKING:
    import sdi
    from curate.examples import ExampleSet
    from curate.shardplan import ShardTask
    from curate.sketching import SketcherLike

CLOSE = 1e-3, 2e-2  # of a loss, and of a sketch, whose products may be rounded to bfloat16
LOOSE = 3e-2, 0.5  # the same where the model computes in half precision
TINY = 1e-3  # the gradient of a loss below may be mostly rounding


def first_of_rows(tasks: Sequence[ShardTask], sets: Mapping[str, ExampleSet], budget: int) -> Batch:
    """The first batch of two rows or more, since one alone cannot show that rows mix."""
    for task in tasks:
        span = np.arange(task.first, task.last)
        lengths = sets[task.set].lengths_of(span)
        if any(len(group) > 1 for group in plan(lengths, budget)):
            found = batches(sets[task.set], budget_tokens=budget, rows=span)
            return next(batch for batch in found if len(batch.ids) > 1)
    first = tasks[0]
    rows = range(first.first, first.last)
    return next(batches(sets[first.set], budget_tokens=budget, rows=rows))


def rows_to_pad(
    tasks: Sequence[ShardTask], sets: Mapping[str, ExampleSet], budget: int
) -> tuple[Batch, Batch] | None:
    """The shortest row alone, and as wide as the longest; None where no batch has padding."""
    spans = [sets[t.set].lengths_of(np.arange(t.first, t.last)) for t in tasks]
    if not any(has_padding(lengths, budget) for lengths in spans):
        return None
    task, lengths = min(zip(tasks, spans, strict=True), key=lambda pair: int(pair[1].min()))
    examples, row = sets[task.set], task.first + int(lengths.argmin())
    longest = max(int(lengths.max()) for lengths in spans)
    identity = examples.ids([row])[0]
    return alone_and_padded(row, identity, examples.tokens(row), examples.pad_id, longest)


def refuse_padding(
    sketcher: SketcherLike, alone: Batch, wide: Batch, device: torch.device
) -> dict[str, Any]:
    """Sketch a row alone and padded, and compare.

    Returns:
        Both widths and how far losses and sketches differ, for the manifest.

    Raises:
        SelfCheckError: they differ by more than rounding.
    """
    short, long = (sketched(sketcher, batch, device) for batch in (alone, wide))
    widths = [batch.shape[1] for batch in (alone, wide)]
    loss, sketch = _gaps(short, long, int(sketcher.loop.outside))
    most = LOOSE if sketcher.narrow else CLOSE
    if not (loss <= most[0] and (sketch is None or sketch <= most[1])):
        off = "" if sketch is None else f" and a sketch that is {sketch:.2g}"
        steps = f"{len(short.steps)} and {len(long.steps)} steps"
        raise SelfCheckError(
            f"row '{alone.ids[0]}' of {widths[0]} tokens has, padded to {widths[1]}, a loss that "
            f"is {loss:.2g}{off} off what it is alone (expected below {most[0]:g} and "
            f"{most[1]:g}; it runs {steps} alone and padded): the model or its loss reads "
            f"padding, and a row's influence would depend on its batch. The forward has to take "
            f"attention_mask and obey it (attention, norms, halting rules and random states over "
            f"positions); or sketch with budget_tokens: 1 in a new run, each row in a batch of its "
            f"own"
        )
    return {"widths": widths, "loss": loss, "sketch": sketch}


def _gaps(short: sdi.Part, long: sdi.Part, codas: int) -> tuple[float, float | None]:
    """Relative differences of the loss and of the sketch of all steps together.

    A step that only one of them has is zero in the other (a token that halts later), and comes
    before the coda's. A loss that is next to nothing has a gradient of rounding: not compared.
    """
    losses = [float(part.losses[0]) for part in (short, long)]
    loss = abs(losses[1] - losses[0]) / max(abs(losses[0]), 0.1)
    if max(map(abs, losses)) < TINY:
        return loss, None
    depth = max(len(part.steps) for part in (short, long))
    mine, theirs = (_deepened(part.values, depth, codas) for part in (short, long))
    return loss, float((theirs - mine).norm()) / max(float(mine.norm()), 1e-12)


def _deepened(values: torch.Tensor, depth: int, codas: int) -> torch.Tensor:
    """(1, S, M) as (1, depth, M), with zeros before the last `codas`."""
    steps = values.shape[1] - codas
    zeros = values.new_zeros(1, depth - values.shape[1], values.shape[2])
    return torch.cat([values[:, :steps], zeros, values[:, steps:]], dim=1)
