"""Multi-step arithmetic, modulo ten, in sources of known quality: the default recipe's data.

A problem is a digit followed by steps of one to three up or down, each modulo ten; the response
repeats every step and writes the value after it, and the last value is the answer:

    prompt ``8+3-2=``   response ``+31-29``   (8 + 3 is 1, 1 - 2 is 9)

Sources of the training pool:

- **easy**: one to three steps, right;
- **hard**: four or five steps, right;
- **wrong**: lengths of easy and hard alike, but every value in the response is replaced by
  another digit at random (the steps are repeated as they are);
- **boilerplate**: polite phrases with no arithmetic in them.

Only digits, operators and the answer column tell wrong from right; no source is named in a
text. Queries (for curation) and the eval set (for the comparison) are clean, half easy and half
hard; no prompt is in two of the three sets, nor twice in one. That caps the easy problems at
the few there are (10·6 with one step, 10·6² with two, 10·6³ with three), which `generate` checks.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from curate.callables import StepContext

MODULUS = 10
OPERANDS = "123"
STEPS = {"easy": (1, 3), "hard": (4, 5)}

_OPENINGS = ("Dear {}:", "Hi {}:", "To {}:", "Re {}:", "For {}:")
_NAMES = ("Ada", "Ben", "Cho", "Dev", "Eva", "Fay", "Gus", "Ivo", "Jun", "Kim", "Lea")
_CLOSINGS = ("thanks", "see you {}", "well noted", "all the best", "attached", "back on {}")
_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri")


@dataclass(frozen=True)
class Problem:
    """One row: prompt and response text, its source, the number of steps and the answer."""

    prompt: str
    response: str
    source: str
    steps: int
    answer: str


def solve(prompt: str) -> list[int]:
    """Values after each step of ``8+3-2=``, modulo ten."""
    chain = prompt.rstrip("=")
    value, values = int(chain[0]), []
    for sign, digit in zip(chain[1::2], chain[2::2], strict=True):
        value = (value + int(digit) if sign == "+" else value - int(digit)) % MODULUS
        values.append(value)
    return values


def written(prompt: str, values: list[int]) -> str:
    """The response: every step of ``prompt`` with its value behind it."""
    steps = prompt[1:].rstrip("=")
    return "".join(steps[2 * n : 2 * n + 2] + str(value) for n, value in enumerate(values))


def draw_prompt(rng: random.Random, steps: int) -> str:
    """A random chain of ``steps`` operations, each with a digit from 1 to 3."""
    chain = str(rng.randrange(MODULUS))
    for _ in range(steps):
        chain += rng.choice("+-") + rng.choice(OPERANDS)
    return chain + "="


def problem(rng: random.Random, source: str, kind: str) -> Problem:
    """A problem of ``kind`` easy or hard; working and answer are wrong where ``source`` is."""
    steps = rng.randint(*STEPS[kind])
    prompt = draw_prompt(rng, steps)
    values = solve(prompt)
    if source == "wrong":
        values = [(value + rng.randrange(1, MODULUS)) % MODULUS for value in values]
    return Problem(prompt, written(prompt, values), source, steps, str(values[-1]))


def boilerplate(rng: random.Random) -> Problem:
    """A polite phrase; steps 0 and no answer."""
    prompt = rng.choice(_OPENINGS).format(rng.choice(_NAMES))
    response = rng.choice(_CLOSINGS).format(rng.choice(_DAYS))
    return Problem(prompt, response, "boilerplate", 0, "")


def _mixed(rng: random.Random, source: str) -> Problem:
    return problem(rng, source, rng.choice(("easy", "hard")))


def _maker(source: str) -> Callable[[random.Random], Problem]:
    if source == "boilerplate":
        return boilerplate
    if source == "wrong":
        return lambda rng: _mixed(rng, "wrong")
    if source in STEPS:
        return lambda rng: problem(rng, source, source)
    raise ValueError(f"no source {source!r}; expected easy, hard, wrong or boilerplate")


def problems(rng: random.Random, counts: Mapping[str, int], taken: set[str]) -> Iterator[Problem]:
    """Shuffled problems, ``counts`` by source; no arithmetic prompt in ``taken``, none twice.

    ``taken`` grows by every arithmetic prompt that is given out. Raises ValueError where a
    source has no unused prompt left.
    """
    order = [source for source, count in counts.items() for _ in range(count)]
    rng.shuffle(order)
    for source in order:
        yield _unused(rng, source, taken)


def _unused(rng: random.Random, source: str, taken: set[str], tries: int = 2000) -> Problem:
    make = _maker(source)
    for _ in range(tries):
        made = make(rng)
        if source == "boilerplate":
            return made  # boilerplate repeats itself; that is what makes it boilerplate
        if made.prompt not in taken:
            taken.add(made.prompt)
            return made
    raise ValueError(
        f"no unused {source} problem in {tries} draws; ask for fewer (there are about "
        f"{MODULUS * (2 * len(OPERANDS)) ** STEPS['easy'][1]} easy ones) "
        "across train, query and eval"
    )


def make_sets(
    *, train: Mapping[str, int], query: Mapping[str, int], evaluation: Mapping[str, int], seed: int
) -> dict[str, list[Problem]]:
    """The three sets, drawn from ``seed``; no arithmetic prompt stands in two of them."""
    rng = random.Random(seed)
    taken: set[str] = set()
    # Clean sets first, so that a larger pool leaves queries and evaluation as they were.
    counts = {"query": query, "eval": evaluation, "train": train}
    return {name: list(problems(rng, wanted, taken)) for name, wanted in counts.items()}


def write_rows(rows: list[Problem], path: Path, *, prefix: str) -> None:
    """JSON lines with ids ``prefix-00000``…, written under a temporary name and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        for number, row in enumerate(rows):
            file.write(json.dumps({"id": f"{prefix}-{number:05d}", **asdict(row)}) + "\n")
    partial.replace(path)


def generate(
    context: StepContext,
    *,
    train: Mapping[str, int],
    query: Mapping[str, int],
    evaluation: Mapping[str, int],
    seed: int = 0,
) -> None:
    """The recipe's ``generate`` step: ``data/{train,query,eval}.jsonl`` in the run directory."""
    sets = make_sets(train=train, query=query, evaluation=evaluation, seed=seed)
    for name, rows in sets.items():
        write_rows(rows, context.run / "data" / f"{name}.jsonl", prefix=name)
        context.log(f"generated {len(rows)} {name} rows")
