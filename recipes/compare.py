"""Does the curated set train a better model? Retrain on it, and on two sets to hold it against.

Three arms: **curated** (the kept rows, with their weights), **random** (as many rows, drawn
afresh for every seed from the whole pool) and **everything**. Within a seed all arms have the
same initial weights and the same number of optimizer steps of the same size; only rows differ.
They are measured on a set that was neither trained on nor used to curate: mean loss, and the
share of rows whose whole response greedy decoding reproduces.

What it gives up: equal steps are not equal passes, so a small curated set is seen more often
than everything is. Three seeds show the spread of training, not of the choice of queries.
The verdict is made from paired differences, one per seed; a mean difference that is not at
least twice its standard error away from zero is called no gain.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import torch
from torch import nn

from sdi.losses import causal_lm_loss

from .training import IGNORED, Rows, Settings, train

if TYPE_CHECKING:
    from curate.callables import StepContext
    from curate.rundir import RunDirectory

ARMS = ("curated", "random", "everything")
INITIAL = 1000  # seeds of initial weights start here, away from the seed of the base model


@dataclass(frozen=True)
class Outcome:
    """One retraining, measured; ``key`` is a digest of all that decided it."""

    key: str
    arm: str
    seed: int
    rows: int
    loss: float
    exact: float


@dataclass(frozen=True)
class Arm:
    """The rows one arm trains on (in the training set's numbering), and their weights."""

    name: str
    rows: list[int]
    weights: list[float]


def make_arms(kept: Sequence[int], weights: Sequence[float], total: int, seed: int) -> list[Arm]:
    """The three arms of one seed; ``total`` rows are in the pool."""
    drawn = np.random.default_rng([seed, total]).permutation(total)[: len(kept)]
    return [
        Arm("curated", list(kept), list(weights)),
        Arm("random", sorted(drawn.tolist()), [1.0] * len(kept)),
        Arm("everything", list(range(total)), [1.0] * total),
    ]


def evaluate(model: nn.Module, rows: Rows, *, batch_rows: int = 64) -> tuple[float, float]:
    """(mean loss per row in nats, share of rows reproduced exactly) on ``rows``.

    Greedy decoding reproduces a response if and only if the likeliest token is the right one at
    every target with the right tokens before it, so one forward pass decides it.
    """
    losses, exact = [], []
    order = sorted(range(len(rows)), key=lambda row: len(rows.tokens[row]))
    with torch.no_grad():
        for start in range(0, len(order), batch_rows):
            batch = rows.batch(order[start : start + batch_rows])
            kept: list[torch.Tensor] = []
            losses.append(causal_lm_loss(_Keeping(model, kept), batch))
            labels = batch["labels"][:, 1:]
            right = (kept[0][:, :-1].argmax(-1) == labels) | (labels == IGNORED)
            exact.append(right.all(1).float())
    return float(torch.cat(losses).mean()), float(torch.cat(exact).mean())


class _Keeping(nn.Module):
    """Hands the logits of one forward pass on, so that loss and accuracy share it."""

    def __init__(self, model: nn.Module, kept: list[torch.Tensor]) -> None:
        super().__init__()
        self.model, self.kept = model, kept

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids, attention_mask)
        self.kept.append(logits)
        return logits


def retrain(
    context: StepContext,
    *,
    seeds: int = 3,
    selection: str = "curated",
    train_set: str = "train",
    eval_set: str = "eval",
    eval_rows: int | None = None,
    **settings: Any,
) -> None:
    """The recipe's ``retrain`` step: every arm and seed, each result kept as it comes.

    ``settings`` are those of `training.Settings`; ``eval_rows`` takes the first so many rows of
    the eval set. Results stand in ``retrain/results.jsonl``; those that are there already and
    came from the same rows, weights and settings are not made again.
    """
    from curate.rundir import RunDirectory

    run = RunDirectory.open(context.run)
    pool = Rows.of(run.example_set(train_set))
    measured = Rows.of(run.example_set(eval_set))
    measured = measured.select(range(len(measured))[:eval_rows])
    kept, weights = kept_rows(run, selection)
    path = context.run / "retrain" / "results.jsonl"
    known = {outcome.key: outcome for outcome in read_outcomes(path)}
    outcomes: list[Outcome] = []
    for arm, plan in _plans(kept, weights, len(pool), seeds, settings):
        key = _key(context, arm, plan, len(measured))
        label = f"retrain {len(outcomes) + 1}/{seeds * len(ARMS)}: {arm.name}, seed {plan.seed}"
        found = known.get(key) or _outcome(context, arm, plan, pool, measured, key, label)
        outcomes.append(found)
        _write_outcomes(outcomes, path)
        context.log(f"      {label}: loss {found.loss:.4f}, exact {found.exact:.3f}")


def kept_rows(run: RunDirectory, selection: str) -> tuple[list[int], list[float]]:
    """Rows that ``selection`` kept, in order, and their weights (one where it has none)."""
    frame = run.selection(selection).filter("kept").sort("row").collect()
    if not len(frame):
        raise ValueError(f"selection {selection!r} keeps no rows; loosen filter in the recipe")
    if "weight" not in frame.columns:
        return frame["row"].to_list(), [1.0] * len(frame)
    return frame["row"].to_list(), frame["weight"].fill_null(1.0).to_list()


