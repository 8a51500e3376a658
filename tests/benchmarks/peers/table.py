"""The verdicts as a page of Markdown."""

from __future__ import annotations

from typing import Any

from tests.benchmarks.peers.cases import LOOPS, QUERY, TRAIN, WIDTH, control, looped

Verdict = dict[str, Any]

INTRODUCTION = f"""# Other libraries on one Linear called three times

Printed by `python -m tests.benchmarks.peers --write`, which installs every library at the version
given, in an environment of its own with {{torch}} on the CPU, and asks it for the inner products
of the per-example gradients of {TRAIN} training rows and {QUERY} queries. The drivers
(`tests/benchmarks/peers/with_*.py`) use each library's own interface, with projection and curvature
switched off where they can be.

- **control**: two `nn.Linear({WIDTH}, {WIDTH})`, each called once: h ← tanh(W h + x).
- **looped**: the same with one `nn.Linear`, called {LOOPS} times.
- Their columns: ‖found − exact‖ / ‖exact‖ over the matrix of ⟨g_i, g_j⟩; exact is per-row
  autograd in float64. In brackets the error that a random projection of that dimension explains,
  which falls as m^-1/2 (the error is then the root mean square over 8 seeds); only more than three
  times that, or 1e-4 without a projection, is wrong.
- **steps**: the same for the (row, query, step) influence, where it is resolved.
- **right / wrong**: numbers within or beyond the bound; wrong ones come without an exception (the
  warnings are in PEERS.json). **refused**: the library says in its own words that it does not do
  this. **crash**: any other exception.

"""

NOTES = """
Not asked: quanda, which forwards to captum, dattri, kronfluence and TRAK; captum's `TracInCPFast`,
which attributes a last layer only; and influence functions (captum's Arnoldi, dattri's, pyDVL's)
and curvlinops' KFAC, which approximate a curvature and so have no exact answer here.
"""


def page(verdicts: list[Verdict], torch: str) -> str:
    """Introduction, the table of control and loop, the table of the other cases, notes."""
    main = [control().name, looped().name]
    rows = [_main_row(group, main) for group in _grouped(verdicts)]
    head = ["library", "version", "used", "control", "looped", "steps", "looped is", "message"]
    text = INTRODUCTION.replace("{torch}", torch) + _table(head, rows)
    others = [v for v in verdicts if v["case"] not in (*main, "-")]
    lines = [
        [v["case"], v["peer"], v["way"], _error(v), _number(v["steps"]), v["status"], _said(v)]
        for v in sorted(others, key=lambda v: v["case"])
    ]
    head = ["case", "library", "used", "error", "steps", "is", "message"]
    return text + "\n## Other cases\n\n" + CASES + _table(head, lines) + NOTES


CASES = """\
- **Linear that rescales its weight**: the control, made of a subclass of `nn.Linear` that halves
  its weight in `forward`.
- **called twice a step**: a body that calls its `nn.Linear` twice, looped three times.
- **first step under no_grad**: truncated backpropagation; the steps are numbered 1, 2, 3.
- **weight used by F.linear too**: after the loop the weight is used once without its module.
- **scalar mean over padded tokens**: rows of 1 to 5 tokens; the loss is one number, the mean over
  all tokens of the batch, the usual training loss. Judged against each row's mean over its own
  tokens. The published package is told `loss_reduction="mean"`, and its documentation asks for a
  mean over rows.
- **shuffled loader, two checkpoints**: judged under the best of all orders of the training rows.

"""


def _grouped(verdicts: list[Verdict]) -> list[list[Verdict]]:
    groups: dict[tuple[str, str], list[Verdict]] = {}
    for verdict in verdicts:
        groups.setdefault((verdict["peer"], verdict["way"]), []).append(verdict)
    return list(groups.values())


def _main_row(group: list[Verdict], names: list[str]) -> list[str]:
    first = group[0]
    by_case = {v["case"]: v for v in group}
    start = [first["peer"], first["version"], first["way"]]
    if first["case"] == "-":
        return [*start, "-", "-", "-", first["status"], _said(first)]
    plain, loop = (by_case[name] for name in names)
    steps = _number(loop["steps"])
    if plain["status"] != "right":  # then the driver, not the loop, may be at fault
        return [*start, plain["status"], _error(loop), steps, "not judged", _said(plain)]
    said = _said(loop)
    if loop["status"] != "right" and loop["note"]:
        said = f"{said}: {loop['note']}"
    return [*start, _error(plain), _error(loop), steps, loop["status"], said]


def _error(verdict: Verdict) -> str:
    expected = f" ({verdict['expected']:.2g})" if verdict["expected"] else ""
    return _number(verdict["error"]) + expected


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}" if value < 1e-3 else f"{value:.2g}"


def _said(verdict: Verdict) -> str:
    text = verdict["message"].replace("|", "\\|")
    return text if len(text) <= 200 else text[:197].rstrip() + " …"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
