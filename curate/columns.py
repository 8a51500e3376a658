"""From raw scores to the columns of the influence table.

Letters: N rows, τ steps.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import polars as pl

from curate.product import EXTRA

Contrast = Literal["standardised", "raw"]
Array = npt.NDArray[Any]


def step_columns(steps: int) -> list[str]:
    """s01, s02, … sτ."""
    width = max(2, len(str(steps)))
    return [f"s{number:0{width}d}" for number in range(1, steps + 1)]


@dataclass(frozen=True)
class Moments:
    """Mean and spread over the training set of early and late influence, each (2, …)."""

    count: int
    mean: Array
    square: Array

    @classmethod
    def of(cls, raw: Array) -> Moments:
        """Moments over the first axis of raw scores (N, …, τ + 8)."""
        windows = np.moveaxis(raw[..., _at("early") : _at("late") + 1], -1, 0).astype(np.float64)
        mean = windows.mean(axis=1)
        return cls(raw.shape[0], mean, ((windows - mean[:, None]) ** 2).sum(axis=1))

    @classmethod
    def together(cls, several: Iterable[Moments]) -> Moments:
        """Moments of all rows from those of disjoint blocks (Chan, Golub and LeVeque 1979)."""
        first, *rest = several
        for other in rest:
            count = first.count + other.count
            gap = other.mean - first.mean
            mean = first.mean + gap * (other.count / count)
            between = gap**2 * (first.count * other.count / count)
            first = cls(count, mean, first.square + other.square + between)
        return first

    @property
    def scales(self) -> Array:
        """One over the standard deviation, 0 where nothing varies."""
        deviation = np.sqrt(self.square / self.count)
        return np.where(deviation > 0, 1.0 / np.where(deviation > 0, deviation, 1.0), 0.0)


def _at(name: str) -> int:
    """Index from the end of a raw column."""
    return EXTRA.index(name) - len(EXTRA)


def contrast(raw: Array, moments: Moments | None) -> tuple[Array, Array]:
    """Contrast and its standard error; standardised by `moments`, raw (late − early) without.

    The error is that of the difference of the two query vectors, each with its factor: early and
    late share the training sketch, so their covariance counts.
    """
    column = {name: raw[..., _at(name)].astype(np.float64) for name in EXTRA}
    weight = moments.scales if moments else np.ones(2)
    mean = moments.mean if moments else np.zeros(2)
    value = weight[1] * (column["late"] - mean[1]) - weight[0] * (column["early"] - mean[0])
    variance = weight[0] ** 2 * column["early_var"] + weight[1] ** 2 * column["late_var"]
    variance = variance - 2 * weight[0] * weight[1] * column["window_cov"]
    return value, np.sqrt(np.maximum(variance, 0.0))


def finish(
    raw: Array,
    moments: Moments | None,
    *,
    absent: npt.NDArray[np.bool_],
    errors: bool = True,
) -> pl.DataFrame:
    """The columns s01 … contrast_se, energy, peak, centre, energy_noise of N rows.

    Args:
        raw: (N, τ + 8) from `Product.score`, or (N, G, τ + 8) flattened by the caller.
        absent: (τ,) or (N, τ): steps that the query does not have, NULL in the table.
        errors: False leaves the standard errors NULL.
    """
    count = raw.shape[-1] - len(EXTRA)
    steps = np.where(absent, np.nan, raw[:, :count]).astype(np.float32)
    data: dict[str, Array] = {
        name: steps[:, number] for number, name in enumerate(step_columns(count))
    }
    data |= {name: raw[:, _at(name)] for name in ("total", "early", "late")}
    data["contrast"], contrast_se = contrast(raw, moments)
    for name in ("total", "early", "late"):
        data[f"{name}_se"] = np.sqrt(np.maximum(raw[:, _at(f"{name}_var")], 0.0))
    data |= {"contrast_se": contrast_se, **_shape(steps), "energy_noise": raw[:, _at("noise")]}
    if not errors:
        empty = np.full(len(raw), np.nan)
        data |= {name: empty for name in data if name.endswith(("_se", "_noise"))}
    peak = data.pop("peak")
    frame = pl.DataFrame({name: values.astype(np.float32) for name, values in data.items()})
    frame = frame.fill_nan(None).insert_column(
        frame.columns.index("centre"), pl.Series("peak", peak, dtype=pl.Int32)
    )
    return frame.with_columns(pl.col("peak").replace(0, None))


def _shape(steps: Array) -> dict[str, Array]:
    """Energy, peak step (0 where there is none) and centre of mass of |SDI_t|, from (N, τ)."""
    size = np.nan_to_num(np.abs(steps.astype(np.float64)))
    energy = size.sum(axis=1)
    numbers = np.arange(1, steps.shape[1] + 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        centre = (size @ numbers) / energy
    peak = np.where(energy > 0, size.argmax(axis=1) + 1, 0)
    return {"energy": energy, "peak": peak, "centre": centre}
