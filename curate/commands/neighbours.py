"""`curate neighbours`: rows whose step vectors are nearest."""

from __future__ import annotations

from pathlib import Path

import click

from curate.commands.options import (
    chosen_output,
    output_options,
    overwrite_option,
    quiet_option,
    run_argument,
)
from curate.console import Console, emit


@click.command("neighbours")
@run_argument
@click.option("--row", type=click.IntRange(min=0), help="The row to start from.")
@click.option("--id", "row_id", help="The same by the row's id.")
@click.option("--step", type=click.IntRange(min=1), required=True, help="Its loop step, from 1.")
@click.option("-k", type=click.IntRange(min=1), default=10, show_default=True)
@click.option("--query", metavar="SET", help="The set the row is of; the training set if not said.")
@overwrite_option
@output_options
@quiet_option
def command(
    run: Path,
    row: int | None,
    row_id: str | None,
    step: int,
    k: int,
    query: str | None,
    overwrite: bool,
    quiet: bool,
) -> None:
    """The K (row, step) of RUN's index with the largest M between them and one row at one step."""
    from curate.verbs import nearest_rows

    if (row is None) == (row_id is None):
        raise click.UsageError("say which row: one of --row and --id", click.get_current_context())
    console = Console(quiet=quiet)
    table = nearest_rows(run, row=row, row_id=row_id, step=step, k=k, query=query, console=console)
    emit(table, chosen_output(overwrite=overwrite))
