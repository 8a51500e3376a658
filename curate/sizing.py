"""The batch budget of a run: found or taken as asked, written down, and kept from then on.

Batches are a function of the manifest. So a run that is continued has the budget it began with,
and only lack of memory lowers it: before a call, where less is free than its batches took, and in
the middle of one, where memory ran out after all. The manifest has the new budget before the shard
is begun again, so that no shard is made of two plans.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import sdi
from curate.batches import Batch
from curate.batchpass import Sketch, draws, moved, seeded
from curate.budget import (
    DEFAULT,
    Found,
    Need,
    Rows,
    find,
    largest,
    measure,
    refuse_too_large,
    release,
    where,
)
from curate.errors import CurateError
from curate.examples import ExampleSet
from curate.memory import available, sized
from curate.rundir import RunDirectory
from sdi.errors import LossError

#: Where the manifest's details say what the budget was decided by.
DETAILS = "batch"
_PROBED_ROWS = 64
# Errors of some row of the data: the run names it when it comes to it, and keeps what is before.
_OF_ROWS = (LossError, IndexError)


def rows_of(sets: Mapping[str, ExampleSet], most: int, checkpoints: int) -> Rows:
    """What the batches of some sets depend on; at least one has rows.

    Args:
        sets: by name.
        most: rows of a shard.
        checkpoints: how many times everything is sketched.
    """
    lengths = {name: np.asarray(s.lengths, np.int64) for name, s in sets.items() if len(s)}
    name = max(lengths, key=lambda one: int(lengths[one].max()))
    longest = np.argsort(-lengths[name], kind="stable")[:_PROBED_ROWS]
    tokens = [sets[name].tokens(int(row)) for row in longest]
    together = np.concatenate(list(lengths.values()))
    different = [int(n) for n in np.unique(np.maximum(together, 1))]
    most = min(most, max(len(values) for values in lengths.values()))
    return Rows(tokens, different, most, checkpoints * int(together.sum()), sets[name].pad_id)


@dataclass(frozen=True)
class Sizing:
    """What a budget is decided with: the run, its sketcher and rows, device and model."""

    run: RunDirectory
    sketch: Sketch
    rows: Rows
    device: torch.device
    model: torch.nn.Module

    @property
    def held(self) -> list[Tensor]:
        """The model's own tensors."""
        return [*self.model.parameters(), *self.model.buffers()]

    def begin(self, asked: int | None) -> int:
        """The budget of a run that has no shard yet: `asked`, if it fits, or one that is found.

        Raises CurateError where the longest row, or what was asked for, does not fit.
        """
        need = self._measured()
        if asked is not None:
            if need is not None:
                refuse_too_large(need, self.rows, asked, self.device)
            found = {"why": "asked for", "need": asdict(need) if need is not None else None}
            _note(self.run, asked, found)
            return asked
        chosen = self._found(need) if need is not None else None
        if chosen is None:
            _note(self.run, DEFAULT, {"why": "the longest rows cannot be passed"})
            return DEFAULT
        _note(self.run, chosen.tokens, chosen.as_dict())
        return chosen.tokens

    def keep(self, budget: int) -> int:
        """The budget of a run that has shards: the same, or less where less memory is free.

        Raises CurateError where not even one of the longest rows fits.
        """
        need = self._known()
        if need is None and (need := self._measured()) is not None:
            noted = self.run.manifest.details.get(DETAILS, {})
            _note(self.run, budget, {**noted, "need": asdict(need)})
        free = available(self.device)
        if need is None or free is None or self._takes(need, budget) <= free:
            return budget
        lower = min(budget, largest(need, self.rows, free))
        takes = self._takes(need, lower)
        if takes > free:
            raise CurateError(
                f"one row of {self.rows.lengths[-1]} tokens needs about {sized(takes)} for its "
                f"pass; {self.device} has {sized(free)} free. Free memory, or continue on a "
                f"larger device: what is sketched stays"
            )
        if lower < budget:
            lower_budget(self.run, budget, lower, f"{sized(free)} of memory is free")
        return lower

    def _pass(self, batch: Batch) -> sdi.Part:
        with seeded(int(batch.rows[0])):
            return self.sketch(moved(batch, self.device), batch.ids)

    def _takes(self, need: Need, budget: int) -> int:
        return need.worst(self.rows.lengths, budget, self.rows.most)

    def _found(self, need: Need) -> Found | None:
        probe = self.rows.batch(1, self.rows.lengths[0])
        timed = not draws(self.sketch, probe, self.device)
        with suppress(*_OF_ROWS):
            return find(self._pass, self.rows, need, self.device, timed=timed)
        return None

    def _measured(self) -> Need | None:
        with suppress(*_OF_ROWS):
            return measure(self._pass, self.rows, self.device, self.held)
        return None

    def _known(self) -> Need | None:
        """What the manifest says, if it is of this device and of rows as long."""
        noted = self.run.manifest.details.get(DETAILS, {}).get("need")
        if not noted:
            return None
        need = Need(noted["where"], noted["base"], tuple(noted["lengths"]), tuple(noted["each"]))
        same = need.where == where(self.device, self.held[0].dtype)
        return need if same and need.lengths[-1] >= self.rows.lengths[-1] else None


def lower_budget(run: RunDirectory, before: int, after: int, because: str) -> None:
    """Write a lower budget down and say so."""
    warnings.warn(
        f"batches have {after} padded tokens from here on, not {before}: {because}", stacklevel=2
    )
    _note(run, after, run.manifest.details.get(DETAILS, {}) | {"lowered": because})


def halve(run: RunDirectory, tried: tuple[int, int], device: torch.device, seen: str) -> None:
    """Halve the budget of a run whose pass ran out of memory, for the shard to be begun again.

    Args:
        tried: (B, T) of the batch that did not fit.
        seen: what the allocator said.

    Raises CurateError where the batch was one row already.
    """
    release(device)
    if tried[0] < 2:
        raise CurateError(
            f"memory ran out on {device} with one row of {tried[1]} tokens in the batch ({seen}). "
            f"Free memory, cut rows with max_tokens, run the model with gradient checkpointing or "
            f"take a smaller sketch.dim; what is sketched stays"
        )
    before = run.manifest.batch_budget or DEFAULT
    lower_budget(run, before, max(1, before // 2), f"memory ran out on {device} ({seen})")


def _note(run: RunDirectory, budget: int, found: dict[str, Any]) -> None:
    details = {**run.manifest.details, DETAILS: found}
    run.note(batch_budget=budget, details=details)
