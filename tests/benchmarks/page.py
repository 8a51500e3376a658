"""The figures as a table to print, and as a page of Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.benchmarks.cases import CASES, EXPECTED
from tests.benchmarks.verdicts import Verdict, verdicts

Found = dict[str, Any]
Cells = list[str]

HEAD = ["case", "pass", "rows", "/ step", "quartiles", "rows/s", "peak MiB", "error", "bytes/row"]
JOB_HEAD = ["job", "rows", "queries", "batch", "seconds", "peak MiB"]
DEMAND_HEAD = ["demand", "bound", "found", "met"]

INTRODUCTION = """\
# What a sketch pass costs, beside what else there is

Printed by `python -m tests.benchmarks`, which measures a case anew where it is asked to and keeps
the other cases' figures. Each pass runs in a process of its own; rounds alternate between them.

- **training step**: forward, backward, SGD. **floor**: forward, and backward to the embeddings
  without weight gradients. **outer**, **fourier**, **auto**: our pass with each evaluation.
  **best size**: at the batch size, of those tried, that gives the most rows a second.
  **published**: `ProjectedTracInSDI` of step-decomposed-influence. **bergson**: its
  `GradientCollector`, each module projected to 16 × 16.
- **/ step**: seconds a row over those of the training step, the median over rounds of the ratio
  within a round, with its quartiles. **rows/s**: of the median round.
- **peak**: anonymous memory of the process, looked at every 5 ms in its first round. The published
  package keeps what a row has (bytes/row) in memory for every row of a job; ours writes it.
- **error**: ‖found − exact‖ / ‖(‖g_i‖‖g_j‖)‖ over pairs of two different rows, i.e. the root mean
  square of what ⟨g_i, g_j⟩ of whole gradients is off by where gradients have length one; over
  seeds. Ours is of what is stored, int8. Exact: plain autograd a row at a time in float32, of the
  weights as the case's data type rounds them.
- **bytes/row**: what is kept of a row: ours a vector of int8, a scale and a norm a step (of an
  ordinary model one vector, the sum over layers); the published package a float32 vector a
  parameter and step; bergson 256 numbers a module.

"""
JOB_NOTE = """\

