"""Outcomes as lines, as JSON, and as the Markdown table."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict

from tests.zoo.measure import Outcome


def row(outcome: Outcome) -> str:
    """One line: verdict, both errors, name, and the message of a refusal."""
    said = outcome.refused or outcome.broken or (outcome.worst if not outcome.right else "")
    line = f"{outcome.verdict:8} {_number(outcome.error)} {_number(outcome.sketch)}  {outcome.name}"
    return f"{line}: {said}" if said else line


def _number(value: float | None) -> str:
    return "      –" if value is None else f"{value:7.1e}"


def summary(outcomes: list[Outcome]) -> str:
    """Counts, and the worst errors of what is right, by bound."""
    parts = [f"{len(outcomes)} entries"]
    for verdict in ("right", "refused", "REFUSED", "WRONG", "BROKEN"):
        count = sum(outcome.verdict == verdict for outcome in outcomes)
        parts += [f"{count} {verdict}"] if count else []
    for bound in sorted({outcome.bound for outcome in outcomes}):
        mine = [o for o in outcomes if o.right and o.bound == bound]
        step = max((o.error or 0.0 for o in mine), default=0.0)
        sketch = max((o.sketch or 0.0 for o in mine), default=0.0)
        parts.append(f"worst under {bound:g}: steps {step:.1e}, sketches {sketch:.1e}")
    parts.append(f"{sum(o.seconds for o in outcomes):.0f} s")
    return "; ".join(parts)


def as_json(outcomes: list[Outcome]) -> str:
    """Every outcome with its verdict."""
    found = [
        {**asdict(o), "right": o.right, "passes": o.passes, "verdict": o.verdict} for o in outcomes
    ]
    return json.dumps(found, indent=1) + "\n"


def markdown(outcomes: list[Outcome]) -> str:
    """The grid of kinds by structures, the models, and the refusals, one of each sort."""
    sorts: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.refused or outcome.broken:
            sorts.setdefault(_sort(outcome), []).append(outcome)
    marks = {sort: f"[{number}]" for number, sort in enumerate(sorts, start=1)}
    cells: dict[str, dict[str, str]] = {}
    for outcome in outcomes:
        kind, structure = outcome.name.split(" × ", 1)
        cells.setdefault(kind, {})[structure] = _cell(outcome, marks)
    models = cells.pop("model", {})
    structures = list(dict.fromkeys(s for by_structure in cells.values() for s in by_structure))
    columns = {structure: str(number) for number, structure in enumerate(structures, start=1)}
    lines = [*_HEAD, f"{summary(outcomes).rpartition(';')[0]}.", "", "## Loop structures", ""]
    lines += [f"{number}. {structure}" for structure, number in columns.items()]
    lines += ["", "## Layer kinds × loop structures", ""]
    lines += _grid(["", *columns.values()], [
        [kind, *(found.get(structure, "") for structure in structures)]
        for kind, found in cells.items()
    ])  # fmt: skip
    lines += ["", "## Models", "", *_grid(["model", "steps · sketches"], map(list, models.items()))]
    lines += ["", "## Messages", ""]
    for sort, found in sorts.items():
        said = (found[0].refused or found[0].broken).replace("\n", " ")
        lines.append(f"- {marks[sort]} {len(found)} times, such as `{found[0].name}`: {said}")
    return "\n".join(lines) + "\n"


_HEAD = [
    "# The zoo",
    "",
    "Written by `python -m tests.zoo --write`. A cell has the relative error of step gradients and",
    "of sketches against per-row autograd, over max(‖step‖, 1e-6‖total‖), the largest over rows,",
    "steps and parameters; right is at most 1e-4 in float32 and 1e-2 in bf16 and under autocast. A",
    "number in brackets is a refusal, as declared; its message stands at the end. In bold is what",
    "is neither right nor refused as declared. Where the layout takes tokens alone, and the kind",
    "mixes them, a cell is empty.",
    "",
]


def _grid(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def _cell(outcome: Outcome, marks: dict[str, str]) -> str:
    said = marks.get(_sort(outcome), "")
    errors = f"{outcome.error or 0.0:.0e} · {outcome.sketch or 0.0:.0e}".replace("e-0", "e-")
    errors = errors.replace("0e+00", "0").replace("e+0", "e")
    if outcome.passes:
        return errors if outcome.right else said
    return f"**{outcome.verdict} {said}**"


def _sort(outcome: Outcome) -> str:
    """The message without what differs from entry to entry: names, shapes and numbers."""
    said = outcome.refused or outcome.broken
    said = re.sub(r"^(\w+): [\w.,… ]+?( in \w+)?: ", r"\1: ", said)
    return re.sub(
        r"the (step gradient|steps) of \S+|[\w.+-]*\d[\w.+-]*|\([^)]*\)|\w+ returns", "…", said
    )
