"""The batch budget of a run: found or taken as asked, written down, and kept from then on.

Batches are a function of the manifest. So a run that is continued has the budget it began with,
and only lack of memory lowers it: before a call, where less is free than its batches took, and in
the middle of one, where memory ran out after all. The manifest has the new budget before the shard
is begun again, so that no shard is made of two plans.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

import sdi
from curate.batches import Batch
from curate.batchpass import Sketch, moved, seeded
from curate.budget import (
    DEFAULT,
    Need,
    Rows,
    at_most,
    find,
    largest,
    measure,
    release,
    too_long,
    try_asked,
    where,
)
from curate.errors import CurateError
from curate.examples import ExampleSet
from curate.memory import CPU_SPILL, available, ran_out, sized
from curate.rundir import RunDirectory
from sdi.sketch.kernels import has_numba

#: Where the manifest's details say what the budget was decided by.
DETAILS = "batch"
#: A run is small where its tokens are so many of its longest row: it takes the default, untimed.
SMALL = 100
#: What a sketcher's buffers may take (`limit` of `sdi.Sketcher`).
LIMIT = 64 << 20
_PROBED_ROWS = 64

Made = TypeVar("Made")


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
    least = min(lengths, key=lambda one: int(lengths[one].min()))
    shortest = sets[least].tokens(int(np.argmin(lengths[least])))
    different = [int(n) for n in np.unique(np.maximum(together, 1))]
    most = min(most, max(len(values) for values in lengths.values()))
    total = checkpoints * int(together.sum())
    return Rows(tokens, different, most, total, sets[name].pad_id, shortest)


@dataclass(frozen=True)
class Sizing:
    """What a budget is decided with: the run, what makes a sketcher, rows, device and model."""

    run: RunDirectory
    made: Callable[..., Sketch]
    rows: Rows
    device: torch.device
    model: torch.nn.Module

    @cached_property
    def sketch(self) -> Sketch:
        """The sketcher of the run."""
        return self.made()

    @property
    def held(self) -> list[Tensor]:
        """The model's own tensors."""
        return [*self.model.parameters(), *self.model.buffers()]

    def begin(self, asked: int | None, *, drew: bool = False) -> int:
        """The budget of a run that has no shard yet: `asked`, or one that is found.

        A budget that was asked for is refused only where its largest batch ran out of memory when
        it was tried; that is not tried where memory is plenty.

        Args:
            asked: the recipe's.
            drew: whether the model draws random numbers.

        Raises CurateError where the longest row, or what was asked for, does not fit.
        """
        free = available(self.device)
        known = {"why": "asked for", "free": free}
        budget, found = self._found(drew) if asked is None else (asked, known)
        if asked is not None and not self._plenty(asked):
            self._if_passed(lambda: try_asked(self._pass, self.rows, asked, self.device, self.held))
        _note(self.run, budget, found)
        return budget

    def keep(self, budget: int) -> int:
        """The budget of a run that has shards: the same, or less where less memory is free.

        Raises CurateError where not even one of the longest rows fits.
        """
        need = self._known()
        if need is None:
            if self._plenty(budget) or (need := self._if_passed(self._measured)) is None:
                return budget
            noted = self.run.manifest.details.get(DETAILS, {})
            _note(self.run, budget, {**noted, "need": asdict(need)})
        free = available(self.device)
        if free is None or self._takes(need, budget) <= free:
            return budget
        tried = self.run.manifest.details.get(DETAILS, {}).get("free")
        if tried is not None and free >= 0.9 * tried:  # it was asked for, and fitted
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

    def _pass(self, batch: Batch, sketch: Sketch | None = None) -> sdi.Part:
        with seeded(int(batch.rows[0])):
            return (sketch or self.sketch)(moved(batch, self.device), batch.ids)

    def _takes(self, need: Need, budget: int) -> int:
        return need.worst(self.rows.lengths, budget, self.rows.most)

    def _found(self, drew: bool) -> tuple[int, dict[str, Any]]:
        """A budget for the first shard and every other, and what it was decided by."""
        small = self.rows.tokens < SMALL * self.rows.lengths[-1]
        fixed = "the model draws random numbers" if drew else "the run is small" if small else None
        if fixed is not None and self._plenty(DEFAULT):
            return DEFAULT, {"why": fixed}
        found = self._if_passed(
            lambda: find(
                self._pass, self.rows, self._measured(), self.device, self.held, fixed=fixed
            )
        )
        if found is None:
            return DEFAULT, {"why": "the longest rows cannot be passed"}
        return found.tokens, found.as_dict()

    def _plenty(self, budget: int) -> bool:
        """Whether the batches of a budget fit for certain, by one pass of the shortest row."""
        free = available(self.device)
        if free is None:
            return True
        need = self._if_passed(lambda: at_most(self._pass, self.rows, self.device, self.held))
        return need is not None and self._takes(need, budget) <= free

    def _measured(self) -> Need:
        """What rows take.

        On a CPU the buffers have room for one row meanwhile, however many there are. So they are
        in the base, and what they may grow to is added. On a GPU that would cost
        launches without number, and they are little beside its memory.
        """
        if self.device.type != "cpu":
            return measure(self._pass, self.rows, self.device, self.held)
        tight = self.made(limit=1)
        # Without numba the product has copies in float32, of 4 times its bytes where it is bf16.
        buffers = int(LIMIT * CPU_SPILL) * (1 if has_numba() else 5)
        return measure(lambda b: self._pass(b, tight), self.rows, self.device, self.held, buffers)

    def _if_passed(self, work: Callable[[], Made]) -> Made | None:
        """What `work` gives, or None where a row cannot be passed, whatever the error.

        It is an error of some row of the data, or of the way it is tried here. The run names the
        row when it comes to it, and keeps what is before. Too little memory is told now.
        """
        try:
            return work()
        except CurateError:
            raise
        except Exception as error:
            if ran_out(error):
                raise
        return None

    def _known(self) -> Need | None:
        """What the manifest says, if it is of this device and of rows as long."""
        noted = self.run.manifest.details.get(DETAILS, {}).get("need")
        if not noted:
            return None
        lengths, each = tuple(noted["lengths"]), tuple(noted["each"])
        need = Need(noted["where"], noted["base"], lengths, each, noted.get("buffers", 0))
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
        raise too_long(tried[1], device, seen)
    before = run.manifest.batch_budget or DEFAULT
    lower_budget(run, before, max(1, before // 2), f"memory ran out on {device} ({seen})")


def _note(run: RunDirectory, budget: int, found: dict[str, Any]) -> None:
    details = {**run.manifest.details, DETAILS: found}
    run.note(batch_budget=budget, details=details)
