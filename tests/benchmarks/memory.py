"""Peak anonymous memory of each stage against the number of rows.

    python -m tests.benchmarks.memory [ROWS ...]
    python -m tests.benchmarks.memory --batches

Each stage runs in a process of its own, as the commands do, on generated rows and the tests' small
looped model with m = 1024. Anonymous memory is read from /proc (mapped pages aside), so this needs
Linux. Loading, sketching and scoring hold a fixed number of rows; filtering and exporting hold the
table of decisions.

With `--batches` instead: what a sketch pass takes, on looped GPTs of some sizes. What
`curate.budget` foretells from a few rows is printed beside the growth of the peak that was
seen; a share above 1 would be memory that it does not know of. Last stands what a training step
takes over the model and its gradients, foretold in the same way.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

SIZES = (4_000, 16_000, 64_000)
#: Width, tokens, steps, m and rows of the batches, each in a process of its own.
BATCHES = (
    (64, 512, 6, 2048, 16),
    (128, 256, 8, 4096, 8),
    (128, 256, 8, 4096, 32),
    (128, 64, 32, 8192, 64),
    (256, 256, 8, 4096, 16),
    (512, 128, 4, 4096, 32),
)


def anonymous(process: int | str = "self") -> int:
    """Anonymous resident memory of a process, in KiB; OSError where the system does not tell."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1])
    raise OSError(f"no RssAnon in /proc/{process}/status: this benchmark needs Linux")


class Watch(threading.Thread):
    """Keeps the peak, looked at every 10 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.done = 0, False

    def run(self) -> None:
        """Look until told that it is done."""
        while not self.done:
            self.peak = max(self.peak, anonymous())
            time.sleep(0.01)


def load(folder: Path) -> None:
    """Read and tokenise the rows."""
    from curate.rundir import RunDirectory
    from tests.loopedrun import add_texts

    run = RunDirectory.create(folder / "run")
    add_texts(run, "train", folder / "train.jsonl")
    add_texts(run, "query", folder / "query.jsonl", role="query")


def sketch(folder: Path) -> None:
    """Sketch both sets at both checkpoints."""
    from curate.rundir import RunDirectory
    from curate.sketching import LoopOptions, SketchOptions, sketch_run
    from tests.loopedrun import checkpoints, factory

    options = SketchOptions(dim=1024, budget_tokens=2048, shard_rows=1024, device="cpu")
    run, listed = RunDirectory.open(folder / "run"), checkpoints(folder / "weights")
    sketch_run(run, factory, LoopOptions(body=("body",)), listed, options=options)


def score(folder: Path) -> None:
    """Score the training rows for the queries."""
    from curate.rundir import RunDirectory
    from curate.scores import score_run

    score_run(RunDirectory.open(folder / "run"), "query")


def export(folder: Path) -> None:
    """Keep the better half and export it."""
    from curate.export import export as write
    from curate.filter import FilterConfig, filter
    from curate.rundir import RunDirectory

    run = RunDirectory.open(folder / "run")
    filter(run, rules=FilterConfig(fraction=0.5))
    write(run, "curated", folder / "curated")


STAGES = {stage.__name__: stage for stage in (load, sketch, score, export)}


def child(stage: str, folder: Path) -> None:
    """Run one stage; print its peak in MiB and its seconds."""
    watch, begin = Watch(), time.perf_counter()
    watch.start()
    STAGES[stage](folder)
    watch.done = True
    watch.join()
    print(f"{watch.peak / 1024:.0f} {time.perf_counter() - begin:.1f}")  # noqa: T201


def foretold_and_seen(width: int, tokens: int, steps: int, dim: int, rows: int) -> None:
    """Print the MiB that a batch was expected to take, those that it took, and a training step."""
    import numpy as np
    import torch

    import sdi
    from curate.batches import Batch
    from curate.budget import Rows, measure
    from curate.memory import peak_of
    from recipes import looped_gpt

    model = looped_gpt.build(context=tokens, width=width, depth=steps)
    sketcher = sdi.Sketcher(sdi.Loop(model, "body"), dim=dim)

    def run(batch: Batch) -> sdi.Part:
        return sketcher(batch.tensors, batch.ids)

    row = np.arange(tokens, dtype=np.int32) % 256
    given = Rows([(row, row)], [tokens], rows, rows * tokens)
    run(given.batch(1, 8))  # makes the hashes, and what torch sets up once
    watch, before = Watch(), anonymous()
    watch.start()
    run(given.batch(rows, tokens))
    watch.done = True
    watch.join()
    held: list[torch.Tensor] = list(model.parameters())
    need = measure(run, given, torch.device("cpu"), held).of(rows, tokens)
    batch = given.batch(rows, tokens)

    def step() -> None:
        torch.autograd.backward(sdi.causal_lm_loss(model, batch.tensors).mean())

    step()  # makes the gradients, which stay
    held += [parameter.grad for parameter in held if parameter.grad is not None]
    counted = peak_of(step, torch.device("cpu"), held)
    seen = watch.peak - before
    print(f"{need / 2**20:.0f} {seen / 2**10:.0f} {counted / 2**20:.0f}")  # noqa: T201


def batches() -> None:
    """Every batch in a process of its own; the table."""
    names = ("width", "tokens", "steps", "m", "rows", "foretold", "seen MiB", "share", "a step")
    print("".join(f"{name:>10}" for name in names))  # noqa: T201
    for sizes in BATCHES:
        given = [str(size) for size in sizes]
        command = [sys.executable, "-m", "tests.benchmarks.memory", "--batch", *given]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        need, seen, step = done.stdout.split()[-3:]
        row = (*given, need, seen, f"{float(seen) / float(need):.2f}", step)
        print("".join(f"{one:>10}" for one in row), flush=True)  # noqa: T201


def main(sizes: list[int]) -> None:
    """Run every size and stage and print the table."""
    from tests.loopedrun import write_texts

    print(f"{'rows':>8}" + "".join(f"{stage + ' MiB':>12}{'s':>7}" for stage in STAGES))  # noqa: T201
    for size in sizes:
        line = f"{size:>8}"
        with tempfile.TemporaryDirectory() as name:
            write_texts(Path(name) / "train.jsonl", size)
            write_texts(Path(name) / "query.jsonl", 50)
            for stage in STAGES:
                command = [sys.executable, "-m", "tests.benchmarks.memory", "--child", stage, name]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                peak, seconds = done.stdout.split()[-2:]
                line += f"{peak:>12}{seconds:>7}"
        print(line, flush=True)  # noqa: T201


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], Path(sys.argv[3]))
    elif sys.argv[1:2] == ["--batch"]:
        foretold_and_seen(*(int(size) for size in sys.argv[2:]))
    elif sys.argv[1:2] == ["--batches"]:
        batches()
    else:
        main([int(size) for size in sys.argv[1:]] or list(SIZES))
