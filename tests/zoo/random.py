"""Random models against per-row autograd: `python -m tests.zoo.random --models 2000`.

Hypothesis composes bodies out of the layer kinds and loops them at random. A model that is neither
right nor refused is shrunk, printed, and makes the exit status 1.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.zoo.case import RIGHT
from tests.zoo.grown import ONE, RESHAPED, ROWWISE, TWO, Plan, Tree, grown
from tests.zoo.kinds import KINDS
from tests.zoo.measure import Outcome, measure

_TAKEN = [k for k in KINDS.values() if k.expected == RIGHT and k.needs != "single"]
TOKEN = [k.name for k in _TAKEN if k.token]
ANY = [k.name for k in _TAKEN]


@st.composite
def trees(draw: st.DrawFn, token: bool, depth: int = 3) -> Tree:
    """A body: a layer kind, an earlier one again, or a combination of bodies."""
    leaf = st.tuples(st.just("leaf"), st.sampled_from(TOKEN if token else ANY))
    again = st.tuples(st.just("shared"), st.integers(0, 3))
    if depth == 0 or draw(st.booleans()):
        return draw(st.one_of(leaf, leaf, leaf, again))
    names = ONE + TWO + (() if token else RESHAPED + ROWWISE)
    name = draw(st.sampled_from(names))
    inner = trees(token or name in RESHAPED, depth - 1)
    return (name, *(draw(inner) for _ in range(2 if name in TWO else 1)))


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """A model: members, how they are looped, and the batch."""
    layout = draw(st.sampled_from(["rows", "rows", "rows", "flat", "second"]))
    members = draw(st.lists(trees(layout != "rows"), min_size=1, max_size=3))
    loops = draw(st.integers(2, 4))
    member = st.integers(0, len(members) - 1)
    others = st.lists(member, max_size=2)
    schedule = tuple((0, *draw(others)) for _ in range(loops))
    earlier = st.frozensets(st.integers(0, loops - 2), max_size=2)
    rows, length = draw(st.integers(1, 4)), draw(st.integers(2, 6))
    return Plan(
        members=tuple(members),
        schedule=schedule,
        layout=layout,
        without=tuple(sorted(draw(earlier))),
        detached=tuple(sorted(draw(earlier))),
        injected=draw(st.booleans()),
        supervised=draw(st.booleans()),
        depths=tuple(draw(st.lists(st.integers(1, loops), min_size=rows, max_size=rows)))
        if draw(st.integers(0, 3)) == 3
        else (),
        rows=rows,
        length=length,
        double=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )


@dataclass
class Tally:
    """What the drawn models gave."""

    seen: set[Plan] = field(default_factory=set)
    refused: Counter[str] = field(default_factory=Counter)
    stopped: list[tuple[str, Plan]] = field(default_factory=list)
    error: float = 0.0
    sketch: float = 0.0

    def add(self, plan: Plan, outcome: Outcome) -> None:
        """Count one model."""
        self.seen.add(plan)
        if outcome.refused:
            self.refused[" ".join(outcome.refused.rpartition(": ")[2].split()[:12])] += 1
            if outcome.error is not None:  # the self-check alone refused, rightly or not
                fine = max(outcome.error, outcome.sketch or 0.0) <= outcome.bound
                self.stopped.append(("right" if fine else "wrong", plan))
        elif outcome.right:
            self.error = max(self.error, outcome.error or 0.0)
            self.sketch = max(self.sketch, outcome.sketch or 0.0)

    def __str__(self) -> str:
        lines = [
            f"{len(self.seen)} models drawn, {sum(self.refused.values())} refused, worst error of "
            f"a step {self.error:.1e}, of a sketch {self.sketch:.1e}"
        ]
        lines += [f"  {count} refused: {said} …" for said, count in self.refused.most_common(5)]
        for verdict in ("right", "wrong"):
            found = sorted((p for v, p in self.stopped if v == verdict), key=lambda p: len(str(p)))
            if found:
                lines.append(f"  {len(found)} {verdict}, stopped by the self-check: {found[0]}")
        return "\n".join(lines)


def check(plan: Plan, tally: Tally | None = None) -> None:
    """One model: right, or refused.

    Raises:
        AssertionError: a wrong number, or an error that is no refusal.
    """
    if not _runs(plan):
        hypothesis.reject()
    outcome = measure("drawn", partial(grown, plan), plan.seed)
    if not outcome.right and outcome.error is not None and not plan.double:
        # A sum that cancels has float32's rounding in it, whoever computes it.
        wide = measure("drawn", partial(grown, replace(plan, double=True)), plan.seed)
        if wide.right and not outcome.refused:
            outcome = replace(wide, error=0.0, sketch=0.0)
        elif wide.right:
            outcome = replace(outcome, error=None)
    if tally is not None:
        tally.add(plan, outcome)
    assert outcome.right or outcome.refused, (
        f"{outcome.verdict}: {outcome.error} {outcome.worst}, sketch {outcome.sketch} "
        f"{outcome.broken}\n{plan}"
    )


def _runs(plan: Plan) -> bool:
    """Whether the model itself runs, forward and backward, and its loss is finite."""
    case = grown(plan)
    try:
        losses = case.loss(case.model, case.batch)
        losses.sum().backward()
    except RuntimeError:
        return False
    return bool(torch.isfinite(losses).all())


def drawn(models: int, seed: int, tally: Tally) -> Callable[[], None]:
    """A hypothesis test of so many models."""

    @hypothesis.seed(seed)
    @settings(
        max_examples=models,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(plans())
    def run(plan: Plan) -> None:
        check(plan, tally)

    return run


def main(arguments: list[str] | None = None) -> int:
    """Draw models until there are as many as asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.zoo.random", description=__doc__)
    parser.add_argument("--models", type=int, default=2000, help="how many different ones to draw")
    parser.add_argument("--seed", type=int, default=0, help="of the first round")
    given_arguments = parser.parse_args(arguments)
    torch.set_num_threads(1)  # models as small as these lose time to threads
    tally, seed = Tally(), given_arguments.seed
    try:
        while len(tally.seen) < given_arguments.models:
            drawn(min(500, given_arguments.models), seed, tally)()
            seed += 1
            sys.stderr.write(f"{len(tally.seen)} models\n")
    except AssertionError as error:
        sys.stdout.write(f"{tally}\ndisagreement:\n{error}\n")
        return 1
    sys.stdout.write(f"{tally}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
