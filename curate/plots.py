"""Charts of a run, as Altair charts: what a notebook shows and a page embeds."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from curate.profile import profile, step_energy
from curate.rundir import RunDirectory

BAND = 2.0
"""Half the width of a noise band, in standard errors."""


def trajectories(run: RunDirectory, query: str, by: str = "source") -> Any:
    """Mean SDI_t over the loop, a line for each source, with a band of two standard errors."""
    import altair as alt

    frame = profile(run, query, by).with_columns(
        (pl.col("mean") - BAND * pl.col("mean_se")).alias("low"),
        (pl.col("mean") + BAND * pl.col("mean_se")).alias("high"),
    )
    base = alt.Chart(_data(frame)).encode(
        x=alt.X("step:Q", title="loop step", axis=alt.Axis(tickMinStep=1, format="d")),
        color=alt.Color(f"{_name(by)}:N", title=by),
    )
    band = base.mark_area(opacity=0.2).encode(y=alt.Y("low:Q", title=""), y2="high:Q")
    line = base.mark_line(point=True).encode(
        y=alt.Y("mean:Q", title="mean influence (SDI)"),
        tooltip=[_tip(by, "N"), _tip("step", "Q"), _tip("mean", "Q"), _tip("mean_se", "Q"),
                 _tip("rows", "Q")],
    )  # fmt: skip
    zero = alt.Chart(_values([{"zero": 0}])).mark_rule(strokeDash=[3, 3], opacity=0.5)
    title = f"When each source helps: {query}"
    return alt.layer(zero.encode(y="zero:Q"), band, line).properties(
        width=420, height=280, title=title
    )


def energy(run: RunDirectory, query: str) -> Any:
    """Step energy: Σ |SDI_t| over the training rows."""
    import altair as alt

    data = _data(step_energy(run, query))
    return (
        alt.Chart(data)
        .mark_bar()
        .encode(
            x=alt.X("step:O", title="loop step"),
            y=alt.Y("energy:Q", title="step energy"),
            tooltip=[_tip("step", "O"), _tip("energy", "Q")],
        )
        .properties(width=420, height=220, title=f"Step energy: {query}")
    )


def contrast(run: RunDirectory, query: str, by: str = "source", bins: int = 40) -> Any:
    """Histogram of contrast (late − early), coloured by source; counted before it is drawn."""
    import altair as alt

    train = run.influence_entry(query).train_set
    labels = run.examples(train).select("row", by)
    table = run.influence(query).select("row", "contrast").join(labels, on="row", how="left")
    frame = table.drop_nulls("contrast").collect()
    values = frame["contrast"].to_numpy()
    edges = np.histogram_bin_edges(values, bins=bins) if len(values) else np.array([0.0, 1.0])
    place = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
    counted = (
        frame.with_columns(pl.Series("low", edges[place]), pl.Series("high", edges[place + 1]))
        .group_by(by, "low", "high")
        .agg(pl.len().alias("count"))
        .sort(by, "low")
    )
    return (
        alt.Chart(_data(counted))
        .mark_bar(opacity=0.8)
        .encode(
            x=alt.X("low:Q", title="contrast (late − early)"),
            x2="high:Q",
            y=alt.Y("count:Q", stack="zero", title="rows"),
            color=alt.Color(f"{_name(by)}:N", title=by),
            tooltip=[_tip(by, "N"), _tip("low", "Q"), _tip("high", "Q"), _tip("count", "Q")],
        )
        .properties(width=420, height=220, title=f"Contrast: {query}")
    )


class Plots:
    """The charts of one run: `run.plot.trajectories("test")`."""

    def __init__(self, run: RunDirectory) -> None:
        self._run = run

    def trajectories(self, query: str, by: str = "source") -> Any:
        """Mean SDI_t over the loop by source, with its noise band."""
        return trajectories(self._run, query, by)

    def energy(self, query: str) -> Any:
        """Step energy."""
        return energy(self._run, query)

    def contrast(self, query: str, by: str = "source", bins: int = 40) -> Any:
        """Histogram of contrast by source."""
        return contrast(self._run, query, by, bins)


def _data(frame: pl.DataFrame) -> Any:
    """Rows inside the chart: what was summed up is small, and the chart needs no other file."""
    return _values(frame.to_dicts())


def _values(rows: list[dict[str, Any]]) -> Any:
    import altair as alt

    return alt.Data(values=rows)  # type: ignore[no-untyped-call]


def _name(column: str) -> str:
    """A column's name with what Vega-Lite would take for a path or a type escaped."""
    for mark in ("\\", ".", "[", "]", ":"):
        column = column.replace(mark, f"\\{mark}")
    return column


def _tip(column: str, kind: str) -> Any:
    import altair as alt

    return alt.Tooltip(f"{_name(column)}:{kind}", title=column)
