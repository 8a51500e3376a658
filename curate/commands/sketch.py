"""`curate sketch`: what is missing of a run's sketches."""

from __future__ import annotations

from pathlib import Path

import click

from curate.commands.options import quiet_option, run_argument, set_option, trust_option
from curate.console import Console


@click.command("sketch")
@run_argument
@set_option
@trust_option
@quiet_option
def command(run: Path, overrides: tuple[str, ...], trust_code: bool, quiet: bool) -> None:
    """Sketch what is missing in RUN, by the recipe inside it.

    With --set a set or a checkpoint is added first, such as --set data.more=more.jsonl; what is
    sketched already is kept, and settings it was made with cannot change.
    """
    from curate.operations import sketch
    from curate.pipeline import reopened, store_recipe

    job = reopened(run, overrides, trust_code=trust_code, console=Console(quiet=quiet))
    sketch(job)
    store_recipe(job)
