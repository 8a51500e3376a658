"""`curate rank`: rows in the order of their influence."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import click

from curate.commands.options import (
    chosen_output,
    output_options,
    overwrite_option,
    run_argument,
)
from curate.console import emit
from curate.sandboxed import prepared

PRINTED = (
    *("rank", "row", "id", "source", "score", "score_se"),
    *("early", "late", "total", "contrast", "peak", "centre", "text"),
)


@click.command("rank")
@run_argument
@click.argument("query", required=False)
@click.option(
    "--by",
    default="total",
    show_default=True,
    metavar="WHAT",
    help="late, early, total, contrast, peak, centre, energy, or an SQL expression.",
)
@click.option("--ascending", is_flag=True, help="Smallest first: what hurts the queries most.")
@click.option("--top", type=click.IntRange(min=1), default=20, show_default=True)
@click.option("--all", "every", is_flag=True, help="All rows, whatever --top says.")
@click.option("--where", metavar="SQL", help="Only rows for which this SQL condition holds.")
@overwrite_option
@output_options
def command(
    run: Path,
    query: str | None,
    by: str,
    ascending: bool,
    top: int,
    every: bool,
    where: str | None,
    overwrite: bool,
) -> None:
    """Rank RUN's training rows by their influence on QUERY (needed where there are several)."""
    # What is no plain name is SQL; its process starts while the imports below go on.
    with nullcontext() if by.isidentifier() and where is None else prepared():
        from curate.verbs import rank_rows

        table = rank_rows(
            run, query, by=by, descending=not ascending, top=None if every else top, where=where
        )
    output = chosen_output(overwrite=overwrite)
    if output.format == "table":  # the other formats are for programs, which get every column
        table = table.select(column for column in PRINTED if column in table.columns)
    emit(table, output)
