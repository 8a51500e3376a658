"""Peak anonymous memory of sketching and scoring against the number of rows.

    python -m tests.benchmarks.memory [ROWS ...]

Each size runs in a process of its own, on generated rows and the tests' small looped model with
m = 1024; anonymous memory is read from /proc (mapped pages aside), so this needs Linux.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

SIZES = (2_000, 8_000, 32_000)


def anonymous() -> int:
    """Anonymous resident memory of this process, in KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1])
    raise OSError("no RssAnon in /proc/self/status: this benchmark needs Linux")


class Watch(threading.Thread):
    """Keeps the peak, looked at every 20 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.done = 0, False

    def run(self) -> None:
        """Look until told that it is done."""
        while not self.done:
            self.peak = max(self.peak, anonymous())
            time.sleep(0.02)


def child(rows: int) -> None:
    """Load, sketch and score `rows` rows; print peaks as JSON."""
    from curate.rundir import RunDirectory
    from curate.scores import score_run
    from curate.sketching import LoopOptions, SketchOptions, sketch_run
    from tests.loopedrun import add_texts, checkpoints, factory, write_texts

    peaks: dict[str, float] = {"rows": rows}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = RunDirectory.create(folder / "run")

        def measured(label: str, work: object) -> None:
            watch, begin = Watch(), time.perf_counter()
            watch.start()
            work()  # type: ignore[operator]
            watch.done = True
            watch.join()
            peaks[f"{label} MiB"] = round(watch.peak / 1024)
            peaks[f"{label} s"] = round(time.perf_counter() - begin, 1)

        def load() -> None:
            add_texts(run, "train", write_texts(folder / "train.jsonl", rows))
            add_texts(run, "query", write_texts(folder / "query.jsonl", 50), role="query")

        def sketch() -> None:
            options = SketchOptions(dim=1024, budget_tokens=2048, shard_rows=1024, device="cpu")
            listed = checkpoints(folder / "weights")
            sketch_run(run, factory, LoopOptions(body=("body",)), listed, options=options)

        measured("load", load)
        measured("sketch", sketch)
        measured("score", lambda: score_run(run, "query"))
    print(json.dumps(peaks))  # noqa: T201 - this is what the benchmark is for


def main(sizes: list[int]) -> None:
    """Run every size in a process of its own and print the table."""
    for size in sizes:
        command = [sys.executable, "-m", "tests.benchmarks.memory", "--child", str(size)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        print(done.stdout.strip().splitlines()[-1], flush=True)  # noqa: T201


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(int(sys.argv[2]))
    else:
        main([int(size) for size in sys.argv[1:]] or list(SIZES))
