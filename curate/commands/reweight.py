"""`curate reweight`: weights for the kept rows."""

from __future__ import annotations

from pathlib import Path

import click

from curate.commands.options import (
    chosen_output,
    output_options,
    overwrite_option,
    run_argument,
)
from curate.console import emit


@click.command("reweight")
@run_argument
@click.argument("selection", default="curated")
@click.option(
    "--method",
    type=click.Choice(["softmax", "rank", "linear", "clip"]),
    default="softmax",
    show_default=True,
)
@click.option("--by", metavar="WHAT", help="As in `rank`; the selection's own score if not said.")
@click.option(
    "--temperature",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="Of the softmax, in standard deviations of the score.",
)
@click.option(
    "--low",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="The smallest weight.",
)
@click.option(
    "--high",
    type=click.FloatRange(min=0, min_open=True),
    default=2.0,
    show_default=True,
    help="The largest weight.",
)
@click.option("--dry-run", is_flag=True, help="Print the weights' spread; write nothing.")
@overwrite_option
@output_options
def command(run: Path, selection: str, dry_run: bool, overwrite: bool, **settings: object) -> None:
    """Give the kept rows of SELECTION in RUN weights with mean one."""
    from curate.verbs import reweight_rows

    table = reweight_rows(run, selection, settings, overwrite=overwrite, dry_run=dry_run)
    emit(table, chosen_output(overwrite=overwrite))