The job: {whole} rows and {queries} queries of GSM8K, a looped GPT of width 64, τ = 6, m = 2048,
three checkpoints (of random weights), from the file to the mean influence of each row on the
queries; wall clock of the whole process. Only the runs shown were run: *extrapolated* is a straight
line through them, in rows and queries together. The published package is given its rows sorted by
length.
"""
MEMORY_NOTE = """\
Memory of a side that ran on 1,024 rows at most is not extrapolated, nor held against the demand.
"""
SIZES_NOTE = """\
Of the batches tried (padded tokens; rows) ours is the smallest that gives four fifths of the most
rows a second, the other's the fastest.
"""


def table(found: Found) -> str:
    """All of it as columns of text."""
    parts = [_columns(HEAD, _lines(found))]
    if found.get("job"):
        parts.append(_columns(JOB_HEAD, _job_lines(found["job"])))
    if demands := _demands(found):
        parts.append(_columns(DEMAND_HEAD, demands))
    return "\n".join(parts)


def page(found: Found, plot: str | None) -> str:
    """All of it as Markdown; `plot` is the file name of the picture."""
    text = INTRODUCTION + _machine(found["machine"])
    text += f"\n## Expected\n\n{EXPECTED}\n## Measured\n\n"
    text += f"![seconds a row over those of a training step]({plot})\n\n" if plot else ""
    text += _markdown(HEAD, _lines(found)) + _when(found["cases"])
    if found.get("job"):
        whole, sides = found["job"]["whole"], found["job"]["job"].values()
        text += JOB_NOTE.format(whole=whole["rows"], queries=whole["queries"])
        peaks = [side["peak_anonymous"]["whole"] for side in sides]
        text += MEMORY_NOTE if None in peaks else ""
        text += SIZES_NOTE if all(side["tried"] for side in sides) else ""
        text += "\n" + _markdown(JOB_HEAD, _job_lines(found["job"])) + _agreement(found["job"])
    demands = _demands(found)
    return text + ("\n## Demanded\n\n" + _markdown(DEMAND_HEAD, demands) if demands else "")


def _machine(machine: Found) -> str:
    bf16 = "multiplies bf16" if machine["bf16"] else "does not multiply bf16"
    return (
        f"Machine: {machine['processor']}, {machine['cores']} cores, {machine['threads']} threads "
        f"a process; it {bf16}. torch {machine['torch']}; "
        f"freed memory is {machine['freed memory']}.\n"
    )


def _when(cases: Found) -> str:
    """How often and on which day each case was measured, and whether batch sizes were tried."""
    said = (
        f"{name} {one['passes']['auto']['rounds']} on {one['measured']}"
        + ("" if one["sizes"] else ", one size")
        for name, one in cases.items()
    )
    return f"\nRounds: {'; '.join(said)}.\n"


def _lines(found: Found) -> list[Cells]:
    known = [name for name in CASES if name in found["cases"]]
    return [
        _line(name, entrant, line)
        for name in known
        for entrant, line in found["cases"][name]["passes"].items()
    ]


def _line(case: str, entrant: str, line: Found) -> Cells:
    low, middle, high = line["ratio"]
    error, kept = line.get("error"), line.get("bytes_per_row")
    shown = f"{entrant}, m = {line['dim']}" if line.get("dim") else entrant
    return [
        case, shown, str(line["rows"]), f"{middle:.2f}", f"{low:.2f}-{high:.2f}",
        f"{line['rows_per_second']:.3g}", f"{line['peak_anonymous'] / 2**20:.0f}",
        f"{error:.4f}" if error is not None else "-", f"{kept:,}" if kept is not None else "-",
    ]  # fmt: skip


def _job_lines(job: Found) -> list[Cells]:
    lines = []
    for name, side in job["job"].items():
        for run in side["runs"]:
            at = [name, str(run["rows"]), str(run["queries"]), str(side["size"])]
            lines.append([*at, f"{run['seconds']:.1f}", f"{run['peak_anonymous'] / 2**20:.0f}"])
        if side["seconds"]["whole"] is not None:
            seconds, peak = side["seconds"]["whole"], side["peak_anonymous"]["whole"]
            whole = [str(job["whole"]["rows"]), str(job["whole"]["queries"]), str(side["size"])]
            figures = [f"{seconds:.0f}", "-" if peak is None else f"{peak / 2**20:.0f}"]
            lines.append([f"{name}, extrapolated", *whole, *figures])
    return lines


def _agreement(job: Found) -> str:
    if not job["agreement"]:
        return ""
    rows, value = job["agreement"]["rows"], job["agreement"]["correlation"]
    each = {name: side["peak_anonymous"]["each"] for name, side in job["job"].items()}
    grows = "; ".join(f"{name} {b / 1e3:.0f} kB" for name, b in each.items() if b is not None)
    return (
        f"\nThe two tables of {rows} rows correlate at {value:.3f}. "
        f"Memory that each further row takes: {grows}.\n"
    )


def _demands(found: Found) -> list[Cells]:
    return [_demand(verdict) for verdict in verdicts(found)]


def _demand(verdict: Verdict) -> Cells:
    bound = f"{'≤' if verdict.most else '≥'} {verdict.bound:.3g}"
    return [verdict.what, bound, f"{verdict.found:.3g}", "yes" if verdict.met else "no"]


def _columns(head: Cells, lines: Sequence[Cells]) -> str:
    widths = [max(len(line[i]) for line in (head, *lines)) for i in range(len(head))]
    rows = (
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in (head, *lines)
    )
    return "".join(row.rstrip() + "\n" for row in rows)


def _markdown(head: Cells, lines: Sequence[Cells]) -> str:
    every = [head, ["---"] * len(head), *lines]
    return "".join("| " + " | ".join(line) + " |\n" for line in every)
