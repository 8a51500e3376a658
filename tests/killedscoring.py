"""A process that is killed while it scores, over and over, until the tables are whole.

Run as `python -m tests.killedscoring DIR`: as `tests.killedrun`, for scoring DIR/run.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import torch._dynamo  # noqa: F401 - slow to import; once here rather than once in each child

from curate import scratch
from curate.rundir import RunDirectory
from curate.scores import score_run
from tests.killedrun import attempt

SETTINGS = {"group_by": "source", "top_k": 3, "pairs": True}


def score(directory: Path) -> None:
    """Score the run in `directory`."""
    score_run(RunDirectory.open(directory / "run"), "test", **SETTINGS)  # type: ignore[arg-type]


def main(directory: Path) -> None:
    """Kill the scoring at random delays and around random renames; then let it finish."""
    scratch.PART_ROWS = 16  # several parts, so that there is something to be killed between
    draw, killed = random.Random(0), 0
    for _ in range(4):
        killed += attempt(
            directory, 10**9, before=True, delay=draw.uniform(0.005, 0.05), work=score
        )
    for number in range(8):
        rename = 1 + draw.randrange(1 + number)
        killed += attempt(directory, rename, before=number % 2 == 0, delay=None, work=score)
    attempt(directory, 10**9, before=True, delay=None, work=score)
    sys.stdout.write(f"{killed}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
