"""The whole GSM8K job, ours and the published package's: seconds and anonymous memory.

Both load the rows, attribute them at three checkpoints and end with the mean influence of each row
on the queries, in a process of its own that is timed from its start. On a number of rows that both
are given they take turns, several times where these are few. Each runs on more than one number of
rows; the full job's figures come from a straight line through these (in rows and queries together)
and are called extrapolated wherever they stand. The checkpoints have random weights: cost does not
depend on them.
"""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from tests.benchmarks.contest import say
from tests.benchmarks.hired import PUBLISHED, Shop, Worker
from tests.benchmarks.peers.roster import ROOT

RECIPE = ROOT / "recipes" / "gsm8k.yaml"
CHECKPOINTS = 3
QUERIES = 20
LONG = 1000
"""From so many rows on a job runs once, for its length."""
TELLING = 1024
"""Without a run on more rows no line is drawn for memory: ours holds so many before it writes, and
the published package's grows faster than what it keeps while longer rows come in."""


@dataclass(frozen=True)
class Side:
    """One way to do the job: its worker, its library, batch sizes to try, numbers of rows.

    `tried`: rows on which the batch sizes are tried, at one checkpoint. `good`: the smallest size
    is taken whose rows a second are this share of the most.
    """

    name: str
    script: str
    library: str | None
    sizes: tuple[int, ...]
    rows: tuple[int, ...]
    tried: int
    good: float = 1.0


def sides(ours: Sequence[int], published: Sequence[int]) -> tuple[Side, Side]:
    """Ours in padded tokens a batch, the published package in rows a batch.

    Ours gives up to a fifth of its rows a second for memory; the other's memory is what it keeps of
    each row, so it is given its fastest.
    """
    return (
        Side("ours", "job_ours.py", None, (2048, 3072, 4096, 8192), tuple(ours), 256, 0.8),
        Side("published", "job_published.py", PUBLISHED, (1, 2, 4, 8, 16), tuple(published), 32),
    )


def measure(
    data: Path, chosen: Sequence[Side], shop: Shop, *, search: bool, turns: int
) -> dict[str, Any]:
    """Every side at every number of rows, lines through them, and how far the tables agree."""
    total = sum(1 for line in data.read_text().splitlines() if line.strip())
    with tempfile.TemporaryDirectory() as name:
        job = described(data, Path(name))
        found = {side.name: _prepared(side, job, shop, search=search) for side in chosen}
        for side, rows in order(chosen, turns):
            run = _run(side, job, shop, rows, found[side.name]["size"])
            found[side.name]["runs"].append(run)
    whole = {"rows": total - 200, "queries": 200}
    for side in chosen:
        lines, units = found[side.name], sum(whole.values())
        lines["seconds"] = extrapolated(lines["runs"], "seconds", units)
        telling = lines["runs"] if max(side.rows) > TELLING else []
        lines["peak_anonymous"] = extrapolated(telling, "peak_anonymous", units)
    return {"job": found, "whole": whole, "agreement": agreement(found)}


def order(chosen: Sequence[Side], turns: int) -> list[tuple[Side, int]]:
    """Who runs on how many rows, one after another; in turn where all are given that number."""
    common = set(chosen[0].rows).intersection(*(side.rows for side in chosen))
    alternating = [
        (side, rows)
        for rows in sorted(common)
        for _ in range(turns if rows < LONG else 1)
        for side in chosen
    ]
    alone = [(side, rows) for side in chosen for rows in sorted(set(side.rows) - common)]
    return alternating + alone


def described(data: Path, folder: Path) -> dict[str, Any]:
    """What the workers are told; the checkpoints are written into the folder, for both."""
    recipe = yaml.safe_load(RECIPE.read_text())
    model = RECIPE.parent / recipe["model"]["source"].split(":")[0]
    arguments = recipe["model"]["args"]
    paths = [folder / f"checkpoint-{number}" for number in range(CHECKPOINTS)]
    for number, path in enumerate(paths):
        _write(model, arguments | {"seed": number}, path)
    return {
        "model": str(model),
        "arguments": arguments,
        "checkpoints": [str(path) for path in paths],
        "data": str(data.resolve()),
        "dim": recipe["sketch"]["dim"],
        "tokens": recipe["data"]["defaults"]["max_tokens"],
        "queries": QUERIES,
    }


