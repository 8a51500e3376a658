"""How cost grows: one quantity at a time, with the exponent of each and what was expected.

    python -m tests.benchmarks.growth [--axis NAME ...] [--seconds S] [--into DIR]

Each axis varies one quantity of a small job and leaves the others as they are. All of its sizes are
timed in turn, round by round, so that a slow moment of the machine falls on every size. The
exponent is the slope of log cost against log size over the larger half of the sizes, where fixed
costs count least; its error is the spread of the slope when the rounds are drawn again
(bootstrap). `growth.json` and the chart `growth.html` are written into DIR, the working directory
by default. It takes about three minutes on two cores.

Nothing should grow faster than it must: linear in rows, steps, layers, parameters and queries, and
in tokens up to the square in attention. The expected exponents were written down before the first
run; small jobs may grow slower, since every call costs something whatever its size.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import altair as alt
import numpy as np
import torch

import sdi
from curate.manifest import ShardEntry
from curate.rundir import RunDirectory
from curate.scores import score_run
from curate.sketching import LoopOptions, SketchOptions, sketch_run
from recipes import looped_gpt
from tests.loopedrun import add_texts, checkpoints, factory, write_texts
from tests.sketchedrun import make

Work = Callable[[], Any]
LEAST_ROUNDS, MOST_ROUNDS = 3, 15
DRAWS = 400


class Shape(NamedTuple):
    """A batch and a looped GPT: B rows, T tokens, τ steps, M, width, blocks of the body."""

    rows: int = 8
    tokens: int = 64
    steps: int = 4
    dim: int = 1024
    width: int = 64
    blocks: int = 1

    def model(self) -> looped_gpt.LoopedGPT:
        """The model, as the recipes have it."""
        return looped_gpt.build(
            context=self.tokens, width=self.width, blocks=self.blocks, depth=self.steps
        )

    def parameters(self) -> int:
        """Of the body."""
        return sum(parameter.numel() for parameter in self.model().body.parameters())


@dataclass(frozen=True)
class Axis:
    """A quantity that is varied.

    Attributes:
        name: "job: quantity".
        values: at least four, ascending.
        expected: the exponents between which it should lie.
        prepare: (value, folder) → (size, work): what cost is held against, and what is timed.
    """

    name: str
    values: tuple[int, ...]
    expected: tuple[float, float]
    prepare: Callable[[int, Path], tuple[float, Work]]


def one_pass(quantity: str) -> Callable[[int, Path], tuple[float, Work]]:
    """A sketch pass over one batch, with one entry of `Shape` varied."""

    def prepare(value: int, folder: Path) -> tuple[float, Work]:
        shape = Shape()._replace(**{quantity: value})
        ids = torch.randint(0, 256, (shape.rows, shape.tokens))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        sketcher = sdi.Sketcher(sdi.Loop(shape.model(), "body"), dim=shape.dim)
        names = [str(row) for row in range(shape.rows)]
        size = shape.parameters() if quantity in ("width", "blocks") else value
        return size, lambda: sketcher(batch, names)

    return prepare


def whole_sketch(rows: int, folder: Path) -> tuple[float, Work]:
    """A run of so many short rows, made afresh each time."""
    write_texts(folder / "train.jsonl", rows)
    listed = checkpoints(folder / "weights")
    options = SketchOptions(dim=64, budget_tokens=2048, shard_rows=64, check_rows=0, device="cpu")

    def work() -> None:
        with tempfile.TemporaryDirectory(dir=folder) as name:
            run = RunDirectory.create(Path(name) / "run")
            add_texts(run, "train", folder / "train.jsonl")
            sketch_run(run, factory, LoopOptions(body=("body",)), listed, options=options)

    return rows, work


def listing(shards: int, folder: Path) -> tuple[float, Work]:
    """So many shards listed one by one, as a run of that many times 2,048 rows does it."""
    listed = [
        ShardEntry(
            set="train",
            checkpoint="one",
            kind="totals",
            number=number,
            rows=(number, number + 1),
            steps=4,
            files={f"totals-{number:05d}.{part}.npy": "0" * 64 for part in "vsn"},
        )
        for number in range(shards)
    ]

    def work() -> None:
        with tempfile.TemporaryDirectory(dir=folder) as name:
            run = RunDirectory.create(Path(name) / "run")
            with run.writing():
                for entry in listed:
                    run.add_shard(entry)

    return shards, work


def scoring(quantity: str) -> Callable[[int, Path], tuple[float, Work]]:
    """Scores of generated sketches, with the best ten rows of each query."""
    base = {"rows": 4096, "queries": 16, "steps": 4, "dim": 256}

    def prepare(value: int, folder: Path) -> tuple[float, Work]:
        sizes: dict[str, Any] = {**base, quantity: value}
        made = make(folder / "run", **sizes, shard_rows=1024)
        names = iter(range(10**6))
        return value, lambda: score_run(made.run, "test", top_k=10, name=f"scores-{next(names)}")

    return prepare


AXES = (
    Axis("sketch: rows of a batch", (4, 16, 64, 128, 256), (0.9, 1.05), one_pass("rows")),
    Axis("sketch: tokens of a row", (16, 32, 64, 128, 256, 512), (0.8, 1.2), one_pass("tokens")),
    Axis("sketch: steps", (2, 4, 8, 16, 32), (0.9, 1.05), one_pass("steps")),
    Axis("sketch: m", (512, 1024, 2048, 4096, 8192, 16384), (0.0, 1.05), one_pass("dim")),
    Axis("sketch: parameters, wider", (64, 128, 256, 512, 768), (0.7, 1.05), one_pass("width")),
    Axis("sketch: parameters, more layers", (1, 2, 4, 8, 16), (0.9, 1.05), one_pass("blocks")),
    Axis("sketch: rows of a run", (256, 512, 1024, 2048, 4096), (0.8, 1.05), whole_sketch),
    Axis("run: shards listed", (100, 200, 400, 800, 1600), (0.9, 1.1), listing),
    Axis("score: rows", (2048, 4096, 8192, 16384, 32768), (0.7, 1.05), scoring("rows")),
    Axis("score: queries", (8, 16, 32, 64, 128), (0.5, 1.05), scoring("queries")),
    Axis("score: steps", (2, 4, 8, 16, 32), (0.5, 1.05), scoring("steps")),
    Axis("score: m", (128, 256, 512, 1024, 2048), (0.3, 1.05), scoring("dim")),
)


class Fit(NamedTuple):
    """An exponent and its standard error."""

    exponent: float
    error: float


def timed(works: Sequence[Work], seconds: float) -> list[list[float]]:
    """Seconds of each piece of work, round by round; as many rounds as fit into `seconds`."""
    for work in works:
        work()  # makes what is kept, and fills the caches
    times: list[list[float]] = [[] for _ in works]
    begin = time.perf_counter()
    for done in range(1, MOST_ROUNDS + 1):
        for own, work in zip(times, works, strict=True):
            start = time.perf_counter()
            work()
            own.append(time.perf_counter() - start)
        spent = time.perf_counter() - begin
        if done >= LEAST_ROUNDS and spent * (done + 1) / done > seconds:
            break
    return times


def fit(sizes: Sequence[float], times: Sequence[Sequence[float]]) -> Fit:
    """The slope of log median time on log size over the larger half, three sizes at least.

    Args:
        sizes: S of them, ascending.
        times: S lists of R seconds, in the order of the rounds.
    """
    half = slice(min(len(sizes) // 2, len(sizes) - 3), None)
    x = np.log(np.asarray(sizes, np.float64)[half])
    seconds = np.asarray(times, np.float64)[half]
    random = np.random.default_rng(0)
    rounds = seconds.shape[1]
    drawn = [_slope(x, seconds[:, random.integers(0, rounds, rounds)]) for _ in range(DRAWS)]
    return Fit(_slope(x, seconds), float(np.std(drawn)))


def _slope(x: np.ndarray, seconds: np.ndarray) -> float:
    return float(np.polyfit(x, np.log(np.median(seconds, axis=1)), 1)[0])


def verdict(found: Fit, expected: tuple[float, float]) -> str:
    """Whether an exponent lies where it should, give or take two standard errors."""
    low, high = expected
    if found.exponent - 2 * found.error > high:
        return "GROWS FASTER"
    return "grows slower" if found.exponent + 2 * found.error < low else "as expected"


def measured(axis: Axis, seconds: float) -> dict[str, Any]:
    """Everything that is known of one axis after `seconds` or little more."""
    with tempfile.TemporaryDirectory() as name, redirect_stderr(StringIO()):
        prepared = []
        for value in axis.values:
            folder = Path(name) / str(value)
            folder.mkdir()
            prepared.append(axis.prepare(value, folder))
        times = timed([work for _, work in prepared], seconds)
    sizes = [size for size, _ in prepared]
    found = fit(sizes, times)
    return {
        "axis": axis.name,
        "values": list(axis.values),
        "sizes": sizes,
        "seconds": times,
        "exponent": found.exponent,
        "error": found.error,
        "expected": list(axis.expected),
        "verdict": verdict(found, axis.expected),
    }


def line(result: dict[str, Any]) -> str:
    """A row of the table."""
    sizes, times = result["sizes"], [float(np.median(own)) for own in result["seconds"]]
    low, high = result["expected"]
    return (
        f"{result['axis']:<32}{sizes[0]:>8,.0f} – {sizes[-1]:<10,.0f}"
        f"{times[0] * 1e3:>8.1f} – {times[-1] * 1e3:<8.1f}"
        f"{result['exponent']:>6.2f} ± {result['error']:<5.2f}{low:>4.1f} – {high:<5.2f}"
        f" {result['verdict']}"
    )


def chart(results: Sequence[dict[str, Any]]) -> Any:
    """Cost against size, a log-log panel for each axis, with the fitted slope in its title."""
    panels = []
    for result in results:
        points = [
            {"size": size, "seconds": float(np.median(own)), "low": min(own), "high": max(own)}
            for size, own in zip(result["sizes"], result["seconds"], strict=True)
        ]
        base = alt.Chart(alt.Data(values=points)).encode(  # type: ignore[no-untyped-call]
            x=alt.X("size:Q", scale=alt.Scale(type="log", nice=False), title=None)
        )
        log = alt.Scale(type="log", nice=False)
        drawn = base.mark_line(point=True).encode(
            y=alt.Y("seconds:Q", scale=log, title="seconds"), tooltip=["size:Q", "seconds:Q"]
        )
        spread = base.mark_rule(opacity=0.5).encode(y=alt.Y("low:Q", scale=log), y2="high:Q")
        said = f"{result['exponent']:.2f} ± {result['error']:.2f}"
        title = alt.TitleParams(result["axis"], subtitle=f"exponent {said}")
        panels.append(alt.layer(spread, drawn).properties(width=190, height=150, title=title))
    return alt.concat(*panels, columns=4)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the axes, print the table, write the JSON file and the chart."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.growth", description=__doc__)
    names = [axis.name for axis in AXES]
    parser.add_argument("--axis", action="append", choices=names, help="all by default")
    parser.add_argument("--seconds", type=float, default=120.0, help="for the timing of all axes")
    parser.add_argument("--into", type=Path, default=Path())
    given = parser.parse_args(arguments)
    axes = [axis for axis in AXES if not given.axis or axis.name in given.axis]
    head = f"{'quantity':<32}{'from – to':>17}{'ms':>16}{'exponent':>19}{'expected':>12}\n"
    sys.stdout.write(head)
    results = []
    for axis in axes:
        results.append(measured(axis, given.seconds / len(axes)))
        sys.stdout.write(line(results[-1]) + "\n")
        sys.stdout.flush()
    given.into.mkdir(parents=True, exist_ok=True)
    record = {"threads": torch.get_num_threads(), "torch": torch.__version__, "axes": results}
    (given.into / "growth.json").write_text(json.dumps(record, indent=1) + "\n")
    chart(results).save(given.into / "growth.html")


if __name__ == "__main__":
    main()
