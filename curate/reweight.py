"""Weights for the rows that were kept, with mean one, so that a learning rate keeps its meaning."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from curate.errors import UsageError
from curate.filter import record
from curate.rank import default_query, from_examples, scored

if TYPE_CHECKING:
    from curate.rundir import RunDirectory

Method = Literal["softmax", "rank", "linear", "clip"]


class ReweightConfig(BaseModel):
    """How scores become weights, before they are scaled to mean one. With z the standardised score:

    softmax: exp(z / temperature); rank: from `low` for the worst to `high` for the best in equal
    steps; linear: the same in proportion to the score; clip: 1 + z / temperature within
    [`low`, `high`].
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Method = "softmax"
    by: str | None = None
    descending: bool = True
    temperature: float = Field(default=1.0, gt=0)
    low: float = Field(default=0.0, ge=0)
    high: float = Field(default=2.0, gt=0)


def weights(scores: NDArray[np.float64], config: ReweightConfig) -> NDArray[np.float64]:
    """(N,) weights of mean one for (N,) scores; equal scores get equal weights.

    Raises:
        UsageError: a score is not finite, `low` is above `high`, or all weights would be zero.
    """
    if config.low > config.high:
        raise UsageError(f"low ({config.low:g}) is above high ({config.high:g})")
    if not np.isfinite(scores).all():
        bad = int((~np.isfinite(scores)).sum())
        raise UsageError(f"{bad} of {len(scores)} kept rows have no finite score to weigh them by")
    signed = scores if config.descending else -scores
    spread = float(signed.std())
    # Rounding alone gives equal scores a spread, which must not be taken for a signal.
    if spread <= 1e-12 * float(np.abs(signed).max(initial=0.0)):
        return np.ones_like(signed)
    raw = _raw(signed, (signed - signed.mean()) / spread, config)
    if not raw.sum() > 0:
        raise UsageError("every weight would be zero; raise `high` or `low`")
    return np.asarray(raw / raw.mean(), dtype=np.float64)


def _raw(
    signed: NDArray[np.float64], z: NDArray[np.float64], config: ReweightConfig
) -> NDArray[np.float64]:
    """(N,) weights before scaling; `signed` is larger for better, `z` is it standardised."""
    if config.method == "softmax":
        exponent = z / config.temperature
        return np.asarray(np.exp(exponent - exponent.max()), dtype=np.float64)
    if config.method == "clip":
        bounded = np.clip(1 + z / config.temperature, config.low, config.high)
        return np.asarray(bounded, dtype=np.float64)
    if config.method == "rank":
        signed = _mean_ranks(signed)
    share = (signed - signed.min()) / (signed.max() - signed.min())
    return np.asarray(config.low + (config.high - config.low) * share, dtype=np.float64)


def _mean_ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N,) ranks from 1; ties share their mean."""
    ranks = pl.Series(values).rank("average").to_numpy()
    return np.asarray(ranks, dtype=np.float64)


def reweight_frame(
    decisions: pl.DataFrame, config: ReweightConfig, scores: pl.Series | None = None
) -> pl.DataFrame:
    """`decisions` with new weights on the kept rows (mean one), 0 on the dropped.

    `scores` (one for each row of `decisions`) replaces its `score` column for the weights only.
    """
    kept = decisions["kept"].to_numpy()
    if not kept.any():
        raise UsageError("the selection keeps no row, so there is nothing to weigh")
    used = decisions["score"] if scores is None else scores
    values = used.cast(pl.Float64).fill_null(float("nan")).to_numpy()
    result = np.zeros(decisions.height)
    result[kept] = weights(values[kept], config)
    return decisions.with_columns(pl.Series("weight", result))


def reweight(
    run: RunDirectory, selection: str = "curated", config: ReweightConfig | None = None
) -> pl.DataFrame:
    """Weigh a selection's kept rows by its own score, or by `config.by`; returns the decisions.

    A score where less is better (`filter` with descending off) gives its best rows most weight,
    unless `config.by` is given, which `config.descending` speaks of.
    """
    config = config or ReweightConfig()
    entry = run.selection_entry(selection)
    decisions = run.selection(selection).collect().sort("row")
    scores = None
    if config.by is None:
        downwards = bool(entry.config.get("filter", {}).get("descending", True))
        used = config.model_copy(update={"descending": downwards})
    else:
        used = config
        work = partial(scored, by=config.by)
        found = from_examples(run, default_query(run, entry.query), work, config.by)
        scores = found.sort("row")["score"]
    changed = reweight_frame(decisions, used, scores)
    settings = {**entry.config, "reweight": config.model_dump()}
    return record(run, selection, entry.model_copy(update={"config": settings}), changed)