def _write(file: Path, arguments: dict[str, Any], path: Path) -> None:
    """A checkpoint as safetensors and as a pickle."""
    from safetensors.torch import save_file

    spec = importlib.util.spec_from_file_location("looped_gpt", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    state = module.build(**arguments).state_dict()
    save_file(state, path.with_name(f"{path.name}.safetensors"))
    torch.save({"model_state_dict": state}, path.with_name(f"{path.name}.pt"))


def _prepared(side: Side, job: dict[str, Any], shop: Shop, *, search: bool) -> dict[str, Any]:
    """The side's best batch size, and no runs yet."""
    if side.library:
        shop.with_package(side.library, "safetensors")  # the recipe's model file imports it
    size, tried = _best_size(side, job, shop) if search else (side.sizes[0], {})
    return {"size": size, "tried": tried, "runs": []}


def _best_size(side: Side, job: dict[str, Any], shop: Shop) -> tuple[int, dict[int, float]]:
    """The batch size that is taken, and the seconds of each on a few rows: of two tries the better,
    after one that warms up.
    """
    tried = {}
    with Worker(shop, side.script, side.library) as worker:
        worker.ask("make", job=job)
        for size in side.sizes:
            say(f"gsm8k: {side.name}, batches of {size}")
            asked = {"rows": side.tried, "size": size, "checkpoints": 1}
            replies = [worker.ask("work", **asked) for _ in range(3)]
            tried[size] = min(reply["seconds"] for reply in replies[1:])
    return smallest(tried, side.good), tried


def smallest(tried: dict[int, float], good: float) -> int:
    """The smallest size that is this share as fast as the fastest, of the seconds of each."""
    return min(size for size, seconds in tried.items() if good * seconds <= min(tried.values()))


def _run(side: Side, job: dict[str, Any], shop: Shop, rows: int, size: int) -> dict[str, Any]:
    """The job on so many rows in a fresh process."""
    say(f"gsm8k: {side.name}, {rows} rows")
    begin = time.perf_counter()
    with Worker(shop, side.script, side.library) as worker:
        worker.ask("make", job=job)
        reply = worker.ask("work", rows=rows, size=size, checkpoints=CHECKPOINTS)
        seconds, peak = time.perf_counter() - begin, worker.peak
    return {**reply, "rows": rows, "queries": QUERIES, "seconds": seconds, "peak_anonymous": peak}


def extrapolated(runs: Sequence[dict[str, Any]], what: str, units: int) -> dict[str, float | None]:
    """A straight line through runs in rows and queries: at 0, for each, and for so many."""
    if len(runs) < 2:
        return {"fixed": None, "each": None, "whole": None}
    at = [run["rows"] + run["queries"] for run in runs]
    each, fixed = statistics.linear_regression(at, [run[what] for run in runs])
    return {"fixed": fixed, "each": each, "whole": fixed + each * units}


def agreement(found: dict[str, dict[str, Any]]) -> dict[str, float] | None:
    """Correlation of the two tables' totals at the largest number of rows that both ran on."""
    tables = [{run["rows"]: run["totals"] for run in side["runs"]} for side in found.values()]
    common = set(tables[0]).intersection(*tables[1:]) if len(tables) == 2 else set()
    for side in found.values():
        for run in side["runs"]:
            del run["totals"]
    if not common:
        return None
    rows = max(common)
    ours, theirs = (table[rows] for table in tables)
    if len(ours) != len(theirs):
        raise ValueError(
            f"of {rows} rows ours has scores of {len(ours)}, the other package of {len(theirs)}: "
            "the two jobs are to leave out the same rows"
        )
    return {"rows": rows, "correlation": statistics.correlation(ours, theirs)}
