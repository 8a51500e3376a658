"""Curate the training data of looped transformers by when in the loop each example matters.

    import curate
    run = curate.open("runs/gsm8k")

Importing this package imports none of the heavy libraries: they come with what needs them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from curate.run import Run

__all__ = ["open"]


def open(path: str | Path) -> Run:  # noqa: A001 - curate.open is the public name
    """The run directory at `path`, for reading.

    Raises:
        curate.errors.CurateError: where there is no run.
    """
    from curate.run import open_run

    return open_run(path)
