"""A sketch pass beside a training step, its floor, the published package and bergson.

    python -m tests.benchmarks [--case NAME ...] [--quick] [--data FILE] [--cache DIR] [--out DIR]

Prints one table and writes it as BENCHMARKS.json, .md and .svg into `--out`. A case that is
measured replaces its figures in the JSON; the others stay, so that one can be measured alone. The
other libraries are installed in environments of their own in the cache, as for
`tests.benchmarks.peers`. The GSM8K job (case gsm8k) needs `--data`, a JSONL file of the training
rows. All cases take about an hour on two cores, --quick a third of it; nothing else should run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks import job
from tests.benchmarks.cases import CASES, JOB, TINY
from tests.benchmarks.contest import Effort, looped, ordinary, say
from tests.benchmarks.hired import BERGSON, PUBLISHED, Shop
from tests.benchmarks.page import page, table
from tests.benchmarks.plot import chart

NAME = "BENCHMARKS"
HERE = Path(__file__).parent


def options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    every = [*(name for name in CASES if name != TINY.name), JOB]
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks", description=__doc__.strip().splitlines()[0]
    )
    parser.add_argument("--case", action="append", choices=[*every, TINY.name])
    parser.add_argument("--quick", action="store_true", help="3 rounds, 2 seeds, one batch size")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--keep-memory", action="store_true", help="see hired.Shop.keeps")
    parser.add_argument("--without", action="append", default=[], choices=[PUBLISHED, BERGSON])
    parser.add_argument("--data", type=Path, help="GSM8K's training rows, JSONL")
    parser.add_argument("--job-rows", type=int, nargs="+", help="numbers of rows for ours")
    parser.add_argument("--published-rows", type=int, nargs="+", help="the same for the other")
    parser.add_argument("--cache", type=Path, help="environments of the other libraries")
    parser.add_argument("--pip", action="append", default=[], help="an option for pip")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of what is written")
    parser.add_argument("--render", action="store_true", help="measure nothing, write the page")
    given = parser.parse_args(arguments)
    given.job_rows = given.job_rows or ([64, 192] if given.quick else [192, 7273])
    given.published_rows = given.published_rows or [64, 192]
    if given.rounds < 2:
        parser.error(f"--rounds is {given.rounds}; quartiles need at least 2")
    given.case = given.case or [name for name in every if name != JOB or given.data]
    if JOB in given.case and not given.data and not given.render:
        parser.error("the case gsm8k needs --data FILE, the JSONL file of GSM8K's training rows")
    return given


def measure(name: str, given: argparse.Namespace, shop: Shop) -> dict[str, Any]:
    """The figures of one case."""
    if name == JOB:
        sides = job.sides(given.job_rows, given.published_rows)
        taking_part = [side for side in sides if side.library not in given.without]
        turns = 1 if given.quick else 3
        return job.measure(given.data, taking_part, shop, search=not given.quick, turns=turns)
    case = CASES[name]
    rounds, seeds = (3, 2) if given.quick else (given.rounds, 8)
    effort = Effort(rounds, not given.quick, seeds, tuple(given.without))
    return (looped if case.looped else ordinary)(case, shop, effort)


def merged(found: dict[str, Any], name: str, figures: dict[str, Any]) -> dict[str, Any]:
    """What is known with the figures of one case replaced."""
    dated = {**figures, "measured": date.today().isoformat()}
    if name == JOB:
        return {**found, "job": dated}
    return {**found, "cases": {**found["cases"], name: dated}}


def machine(threads: int, *, keeps: bool) -> dict[str, Any]:
    """What the figures depend on."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "bf16": bool({"avx512_bf16", "amx_bf16"} & set(flags)),
        "torch": torch.__version__,
        "freed memory": "kept" if keeps else "given back",
    }


def known(kept: Path, now: dict[str, Any]) -> dict[str, Any]:
    """What was measured before, on this machine.

    Raises:
        SystemExit: if it was another; one table does not mix them.
    """
    if not kept.exists():
        return {"cases": {}, "machine": now}
    found: dict[str, Any] = json.loads(kept.read_text())
    if found["machine"] != now:
        sys.exit(
            f"{kept} was measured on {found['machine']}, this is {now}: name another folder with "
            f"--out, or delete the file"
        )
    return found


def write(found: dict[str, Any], folder: Path) -> None:
    """JSON, picture and page; the JSON is replaced whole."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{NAME}.json.partial"
    partial.write_text(json.dumps(found, indent=1) + "\n")
    partial.replace(folder / f"{NAME}.json")
    plot = folder / f"{NAME}.svg"
    if importlib.util.find_spec("vl_convert") and found["cases"]:
        chart(found).save(str(plot))
    else:
        say("no picture: it needs a measured case and vl-convert-python (the extra 'notebooks')")
    (folder / f"{NAME}.md").write_text(page(found, plot.name if plot.exists() else None))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the cases one by one, keeping each as soon as it is there; print the table."""
    given = options(arguments)
    found = known(given.out / f"{NAME}.json", machine(given.threads, keeps=given.keep_memory))
    with ExitStack() as stack:
        cache = given.cache or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        shop = Shop(cache, tuple(given.pip), given.threads, given.keep_memory)
        for name in [] if given.render else given.case:
            found = merged(found, name, measure(name, given, shop))
            write(found, given.out)
    if given.render:
        write(found, given.out)
    sys.stdout.write(table(found))


if __name__ == "__main__":
    main()
