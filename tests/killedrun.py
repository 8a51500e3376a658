"""A process that is killed while it sketches, over and over, until the run is whole.

Run as `python -m tests.killedrun DIR`: sketches DIR/run in child processes, each of which kills
itself with SIGKILL right before, or right after, one of its renames or lines of a log, or is killed
after a random delay. Prints how many were killed. The children are forked before torch has started
any thread.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch._dynamo  # noqa: F401 - slow to import; once here rather than once in each child

from curate import atomic
from curate.rundir import RunDirectory
from curate.sketching import sketch_run
from sdi.checkpoints import find_checkpoints
from tests.loopedrun import LOOP, OPTIONS, factory

ETAS = {"early": 0.1, "late": 0.2}


def sketch(directory: Path) -> None:
    """Sketch the run in `directory` with its two checkpoints."""
    listed = [
        {"path": str(directory / f"{name}.safetensors"), "weight": eta}
        for name, eta in ETAS.items()
    ]
    run = RunDirectory.open(directory / "run")
    sketch_run(run, factory, LOOP, find_checkpoints(listed), options=OPTIONS)


def die_at_change(number: int, *, before: bool) -> None:
    """Make this process kill itself at its `number`-th rename or line of a log, counted from 1.

    Before a line means with half of it written.
    """
    left = number

    def dying(change: Callable[..., None], *, torn: bool) -> Callable[..., None]:
        def counted(*arguments: Any, **keywords: Any) -> None:
            nonlocal left
            left -= 1
            if left == 0 and before:
                if torn:
                    path, text = arguments
                    with path.open("a") as stream:
                        stream.write(text[: len(text) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            change(*arguments, **keywords)
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        return counted

    os.replace = dying(os.replace, torn=False)
    atomic.append_line = dying(atomic.append_line, torn=True)


def attempt(
    directory: Path,
    change: int,
    *,
    before: bool,
    delay: float | None,
    work: Callable[[Path], None] = sketch,
) -> bool:
    """Fork a child that does `work`; True where it was killed, False where it finished."""
    child = os.fork()
    if child == 0:
        die_at_change(change, before=before)
        try:
            work(directory)
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}".encode())
            os._exit(1)
        os._exit(0)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit(f"a resumed run failed with status {os.WEXITSTATUS(status)}")
    return os.WIFSIGNALED(status)


def main(directory: Path) -> None:
    """Kill the run at random delays and at ever later changes; then let it finish.

    A shard takes nine: three files of steps, three of totals, loss and depth, and the manifest or a
    line of its log; before the first comes that of the self-check.
    """
    draw, killed = random.Random(0), 0
    for _ in range(4):
        killed += attempt(directory, 10**9, before=True, delay=draw.uniform(0.02, 0.2))
    for number in range(18):
        killed += attempt(directory, 1 + number % 14, before=number % 2 == 0, delay=None)
    attempt(directory, 10**9, before=True, delay=None)
    sys.stdout.write(f"{killed}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
