"""Sketch the examples of a run: every checkpoint, every set, only what is missing.

The unit of work is a shard: a contiguous range of rows at one checkpoint. Its rows are batched by
length, sketched, quantised into a buffer, written, and then listed in the manifest, all kinds in
one step. Nothing else is kept between shards: memory does not grow with the rows, and a process
that is killed loses the shard it was at. What the batches are depends on the manifest only
(`curate.shardplan`): the budget of padded tokens is recorded with the first shard and stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

import sdi
from curate import shardplan, sizing
from curate.batches import Batch, batches
from curate.batchpass import device_named, drawn, moved, seeded, sketched
from curate.budget import first_line, one_row
from curate.coverage import recorded
from curate.errors import CurateError, UsageError
from curate.examples import ExampleSet
from curate.manifest import LoopEntry, Manifest, ModelEntry, SketchEntry
from curate.memory import GIVEN_BACK, give_back, ran_out
from curate.rundir import RunDirectory
from curate.settle import checkpoint_entry
from curate.shardbuffer import ShardBuffer
from curate.shardplan import ShardTask
from curate.startcheck import first_of_rows, refuse_padding, rows_to_pad
from sdi.adapters import needed_base
from sdi.checkpoints import Checkpoint, load_weights, settle_weights
from sdi.coverage import gradient_share
from sdi.parameter_rates import settle_rates

Progress = Callable[[str, int, int], None]
Loss = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]


def _silent(label: str, done: int, total: int) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class SketchOptions:
    """How examples become sketches.

    Attributes:
        dim, seed: M and the seed of the hashes.
        store: "steps" keeps steps and totals of training rows, "totals" the totals alone.
        budget_tokens: most padded tokens B × T of a batch; None finds it (`curate.budget`).
        shard_rows: most rows of a shard; deep or wide sketches have fewer.
        loss: per-example loss, (model, batch) → (B,).
        method, products: how sketches are evaluated, as `sdi.Sketcher` takes them.
        check_rows: rows of the first batch that are checked against autograd; 0 is no check.
        device: where the model runs; None is a GPU where there is one.
    """

    dim: int = 4096
    seed: int = 0
    store: Literal["steps", "totals"] = "steps"
    budget_tokens: int | None = None
    shard_rows: int = shardplan.MOST_ROWS
    loss: Loss = sdi.causal_lm_loss
    method: str = "auto"
    products: str = "auto"
    check_rows: int = 2
    device: str | None = None


@dataclass(frozen=True)
class LoopOptions:
    """As `sdi.Loop` takes them, the body by names."""

    body: tuple[str, ...]
    tied: bool = True
    skip: tuple[str, ...] = ()
    full_graph: bool = False
    seeded_rows: bool = False


class SketcherLike(Protocol):
    """What is used of `sdi.Sketcher`."""

    loop: sdi.Loop
    repeated: int
    narrow: bool

    @property
    def spec(self) -> dict[str, Any]:
        """What the sketch depends on."""

    @property
    def coverage(self) -> dict[str, Any]:
        """What was attributed, and by which rules."""

    def __call__(self, batch: dict[str, Tensor], ids: Sequence[str]) -> sdi.Part:
        """Sketch one batch."""


@dataclass(frozen=True)
class Instruments:
    """What measures and what checks it; replaced in tests."""

    sketcher: Callable[..., Any] = sdi.Sketcher
    check: Callable[..., Any] = sdi.self_check


@dataclass(frozen=True)
class SketchReport:
    """What a call did: shards and rows written (0 where nothing was missing), by set name.

    `repeated` of the passes over a row were made again without rounding (`sdi.Sketcher.repeated`).
    """

    shards: int
    rows: dict[str, int] = field(default_factory=dict)
    repeated: int = 0


def sketch_run(
    run: RunDirectory,
    model_factory: Callable[[], nn.Module],
    loop: LoopOptions,
    checkpoints: Sequence[Checkpoint],
    sets: Mapping[str, ExampleSet] | Sequence[str] | None = None,
    options: SketchOptions | None = None,
    progress: Progress = _silent,
    *,
    model_spec: Mapping[str, Any] | None = None,
    instruments: Instruments | None = None,
) -> SketchReport:
    """Sketch what is missing of `sets` at `checkpoints`, and list it in the run's manifest.

    Args:
        run: its manifest must hold the sets (`RunDirectory.add_set`).
        model_factory: makes the model; its weights are replaced by each checkpoint's.
        loop: which part of the model is the loop body.
        checkpoints: in the order that the manifest is to have; weights that are None are settled.
        sets: example sets by name, or names; all of the run's by default, "eval" ones excepted.
        options: how to sketch.
        progress: called as (label, tokens done, tokens in all), both counted over the whole run.
        model_spec: how the model was made, for the manifest.

    Raises:
        CurateError: the run holds sketches of another model, checkpoint or spec.
        SdiError: the model cannot be sketched correctly, a loss is not finite, a disk is full.
    """
    session = _Session(
        run, loop, options or SketchOptions(), instruments or Instruments(), progress
    )
    with run.writing():
        return session.go(model_factory(), dict(model_spec or {}), checkpoints, _opened(run, sets))


def _opened(
    run: RunDirectory, sets: Mapping[str, ExampleSet] | Sequence[str] | None
) -> dict[str, ExampleSet]:
    if isinstance(sets, Mapping):
        missing = sorted(set(sets) - set(run.manifest.sets))
        if missing:
            raise CurateError(f"set '{missing[0]}' is not in the run: add_set takes it over first")
        return dict(sets)
    known = run.manifest.sets
    names = [name for name in known if known[name].role != "eval"] if sets is None else sets
    return {name: run.example_set(name) for name in names}


@dataclass
class _Session:
    """One call of `sketch_run`: what it works with, and how far it has come."""

    run: RunDirectory
    loop: LoopOptions
    options: SketchOptions
    instruments: Instruments
    progress: Progress
    done: int = 0
    total: int = 0
    detached: set[str] = field(default_factory=set)
    base: dict[str, Tensor] | None = None
    tried: tuple[int, int] = (0, 0)
    repeated: int = 0
    passes: int = 0

    def go(
        self,
        model: nn.Module,
        model_spec: dict[str, Any],
        checkpoints: Sequence[Checkpoint],
        sets: dict[str, ExampleSet],
    ) -> SketchReport:
        """Everything, under the writer's lock."""
        if not sets or not any(len(examples) for examples in sets.values()):
            raise UsageError("there is nothing to sketch: the run has no rows")
        model = model.to(self.device).eval()
        body = sdi.Loop(model, **asdict(self.loop))
        checkpoints = settle_weights(settle_rates(c, body) for c in checkpoints)
        self.base = needed_base(model, [c.path for c in checkpoints])
        self._settle(body, model_spec, checkpoints)
        begun = self.run.manifest.batch_budget is not None and bool(self.run.manifest.shards)
        if not begun:
            self._fix_plan(body, checkpoints, sets)
        work = [(checkpoint, self._tasks(checkpoint.name, sets)) for checkpoint in checkpoints]
        if begun and any(tasks for _, tasks in work):
            self._sizing(body, checkpoints, sets).keep(self._budget)
        self._count(sets, work)
        rows: dict[str, int] = {}
        for checkpoint, tasks in work:
            for task in self._checkpoint(body, checkpoint, tasks, sets):
                rows[task.set] = rows.get(task.set, 0) + task.last - task.first
        give_back()
        return SketchReport(sum(len(tasks) for _, tasks in work), rows, self.repeated)

    def _settle(
        self, body: sdi.Loop, model_spec: dict[str, Any], checkpoints: Sequence[Checkpoint]
    ) -> None:
        """Record model, loop, spec and checkpoints, or refuse to mix."""
        spec = dict(self._sketcher(body, None).spec)
        named = {key: spec.pop(key) for key in ("version", "seed", "dim")}
        hashed = {key: spec[key] for key in sorted(spec) if key not in ("checkpoint", "method")}
        loss = getattr(self.options.loss, "__name__", type(self.options.loss).__name__)
        if body.skipped:  # sketches that pool other parameters are not to be mixed
            hashed["skip"] = sorted(body.skipped)
        self.run.update(Manifest.without_attempts)
        self.run.settle(
            ModelEntry(
                spec=model_spec,
                fingerprint=body.fingerprint(),
                parameters=sum(p.numel() for p in body.model.parameters()),
            ),
            LoopEntry(body=self.loop.body, tied=self.loop.tied, coverage=body.coverage()),
            SketchEntry(**named, options={"loss": loss, **hashed}),
        )
        for checkpoint in checkpoints:
            at = self._sketcher(body, checkpoint).spec
            self.run.settle_checkpoint(checkpoint_entry(checkpoint, body.model, at.get("scales")))

    def _fix_plan(
        self, body: sdi.Loop, checkpoints: Sequence[Checkpoint], sets: Mapping[str, ExampleSet]
    ) -> None:
        """Record what batches and shards depend on, before the first shard; a short row tells."""
        load_weights(body.model, checkpoints[0].path, base=self.base)
        first = next(examples for examples in sets.values() if len(examples))
        shortest = int(np.argmin(first.lengths))
        batch = next(batches(first, budget_tokens=1, rows=[shortest]))
        with one_row(batch.shape[1], self.device):
            part, drew = drawn(self._sketcher(body, checkpoints[0]), batch, self.device)
        most = shardplan.shard_rows(len(part.steps), self.options.dim)
        self.run.note(shard_rows=min(most, self.options.shard_rows))
        self._sizing(body, checkpoints, sets).begin(self.options.budget_tokens, drew=drew)

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return device_named(self.options.device)

    def _sizing(
        self, body: sdi.Loop, checkpoints: Sequence[Checkpoint], sets: Mapping[str, ExampleSet]
    ) -> sizing.Sizing:
        """What the budget is decided with; batches are tried with the first checkpoint."""
        made = partial(self._sketcher, body, checkpoints[0])
        rows = sizing.rows_of(sets, self.run.manifest.shard_rows or 1, len(checkpoints))
        return sizing.Sizing(self.run, made, rows, self.device, body.model)

    def _tasks(self, checkpoint: str, sets: Mapping[str, ExampleSet]) -> list[ShardTask]:
        manifest = self.run.manifest
        assert manifest.shard_rows is not None
        found: list[ShardTask] = []
        for name in sets:
            role = manifest.sets[name].role
            kinds = shardplan.stored_kinds(role, tied=self.loop.tied, store=self.options.store)
            found += shardplan.tasks(manifest, name, checkpoint, kinds, manifest.shard_rows)
        return found

    def _count(
        self,
        sets: Mapping[str, ExampleSet],
        work: Sequence[tuple[Checkpoint, list[ShardTask]]],
    ) -> None:
        """Tokens in all, and those that an earlier call has done, for an honest ETA."""
        lengths = {name: np.asarray(examples.lengths) for name, examples in sets.items()}
        left = sum(
            int(lengths[task.set][task.first : task.last].sum()) for _, ts in work for task in ts
        )
        self.total = len(work) * sum(int(values.sum()) for values in lengths.values())
        self.done = self.total - left

    def _checkpoint(
        self,
        body: sdi.Loop,
        checkpoint: Checkpoint,
        tasks: Sequence[ShardTask],
        sets: Mapping[str, ExampleSet],
    ) -> Iterator[ShardTask]:
        """Load a checkpoint, check the sketcher on its first batch, then shard by shard."""
        if not tasks:
            return
        load_weights(body.model, checkpoint.path, base=self.base)
        sketcher = self._sketcher(body, checkpoint)
        self._with_room(lambda: self._check(sketcher, checkpoint.name, tasks, sets))
        before = sketcher.repeated
        for task in tasks:
            self._with_room(partial(self._shard, sketcher, task, sets[task.set]))
            yield task
        self.repeated += sketcher.repeated - before

    def _with_room(self, work: Callable[[], None]) -> None:
        """Do some work; where memory runs out, again from its start with half of the budget."""
        while True:
            done = self.done
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if not ran_out(error):
                    raise
                seen = first_line(error)
            # Out here nothing holds the tensors of the frames that failed.
            self.done = done
            sizing.halve(self.run, self.tried, self.device, seen)

    def _check(
        self,
        sketcher: SketcherLike,
        checkpoint: str,
        tasks: Sequence[ShardTask],
        sets: Mapping[str, ExampleSet],
    ) -> None:
        """Compare a batch with per-row autograd, and note what share of the gradient is attributed.

        Then a row alone and padded, for what no comparison within a batch shows.
        """
        if not self.options.check_rows:
            return
        batch = first_of_rows(tasks, sets, self._budget)
        self.tried = batch.shape
        rows = min(self.options.check_rows, len(batch.ids))
        tensors, loop, loss = moved(batch, self.device), sketcher.loop, self.options.loss
        with seeded(int(batch.rows[0])):
            report = self.instruments.check(sketcher, tensors, batch.ids, rows=rows).as_dict()
            shares = gradient_share(loop, tensors, batch.ids, loss, report["rows"])
        report["gradient"] = shares.as_dict()
        if pair := rows_to_pad(tasks, sets, self._budget):
            self.tried = pair[1].shape
            report["padding"] = refuse_padding(sketcher, *pair, self.device)
        self.run.update(
            lambda m: m.model_copy(update={"self_check": {**m.self_check, checkpoint: report}})
        )

    def _shard(self, sketcher: SketcherLike, task: ShardTask, examples: ExampleSet) -> None:
        """Sketch one shard's rows, write them, list them."""
        role = self.run.manifest.sets[task.set].role
        kinds = shardplan.stored_kinds(role, tied=self.loop.tied, store=self.options.store)
        buffer = ShardBuffer(task, kinds)
        label = f"sketch {task.set} at {task.checkpoint}"
        lengths = np.asarray(examples.lengths)
        self.progress(label, self.done, self.total)
        for batch in self._batches(task, examples):
            if self.passes % GIVEN_BACK == 0:
                give_back()
            self.passes += 1
            self.tried = batch.shape
            part = sketched(sketcher, batch, self.device)
            self.detached.update(part.detached)
            buffer.put(np.asarray(batch.rows), part)
            self.done += int(lengths[batch.rows].sum())
            self.progress(label, self.done, self.total)
        entries = buffer.write(self.run.sketches_directory(task.set, task.checkpoint))
        covered = recorded(self.run.manifest, sketcher, buffer.labels, self.detached)
        self.run.add_shards(entries, buffer.labels, covered)

    def _batches(self, task: ShardTask, examples: ExampleSet) -> Iterator[Batch]:
        rows = range(task.first, task.last)
        return batches(examples, budget_tokens=self._budget, rows=rows)

    @property
    def _budget(self) -> int:
        budget = self.run.manifest.batch_budget
        assert budget is not None
        return budget

    def _sketcher(
        self, body: sdi.Loop, checkpoint: Checkpoint | None, limit: int = sizing.LIMIT
    ) -> SketcherLike:
        """The sketcher of a checkpoint; without one, what its spec is for all of them."""
        options = self.options
        made: SketcherLike = self.instruments.sketcher(
            body,
            checkpoint=checkpoint.name if checkpoint else "",
            **{key: getattr(options, key) for key in ("dim", "seed", "loss", "method", "products")},
            limit=limit,
            **({"rates": dict(checkpoint.rates)} if checkpoint and checkpoint.rates else {}),
        )
        return made
