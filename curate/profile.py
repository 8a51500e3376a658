"""What a query's influence looks like over the loop: means by source, step energy, noise.

Noise: rows share the query's sketch and their hashes, so their errors do not average out. The
error of a mean over rows is that of the product of the mean training vector ḡ with the query:
√(Σ_k η_k² (‖ḡ‖² n₂² + s_k²)/M). It is had from the mean of the rows' sketches, in one pass.

Letters: N rows, τ steps, M sketch dimension.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from curate.blocks import block_rows, spans
from curate.errors import UsageError
from curate.queryvectors import part_of
from curate.rundir import RunDirectory


def profile(run: RunDirectory, query: str, by: str | None = "source") -> pl.DataFrame:
    """Mean influence of each step for each value of a column of the training set.

    Returns:
        by, step (from 1), rows, mean (of SDI_t), mean_se (noise of the sketch; NULL where no closed
        form holds: preconditioned, cosine, maximum over groups), absolute (mean |SDI_t|),
        signed_share (mean over the sum of the means), energy (Σ |SDI_t| over the rows). Sorted by
        value and step.

    Raises:
        UsageError: no such column.
    """
    table, names = _joined(run, query, by)
    key = by or "all"
    parts = [
        table.group_by(key)
        .agg(
            pl.len().cast(pl.Int64).alias("rows"),
            pl.col(name).cast(pl.Float64).mean().alias("mean"),
            pl.col(name).cast(pl.Float64).abs().mean().alias("absolute"),
            pl.col(name).cast(pl.Float64).abs().sum().alias("energy"),
        )
        .with_columns(pl.lit(number, dtype=pl.Int32).alias("step"))
        for number, name in enumerate(names, start=1)
    ]
    frame = pl.concat(parts).collect().sort(key, "step")
    share = (pl.col("mean") / pl.col("mean").sum().over(key)).alias("signed_share")
    frame = frame.with_columns(share).join(_noise(run, query, by), on=[key, "step"], how="left")
    order = [key, "step", "rows", "mean", "mean_se", "absolute", "signed_share", "energy"]
    return frame.select(order).sort(key, "step")


def step_energy(run: RunDirectory, query: str) -> pl.DataFrame:
    """step, energy: Σ |SDI_t| over the training rows."""
    return profile(run, query, None).select("step", "energy", "mean_se")


def step_names(columns: list[str]) -> list[str]:
    """The step columns of an influence table, in order."""
    return [name for name in columns if name[0] == "s" and name[1:].isdigit()]


def _joined(run: RunDirectory, query: str, by: str | None) -> tuple[pl.LazyFrame, list[str]]:
    scores = run.influence(query)
    names = step_names(scores.collect_schema().names())
    if by is None:
        return scores.with_columns(pl.lit("all").alias("all")), names
    examples = run.examples(run.influence_entry(query).train_set)
    known = examples.collect_schema().names()
    if by not in known:
        raise UsageError(f"the training set has no column {by!r}; it has {', '.join(known)}")
    return scores.join(examples.select("row", by), on="row", how="left"), names


def _noise(run: RunDirectory, query: str, by: str | None) -> pl.DataFrame:
    """by, step, mean_se."""
    from curate.scores import scoring_of

    table, _ = _joined(run, query, by)
    key = by or "all"
    labels = table.select("row", key).sort("row").collect()[key]
    values = labels.unique().sort()
    codes = labels.replace_strict(values, np.arange(len(values)), return_dtype=pl.Int64).to_numpy()
    entry = run.influence_entry(query)
    if entry.kind != "dot" or entry.group == "max":
        columns = run.influence(query).collect_schema().names()
        error = np.full((len(values), len(step_names(columns))), np.nan)
    else:
        error = _errors(scoring_of(run, query), codes, len(values))
    frames = [
        pl.DataFrame({key: values, "mean_se": error[:, step]}).with_columns(
            pl.lit(step + 1, dtype=pl.Int32).alias("step")
        )
        for step in range(error.shape[1])
    ]
    return pl.concat(frames).with_columns(pl.col("mean_se").fill_nan(None))


def _errors(scoring: Any, codes: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.float64]:
    """Standard error of each source's mean at each step, (sources, τ)."""
    own = part_of(scoring.groups, scoring.place, scoring.place + 1)
    product, vectors = scoring.product, scoring.vectors(own)
    sizes = np.maximum(np.bincount(codes, minlength=count), 1)[:, None, None]
    variance: Any = 0.0
    for eta, source, query in zip(
        product.weights.values(), product.sources.values(), vectors, strict=True
    ):
        mean = np.zeros((count, source.slots, source.dim))
        for start, stop in spans(0, source.rows, block_rows(source.slots, source.dim)):
            block = source.read(start, stop)
            share = np.eye(count, dtype=np.float32)[codes[start:stop]]
            values = block.values.astype(np.float32) * block.scale[:, :, None]
            mean += (share.T @ values.reshape(len(share), -1)).reshape(mean.shape)
        mean /= sizes
        norm = np.square(mean).sum(axis=2)
        score = np.einsum("num,ucm->nuc", mean, query.values[:, 0, :-2])
        term = norm[:, :, None] * query.gram[None, :, 0, :-4] + score**2
        variance = variance + eta**2 * term / product.dim
    return np.asarray(np.sqrt(variance).reshape(count, -1), dtype=np.float64)
