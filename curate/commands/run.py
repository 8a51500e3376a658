"""`curate run`: a whole recipe."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import click

from curate.commands.options import (
    chosen_output,
    output_options,
    overwrite_option,
    quiet_option,
    set_option,
    trust_option,
)
from curate.console import Console, emit


@click.command("run")
@click.argument("recipe")
@click.option(
    "--into",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="The run directory; runs/<the recipe's name> if not said.",
)
@set_option
@click.option("--from", "from_step", metavar="STEP", help="Do this step and those after it again.")
@click.option("--dry-run", is_flag=True, help="Check the recipe and print the steps; run nothing.")
@trust_option
@overwrite_option
@quiet_option
@output_options
def command(
    recipe: str,
    into: Path | None,
    overrides: tuple[str, ...],
    from_step: str | None,
    dry_run: bool,
    trust_code: bool,
    overwrite: bool,
    quiet: bool,
) -> None:
    """Run RECIPE: a YAML file, the name of a shipped one (arithmetic, gsm8k), or - for stdin.

    Steps that are done are skipped; a run that was interrupted continues where it was.
    """
    import polars as pl

    from curate.cookbook import load_recipe, step_named
    from curate.pipeline import Job, planned, run_recipe

    with tempfile.TemporaryDirectory() as scratch:
        name = _from_stdin(Path(scratch)) if recipe == "-" else recipe
        settled, folder = load_recipe(name, overrides)
    folder = Path.cwd() if recipe == "-" else folder
    console = Console(quiet=quiet)
    job = Job(settled, folder, into or Path("runs") / settled.name, trust_code, overwrite, console)
    if from_step is not None:
        step_named(from_step, settled)
    if dry_run:
        emit(pl.DataFrame(planned(job)), chosen_output(overwrite=overwrite))
        return
    tables = run_recipe(job, from_step=from_step)
    for title, table in tables.items():
        emit(table, chosen_output(overwrite=overwrite), title=title)
    console.log(f"the run is in {job.path}")


def _from_stdin(folder: Path) -> str:
    file = folder / "recipe.yaml"
    file.write_text(sys.stdin.read(), encoding="utf-8")
    return str(file)
