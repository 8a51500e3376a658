"""Scores, search and commands on a million rows.

    python -m tests.benchmarks.scale [--into DIR] [--rows N] [--only PART ...] [--json FILE]

Generates a run of N int8 sketches (m = 4096, and m = 1024 for the search; see `scaledata`), kept in
DIR for the next time or else removed, and measures, each in a process of its own:

- scores: the survey of 64 queries × 8 steps, when the process first meets the rows' pages and
  again, and the whole of `score_run` (the mean over the queries, the best 100 rows of each, the
  tables); the survey's multiply-adds a second beside those of the bare product on its shapes and
  threads, before and after, in int8, bf16 or float32, whichever is the fastest here: with rows that
  come from memory, as a million do, and with one block that stays in the cache; the peak of
  anonymous memory; how long the survey's kernels take to load, once a process; and what writing the
  queries in digits rounds off, beside the sketch's own error and beside that of bf16.
- groups: `score_run` for eight groups of queries and their maximum.
- search: the exact best 100 of each query on one core, one by one and all at once, with the share
  of the vectors that was scanned, for whole queries and for single steps.
- commands: `curate --help`, `rank` and `sql`, start-up included.

Linux only (memory is read from /proc). Run it on a machine with nothing else to do.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.benchmarks.memory import Watch, anonymous

if TYPE_CHECKING:
    from curate.rundir import RunDirectory

PARTS = ("scores", "groups", "search", "commands")
WIDE, NARROW = 4096, 1024
TOP = 100
STREAMED = 1 << 29
"""Bytes of rows that a thread multiplies in turn, more than caches hold."""
Line = dict[str, Any]


def product_rates(rows: int, dim: int, columns: int) -> dict[str, float]:
    """Multiply-adds a second of (rows, dim) times (dim, columns), a product on every core.

    The second factor lies column by column in memory, which is the quicker way here and there. The
    first is the same each time ("in cache", by type), or the next rows of more than caches hold, as
    a million rows are ("streamed", int8).
    """
    import torch

    threads = torch.get_num_threads()
    many = 1 + STREAMED // (rows * dim)

    def timed(kind: str) -> float:
        of = torch.int8 if kind == "streamed" else getattr(torch, kind)
        blocks = many if kind == "streamed" else 1
        left = torch.ones(blocks, rows, dim, dtype=of)
        right = torch.ones(columns, dim, dtype=of).T
        made = torch.int32 if of == torch.int8 else of
        out = torch.empty(rows, columns, dtype=made)
        multiply = torch._int_mm if of == torch.int8 else torch.mm
        multiply(left[0], right, out=out)
        begin, count = time.perf_counter(), 0
        while time.perf_counter() - begin < 1.5:
            multiply(left[count % blocks], right, out=out)
            count += 1
        return count * rows * dim * columns / (time.perf_counter() - begin)

    with ThreadPoolExecutor(threads, "product", torch.set_num_threads, (1,)) as pool:
        kinds = ("streamed", "int8", "bfloat16", "float32")
        rates = {kind: sum(pool.map(timed, [kind] * threads)) for kind in kinds}
    torch.set_num_threads(threads)
    return rates


def forget(run: RunDirectory, name: str) -> None:
    """Remove a table that an earlier call left, so that it is made again."""
    with run.writing():
        kept = {key: entry for key, entry in run.manifest.influence.items() if key != name}
        run.note(influence=kept)
        for kind in ((), ("tops",)):
            shutil.rmtree(run.influence_directory(name, *kind), ignore_errors=True)


def scores(folder: Path) -> Iterator[Line]:
    """The survey, and the whole of `score_run`, beside the bare product."""
    from curate.queryvectors import Groups
    from curate.rundir import RunDirectory
    from curate.scores import Scoring, score_run
    from curate.scoresettings import ScoreSettings, chosen_weights
    from curate.survey import survey
    from curate.surveyplan import Ranking, planned
    from sdi import amx, team

    run = RunDirectory.open(folder)
    forget(run, "measured")
    settings = ScoreSettings(weights=chosen_weights(run.manifest, {}))
    scoring = Scoring(run, "query", "survey", settings, {}, "cpu")
    queries, product = scoring.side.rows, scoring.product
    vectors = scoring.vectors(Groups.single(0, queries))
    given = (product, vectors, scoring.side.masks, Ranking("total"))
    begin = time.perf_counter()
    amx.kernels("bytetiles")
    team.kernels("scores")
    loading = time.perf_counter() - begin
    _, bound = planned(*given)
    before = product_rates(product.block(bound), product.dim, bound.width)
    taken = {}
    for name in ("survey", "survey again"):
        begin = time.perf_counter()
        survey(*given, TOP)
        taken[name] = time.perf_counter() - begin
    watch = Watch()  # of the whole, in which there is a survey; it takes its share of two cores
    watch.start()
    begin = time.perf_counter()
    score_run(run, "query", name="measured", top_k=TOP, overwrite=True)
    taken["score_run"] = time.perf_counter() - begin
    watch.done = True
    watch.join()
    after = product_rates(product.block(bound), product.dim, bound.width)
    rates = {kind: (before[kind] + after[kind]) / 2 for kind in before}
    streamed = rates.pop("streamed")
    if max(rates.values()) > rates["int8"]:  # the survey multiplies in another type
        streamed = max(rates.values())
    work = product.rows * product.dim * bound.width
    for name, seconds in taken.items():
        yield {
            "part": f"scores: {name}",
            "seconds": seconds,
            "rows per second": product.rows / seconds,
            "columns": bound.width,
            "GMAC per second": work / seconds / 1e9,
            "share of the product": work / seconds / streamed,
            "share of it in cache": work / seconds / max(rates.values()),
            "anonymous MiB": max(watch.peak, anonymous()) / 1024,
        }
    rates = {"streamed": streamed, **rates}
    yield {"part": "product", **{f"{kind} GMAC/s": rate / 1e9 for kind, rate in rates.items()}}
    yield {"part": "loading kernels", "seconds": loading}
    yield {"part": "rounding", **_rounding(scoring)}


def _rounding(scoring: Any) -> Line:
    """Relative errors of the mean's vectors: in three digits, in float32, in bf16; and 1/√m."""
    import torch

    from curate.multiply import BASE, digits_of
    from curate.queryvectors import part_of

    values = scoring.side.vectors(part_of(scoring.groups, 0, 1))[0][0, 0]
    digits, scale = digits_of(values)
    parts = digits.reshape(-1, *values.shape).astype(np.float64)
    weights = BASE ** -np.arange(len(parts), dtype=np.float64)
    held = {
        "digits": np.tensordot(weights, parts, 1) * scale[:, None],
        "one digit": parts[0] * scale[:, None],
        "bf16": torch.from_numpy(values).bfloat16().double().numpy(),
    }
    size = np.linalg.norm(values, axis=1)
    errors = {
        name: float((np.linalg.norm(own - values, axis=1) / size).max())
        for name, own in held.items()
    }
    return {**errors, "sketch": scoring.product.dim**-0.5}


