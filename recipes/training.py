"""Training for the shipped recipes: seeded, resumable by step, with a weight for each row.

`train` is a pure function of (model's weights, rows, settings): batches come from a generator of
its own, never from torch's global one, so that equal arms of a comparison see equal noise.
The loss is the one that `sdi` attributes (`causal_lm_loss`), a mean over each row's targets.

Letters: B examples, T tokens, N rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sdi.losses import causal_lm_loss

from .looped_gpt import load, save

if TYPE_CHECKING:
    from curate.callables import StepContext
    from curate.examples import ExampleSet

IGNORED = -100
Report = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Rows:
    """Tokenised rows in memory: ``tokens[i]`` and ``labels[i]`` int (T_i,), ``weights`` (N,)."""

    tokens: Sequence[NDArray[np.int32]]
    labels: Sequence[NDArray[np.int32]]
    weights: NDArray[np.float32]
    pad_id: int = 256

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def of(cls, examples: ExampleSet) -> Rows:
        """All rows of a set, each with weight one."""
        pairs = [examples.tokens(row) for row in range(len(examples))]
        tokens, labels = [p[0] for p in pairs], [p[1] for p in pairs]
        return cls(tokens, labels, np.ones(len(pairs), np.float32), examples.pad_id)

    def select(self, rows: Sequence[int], weights: Sequence[float] | None = None) -> Rows:
        """The given rows, in that order, with weights of their own where given."""
        chosen = self.weights[list(rows)] if weights is None else np.asarray(weights, np.float32)
        return Rows(
            [self.tokens[i] for i in rows], [self.labels[i] for i in rows], chosen, self.pad_id
        )

    def batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """input_ids, attention_mask and labels, each (B, T) int64, padded on the right."""
        width = max(len(self.tokens[i]) for i in rows)
        ids = np.full((len(rows), width), self.pad_id, np.int64)
        labels = np.full((len(rows), width), IGNORED, np.int64)
        mask = np.zeros((len(rows), width), np.int64)
        for place, i in enumerate(rows):
            length = len(self.tokens[i])
            ids[place, :length], labels[place, :length] = self.tokens[i], self.labels[i]
            mask[place, :length] = 1
        named = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        return {name: torch.from_numpy(value) for name, value in named.items()}


@dataclass(frozen=True)
class Settings:
    """How long and how fast: ``steps`` optimizer steps of ``batch_rows`` rows.

    The learning rate rises linearly over ``warmup`` steps, then falls as a cosine to ``floor``
    times its peak; it never reaches zero, so the last checkpoint has a weight too.
    """

    steps: int
    batch_rows: int = 64
    learning_rate: float = 3e-3
    warmup: int = 20
    floor: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0

    def rate(self, step: int) -> float:
        """The learning rate of step ``step`` (0-based)."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (
            self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        )


def schedule(rows: int, settings: Settings) -> Iterator[list[int]]:
    """Row numbers of every batch: whole shuffled passes one after another, cut into batches."""
    generator = np.random.default_rng(settings.seed)
    queue: list[int] = []
    for _ in range(settings.steps):
        while len(queue) < settings.batch_rows:
            queue.extend(generator.permutation(rows).tolist())
        yield queue[: settings.batch_rows]
        del queue[: settings.batch_rows]


def train(
    model: nn.Module,
    rows: Rows,
    settings: Settings,
    *,
    save_at: Sequence[int] = (),
    directory: Path | None = None,
    report: Report | None = None,
) -> list[float]:
    """Train in place; returns the mean loss (N-weighted) of every step.

    Checkpoints go to ``directory/step-00100`` after each step in ``save_at``, with the learning
    rate of that step beside them. Raises ValueError on no rows and on a loss that is not finite.
    """
    if not len(rows):
        raise ValueError("no rows to train on; expected at least one")
    optimizer = torch.optim.AdamW(
        model.parameters(), settings.learning_rate, weight_decay=settings.weight_decay
    )
    model.train()
    losses: list[float] = []
    for step, chosen in enumerate(schedule(len(rows), settings)):
        losses.append(_step(model, optimizer, rows, chosen, settings, step))
        if step + 1 in save_at and directory is not None:
            target = directory / f"step-{step + 1:05d}"
            save(model, target, step=step + 1, learning_rate=settings.rate(step))
        if report is not None:
            report(step + 1, settings.steps, losses[-1])
    model.eval()
    return losses


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rows: Rows,
    chosen: list[int],
    settings: Settings,
    step: int,
) -> float:
    for group in optimizer.param_groups:
        group["lr"] = settings.rate(step)
    loss = (causal_lm_loss(model, rows.batch(chosen)) * _weights(rows, chosen)).mean()
    value = float(loss.detach())
    if not math.isfinite(value):
        raise ValueError(f"the loss is {value} at step {step + 1}; lower train learning_rate")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
    optimizer.step()
    return value


def _weights(rows: Rows, chosen: list[int]) -> Tensor:
    return torch.from_numpy(rows.weights[chosen])


def checkpoint_steps(steps: int, fractions: Sequence[float]) -> list[int]:
    """The steps after which to save: fractions of the whole, at least step one."""
    return sorted({max(1, round(steps * fraction)) for fraction in fractions})


def train_base(
    context: StepContext,
    *,
    data: str = "train",
    save_at: Sequence[float] = (0.25, 0.5, 1.0),
    **settings: Any,
) -> None:
    """The recipe's ``train`` step: trains the recipe's model on ``data``, saving checkpoints.

    ``save_at`` are fractions of ``steps``; the other arguments are those of `Settings`.
    Checkpoints that are there already are not made again, unless the step was asked for again.
    """
    from curate.examples import load_examples

    plan = Settings(**settings)
    folder = context.run / "checkpoints"
    wanted = checkpoint_steps(plan.steps, save_at)
    there = all((folder / f"step-{step:05d}" / "model.safetensors").is_file() for step in wanted)
    if there and not context.overwrite:
        context.log("checkpoints are there already; nothing to train")
        return
    rows = Rows.of(load_examples(context.specs()[data], name=data))
    losses = train(
        context.model(),
        rows,
        plan,
        save_at=wanted,
        directory=folder,
        report=lambda done, total, loss: context.progress(f"train, loss {loss:.3f}", done, total),
    )
    context.log(f"trained {plan.steps} steps on {len(rows)} rows, last loss {losses[-1]:.3f}")


__all__ = ["Rows", "Settings", "checkpoint_steps", "load", "schedule", "train", "train_base"]
