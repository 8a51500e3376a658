"""An examination of a model as tables: one for programs, several for people."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import isfinite
from typing import TYPE_CHECKING, Any

import polars as pl

from curate.doctor import Finding

if TYPE_CHECKING:
    from curate.examine import Examination
    from sdi.stepnorms import StepNorms

#: Steps shown side by side, and into how many groups more of them are put.
COLUMNS, GROUPS = 12, 8
_STEP_WIDTH = 11

SCHEMA: dict[str, Any] = {
    "check": pl.String,
    "verdict": pl.String,
    "detail": pl.String,
    "shape": pl.List(pl.Int64),
    "rule": pl.String,
    "gradient": pl.Float64,
    "norms": pl.List(pl.Float64),
    "error": pl.Float64,
}


def whole(found: Examination) -> pl.DataFrame:
    """Everything in one table, for --json, --csv and --parquet; the last row is the verdict.

    Rows whose check is "parameter" have the columns shape, rule, gradient (norm of the total by
    plain autograd), norms (one number a step) and error; others are NULL there.
    """
    rows: list[dict[str, Any]] = [finding.as_dict() for finding in found.findings]
    rows += [_parameter(found, name) for name in found.shapes]
    rows += [Finding(f"coverage {what}", "ok", text).as_dict() for what, text in found.covered]
    rows.append({"check": "verdict", "verdict": _word(found), "detail": found.verdict})
    return pl.DataFrame(rows, schema=SCHEMA)


def _word(found: Examination) -> str:
    return "ok" if found.refused is None else "bad"


def _parameter(found: Examination, name: str) -> dict[str, Any]:
    known = next((row for row in found.norms if row.name == name), None)
    gradients = found.gradients.norms if found.gradients is not None else {}
    row: dict[str, Any] = {"check": "parameter", "verdict": "ok", "detail": name}
    row |= {"shape": list(found.shapes[name]), "rule": _rule(found, name)}
    row["gradient"] = gradients.get(name)
    if known is None:
        return row | {"verdict": "note"}
    disagrees = found.refused is not None and not known.error <= found.tolerance
    error = known.error if isfinite(known.error) else None  # JSON has no infinity
    row |= {"norms": list(known.norms), "error": error}
    return row | ({"verdict": "bad"} if disagrees else {})


def _rule(found: Examination, name: str) -> str | None:
    return " + ".join(found.rules.get(name, ())) or None


def shown(found: Examination, width: int | None) -> list[tuple[str, pl.DataFrame]]:
    """(title, table) for people.

    Args:
        found: the examination.
        width: characters of a line, which says how many steps fit; None is no limit.
    """
    tables = [("", pl.DataFrame([finding.as_dict() for finding in found.findings]))]
    if found.norms:
        title = "Norm of each parameter's gradient at each step (root mean square over rows)"
        table = by_step(found, width) if found.tied else by_layer(found, width)
        if len(table.columns) < 4 + len(found.steps):
            title += "; of several steps the root of the sum of squares"
        tables.append((title, table))
    elif found.gradients is not None:
        tables.append(("Norm of each parameter's gradient, by plain autograd", totals(found)))
    if found.covered:
        lines = pl.DataFrame(found.covered, schema=["coverage", "what"], orient="row")
        title = "Coverage" if found.refused is None else "Coverage, were it attributable"
        tables.append((title, lines))
    return tables


def totals(found: Examination) -> pl.DataFrame:
    """One row per parameter where the steps are not to be had."""
    rows = [_parameter(found, name) for name in found.shapes]
    return pl.DataFrame(
        {
            "parameter": [row["detail"] for row in rows],
            "shape": [_shape(row["shape"]) for row in rows],
            "norm": pl.Series([row["gradient"] for row in rows], dtype=pl.Float64),
        }
    )


def by_step(found: Examination, width: int | None) -> pl.DataFrame:
    """One row per parameter, one column per step or group of steps."""
    rows = [(row.name, row.shape, _rule(found, row.name), row.error) for row in found.norms]
    spans = grouped(len(found.steps), _fitting(rows, width))
    cells = [_in_spans(row.norms, spans) for row in found.norms]
    return _table(rows, [_label(found.steps, span) for span in spans], cells)


def by_layer(found: Examination, width: int | None) -> pl.DataFrame:
    """For untied models: layers side by side, parameters of the same name in one row.

    The layer's own name is `*`, and the error is the largest of the row's.
    """
    alike: dict[tuple[str, tuple[int, ...], str | None], list[StepNorms]] = {}
    for row in found.norms:
        key = (_within(row.name, found.members), row.shape, _rule(found, row.name))
        alike.setdefault(key, []).append(row)
    rows = [(*key, max(row.error for row in group)) for key, group in alike.items()]
    spans = grouped(len(found.steps), _fitting(rows, width))
    cells = []
    for group in alike.values():
        norms = [sum(column) for column in zip(*(row.norms for row in group), strict=True)]
        cells.append(_in_spans(norms, spans))
    return _table(rows, [_label(found.steps, span) for span in spans], cells)


def _within(name: str, members: Sequence[str]) -> str:
    for member in members:
        if name.startswith(f"{member}."):
            return f"*{name.removeprefix(member)}"
    return name


_Row = tuple[str, tuple[int, ...], str | None, float]


def _table(
    rows: Sequence[_Row], labels: Sequence[str], cells: Sequence[Sequence[float]]
) -> pl.DataFrame:
    columns: dict[str, Any] = {
        "parameter": [name for name, _, _, _ in rows],
        "shape": [_shape(shape) for _, shape, _, _ in rows],
        "rule": pl.Series([rule for _, _, rule, _ in rows], dtype=pl.String),
        "error": [float(f"{error:.1g}") for _, _, _, error in rows],
    }
    for place, label in enumerate(labels):
        columns[label] = [float(f"{values[place]:.3g}") for values in cells]
    return pl.DataFrame(columns)


def _shape(shape: Sequence[int]) -> str:
    return " × ".join(str(size) for size in shape) or "scalar"


def _fitting(rows: Sequence[_Row], width: int | None) -> int:
    """How many columns of steps fit beside the others."""
    if width is None:
        return COLUMNS
    parts = ([len(name) for name, *_ in rows], [len(_shape(row[1])) for row in rows])
    rules = [len(row[2] or "unused") for row in rows]
    taken = sum(max(lengths, default=0) + 1 for lengths in (*parts, rules)) + 7
    return max(1, min(COLUMNS, (width - taken) // _STEP_WIDTH))


def grouped(steps: int, columns: int) -> list[range]:
    """The steps in order, one a column where they fit, else in groups of nearly equal size."""
    if steps <= columns:
        return [range(step, step + 1) for step in range(steps)]
    count = min(columns, GROUPS)
    bounds = [round(place * steps / count) for place in range(count + 1)]
    return [range(a, b) for a, b in pairwise(bounds)]


def _in_spans(norms: Sequence[float], spans: Sequence[range]) -> list[float]:
    """Of several steps, the root of the sum of squares."""
    return [sum(norms[step] ** 2 for step in span) ** 0.5 for span in spans]


def _label(steps: Sequence[str], span: range) -> str:
    first, last = steps[span[0]], steps[span[-1]]
    return f"step {first}" if first == last else f"{first}–{last}"