def _plans(
    kept: list[int], weights: list[float], total: int, seeds: int, settings: dict[str, Any]
) -> Iterator[tuple[Arm, Settings]]:
    for seed in range(seeds):
        for arm in make_arms(kept, weights, total, seed):
            yield arm, Settings(**{**settings, "seed": seed})


def _key(context: StepContext, arm: Arm, plan: Settings, measured: int) -> str:
    model = context.recipe.model.model_dump(mode="json")
    parts = [model, asdict(arm), asdict(plan), measured, context.recipe.data]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _outcome(
    context: StepContext,
    arm: Arm,
    plan: Settings,
    pool: Rows,
    measured: Rows,
    key: str,
    label: str,
) -> Outcome:
    model = context.model(seed=INITIAL + plan.seed)
    rows = pool.select(arm.rows, arm.weights)
    train(model, rows, plan, report=lambda done, of, _: context.progress(label, done, of))
    loss, exact = evaluate(model, measured)
    return Outcome(key, arm.name, plan.seed, len(arm.rows), loss, exact)


def read_outcomes(path: Path) -> list[Outcome]:
    """Outcomes written so far; none where the file is not there."""
    if not path.is_file():
        return []
    return [Outcome(**json.loads(line)) for line in path.read_text("utf-8").splitlines()]


def _write_outcomes(outcomes: Sequence[Outcome], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(asdict(outcome)) + "\n" for outcome in outcomes), "utf-8")
    partial.replace(path)


# -- what it came to ------------------------------------------------------------------------------


def compare(
    context: StepContext, *, query: str = "query", by: str = "source"
) -> dict[str, pl.DataFrame]:
    """The recipe's ``compare`` step: the arms beside each other, the verdict, the profiles.

    ``by`` is the column whose groups get a profile (mean influence at each step, early, late).
    Raises ValueError where ``retrain`` has not been run.
    """
    from curate.rundir import RunDirectory

    outcomes = read_outcomes(context.run / "retrain" / "results.jsonl")
    if not outcomes:
        raise ValueError("nothing to compare; run the retrain step first (--from retrain)")
    run = RunDirectory.open(context.run)
    return {
        "Retrained, mean ± spread over seeds (loss: lower is better)": summary(outcomes),
        "Curated against the others, paired by seed": verdicts(outcomes),
        f"Mean influence on {query} by {by}": profile(run, query, by),
    }


def summary(outcomes: Sequence[Outcome]) -> pl.DataFrame:
    """One line per arm: rows, seeds, loss and exact with their standard deviations over seeds."""
    lines = []
    for arm in ARMS:
        mine = [outcome for outcome in outcomes if outcome.arm == arm]
        loss, exact = [o.loss for o in mine], [o.exact for o in mine]
        lines.append(
            {
                "trained on": arm,
                "rows": mine[0].rows,
                "seeds": len(mine),
                "loss": _mean(loss),
                "loss ±": _deviation(loss),
                "exact": _mean(exact),
                "exact ±": _deviation(exact),
            }
        )
    return pl.DataFrame(lines)


def verdicts(outcomes: Sequence[Outcome]) -> pl.DataFrame:
    """Curated less each other arm, seed by seed: mean difference, its error, and in words."""
    lines = []
    for other in ARMS[1:]:
        for measure, sign in (("loss", -1.0), ("exact", 1.0)):
            gains = paired(outcomes, other, measure, sign)
            mean, error = _mean(gains), _deviation(gains) / math.sqrt(len(gains))
            words = verdict(mean, error)
            line = {"against": other, "measure": measure, "gain": mean, "se": error}
            lines.append({**line, "seeds": len(gains), "verdict": words})
    return pl.DataFrame(lines)


def paired(outcomes: Sequence[Outcome], other: str, measure: str, sign: float) -> list[float]:
    """``sign`` × (curated − other) for every seed that has both."""
    found = {(o.arm, o.seed): float(getattr(o, measure)) for o in outcomes}
    seeds = sorted({o.seed for o in outcomes})
    both = [s for s in seeds if ("curated", s) in found and (other, s) in found]
    return [sign * (found["curated", s] - found[other, s]) for s in both]


def verdict(gain: float, error: float) -> str:
    """In words: a gain or a loss only where it is more than twice its standard error."""
    if not math.isfinite(error):
        return "one seed: no verdict"
    if abs(gain) <= 2 * error or gain == 0:
        return "no gain"
    return "gain" if gain > 0 else "no gain (worse)"


def profile(run: RunDirectory, query: str, by: str) -> pl.DataFrame:
    """Mean influence of each group's rows: every step, early, late, total."""
    groups = run.examples("train").select("row", by)
    scores = run.influence(query)
    names = scores.collect_schema().names()
    steps = [name for name in names if name[0] == "s" and name[1:].isdigit()]
    means = [pl.col(name).mean() for name in (*steps, "early", "late", "total")]
    joined = groups.join(scores, on="row", how="inner")
    return joined.group_by(by).agg(pl.len().alias("rows"), *means).sort(by).collect()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _deviation(values: Sequence[float]) -> float:
    """The sample standard deviation; NaN for fewer than two values."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