def groups(folder: Path) -> Iterator[Line]:
    """Eight groups of queries, and their maximum."""
    from curate.rundir import RunDirectory
    from curate.scores import score_run

    run = RunDirectory.open(folder)
    for table in [name for name in run.manifest.influence if name.startswith("grouped")]:
        forget(run, table)
    watch, begin = Watch(), time.perf_counter()
    watch.start()
    names = score_run(run, "query", name="grouped", group_by="topic", top_k=0, overwrite=True)
    seconds = time.perf_counter() - begin
    watch.done = True
    watch.join()
    rows = run.manifest.sets["train"].rows
    yield {
        "part": f"scores: {len(names)} tables",
        "seconds": seconds,
        "rows per second": rows / seconds,
        "anonymous MiB": watch.peak / 1024,
    }


def search(folder: Path) -> Iterator[Line]:
    """Milliseconds a query on one core, and the share that was scanned."""
    import torch

    from curate.bands import load_faiss
    from curate.index import Searcher, build_index
    from curate.pooledvectors import PooledVectors
    from curate.rundir import RunDirectory

    run = RunDirectory.open(folder)
    begin = time.perf_counter()
    build_index(run, kinds=["totals"])
    built = time.perf_counter() - begin
    load_faiss().omp_set_num_threads(1)
    torch.set_num_threads(1)
    begin = time.perf_counter()
    searcher = Searcher(run, "train", "totals", many=True)
    opened = time.perf_counter() - begin
    steps = PooledVectors(run, "query", "steps").rows_of(0, run.manifest.sets["query"].rows)
    last = steps.shape[1]
    yield {"part": f"index m={steps.shape[2]}", "build s": built, "open s": opened}
    cases = {"whole": steps.sum(axis=1)}
    cases |= {f"step {step}": steps[:, step - 1] for step in (1, last // 2, last)}
    for name, queries in cases.items():
        searcher.search(queries, TOP)
        searcher.search(queries[:1], TOP)  # loads the kernel
        singles, found = [], []
        for query in queries:
            begin = time.perf_counter()
            found += searcher.search(query[None], TOP)
            singles.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        together = searcher.search(queries, TOP)
        seconds = time.perf_counter() - begin
        pairs = zip(found, together, strict=True)
        if not all(np.array_equal(one.numbers, other.numbers) for one, other in pairs):
            raise SystemExit("one by one and all at once found different rows: a bug")
        yield {
            "part": f"search m={queries.shape[1]}, {name}",
            "ms": statistics.median(singles) * 1e3,
            "ms at most": max(singles) * 1e3,
            "ms in a batch": seconds / len(queries) * 1e3,
            "scanned": float(np.mean([one.scanned for one in found])),
        }


def commands(folder: Path) -> Iterator[Line]:
    """Wall seconds of commands, the median of five."""
    curate = [sys.executable, "-m", "curate.cli"]
    run = str(folder)
    cases = {
        "--help": ["--help"],
        "rank": ["rank", run, "measured"],
        "rank by formula": ["rank", run, "measured", "--by", "late - early", "--where", "total>0"],
        "sql": ["sql", run, _AGGREGATE],
        "sql, joined": [
            "sql",
            run,
            'SELECT "row", total, text FROM influence JOIN examples USING ("row") '
            "WHERE query = 'measured' AND \"set\" = 'train' ORDER BY total DESC LIMIT 20",
        ],
    }
    for name, arguments in cases.items():
        seconds = []
        for _ in range(5):
            begin = time.perf_counter()
            subprocess.run([*curate, *arguments], check=True, stdout=subprocess.DEVNULL)
            seconds.append(time.perf_counter() - begin)
        yield {"part": f"curate {name}", "seconds": statistics.median(seconds)}


_AGGREGATE = "SELECT count(*), avg(total), max(late) FROM influence WHERE query = 'measured'"

CHILDREN: dict[str, Callable[[Path], Iterator[Line]]] = {
    "scores": scores,
    "groups": groups,
    "search": search,
    "commands": commands,
}


def prepare(folder: Path, rows: int, dim: int) -> Path:
    """The generated run, made where it is not there; enough room is asked for first."""
    from tests.benchmarks.scaledata import VERSION, make

    path = folder / f"rows{rows}-m{dim}-v{VERSION}"
    if not path.exists():
        needed = 5 * rows * dim // 2 + 2000 * rows  # sketches, codes, bit planes; tables
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise SystemExit(
                f"{folder} has {free >> 30} GiB free, {needed / 2**30:.0f} GiB are needed; give "
                "another directory with --into, or fewer --rows"
            )
        make(path, rows, dim)
    return path


def measure(part: str, folder: Path) -> list[Line]:
    """One part in a process of its own; its lines."""
    command = [sys.executable, "-m", "tests.benchmarks.scale", "--child", part, str(folder)]
    one_core = {"OMP_NUM_THREADS": "1"} if part == "search" else {}
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | one_core
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def written(line: Line) -> str:
    """A line of the table."""
    cells = [f"{name} {_number(name, value)}" for name, value in line.items() if name != "part"]
    return f"{line['part']:<26}" + "  ".join(cells)


def _number(name: str, value: float) -> str:
    return f"{value:.2%}" if name.startswith(("share", "scanned")) else f"{value:,.4g}"


def main() -> None:
    """Generate, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.scale", description=__doc__)
    parser.add_argument("--into", type=Path, help="keep the generated runs here")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--only", action="append", choices=PARTS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        for line in CHILDREN[given.child[0]](Path(given.child[1])):
            sys.stdout.write(json.dumps(line) + "\n")
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.into or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        lines: list[Line] = []
        for part in given.only or PARTS:
            for dim in (WIDE, NARROW) if part == "search" else (WIDE,):
                for line in measure(part, prepare(folder, given.rows, dim)):
                    lines.append(line)
                    sys.stdout.write(written(line) + "\n")
                    sys.stdout.flush()
    if given.json:
        given.json.write_text(json.dumps({"cpus": os.cpu_count(), "lines": lines}, indent=1))


if __name__ == "__main__":
    main()
