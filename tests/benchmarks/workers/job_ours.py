"""The GSM8K job with this project: load, sketch at every checkpoint, score, read the table."""

from __future__ import annotations

import time
from itertools import count
from pathlib import Path
from typing import Any

from answer import Deed, serve
from recipe import build

from curate.examples import DataSpec
from curate.loading import Loader
from curate.rundir import RunDirectory
from curate.scores import score_run
from curate.sketching import LoopOptions, SketchOptions, sketch_run
from sdi.checkpoints import find_checkpoints


def make(job: dict[str, Any]) -> dict[str, Deed]:
    """`work`: the whole job on the first `rows` rows, in batches of `size` padded tokens."""
    numbers = count()

    def work(rows: int, size: int, checkpoints: int) -> dict[str, Any]:
        seconds, begin = {}, time.perf_counter()
        run = RunDirectory.create(Path(f"run-{next(numbers)}"))
        with Loader() as loader:
            add(run, loader, job, "train", f"0:{rows}")
            add(run, loader, job, "query", f"-{job['queries']}:")
        seconds["load"] = time.perf_counter() - begin
        options = SketchOptions(dim=job["dim"], budget_tokens=size, shard_rows=1024, device="cpu")
        listed = [{"path": f"{path}.safetensors", "weight": 1.0} for path in job["checkpoints"]][
            :checkpoints
        ]
        body = LoopOptions(body=("body",))
        sketch_run(run, lambda: build(job), body, find_checkpoints(listed), options=options)
        seconds["sketch"] = time.perf_counter() - begin - seconds["load"]
        score_run(run, "query")
        totals = run.influence("query").collect()["total"].to_list()
        return {"totals": totals, "phases": seconds, "seconds": time.perf_counter() - begin}

    return {"work": work}


def add(run: RunDirectory, loader: Loader, job: dict[str, Any], name: str, rows: str) -> None:
    """Take a part of the file over into the run as a set."""
    content = {"prompt": "question", "response": "answer", "mask_prompt": True}
    cut = {"max_tokens": job["tokens"], "where": {"rows": rows}}
    spec = DataSpec.of({"path": job["data"], "role": name, **content, **cut})
    run.add_set(loader.load(spec, run.stage(name), name=name, known_ids=run.ids(name)))


if __name__ == "__main__":
    serve(make)
