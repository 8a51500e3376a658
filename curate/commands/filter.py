"""`curate filter`: decide which rows are kept."""

from __future__ import annotations

from pathlib import Path

import click

from curate.commands.options import (
    chosen_output,
    named_numbers,
    output_options,
    overwrite_option,
    run_argument,
)
from curate.console import Console, emit


@click.command("filter")
@run_argument
@click.argument("query", required=False)
@click.option("--name", default="curated", show_default=True, help="The selection's name.")
@click.option("--by", default="total", show_default=True, metavar="WHAT", help="As in `rank`.")
@click.option("--ascending", is_flag=True, help="Keep the smallest.")
@click.option("--where", metavar="SQL", help="Keep only rows for which this condition holds.")
@click.option("--top", type=click.IntRange(min=1), metavar="K", help="Keep the best K rows.")
@click.option("--fraction", type=click.FloatRange(0, 1), help="Keep the best share of the rows.")
@click.option("--quantile", type=click.FloatRange(0, 1), help="Keep what is above this quantile.")
@click.option(
    "--round-robin",
    type=click.IntRange(min=1),
    metavar="K",
    help="Keep K rows by letting the queries choose their best in turn.",
)
@click.option("--tokens", type=click.IntRange(min=1), help="Keep the best rows within N tokens.")
@click.option(
    "--quota",
    "quotas",
    multiple=True,
    callback=named_numbers,
    metavar="SOURCE=N",
    help="At most N rows (or this share, if below one) of a source; may be repeated.",
)
@click.option("--keep-leaks", is_flag=True, help="Keep rows with the same content as a query.")
@click.option("--dry-run", is_flag=True, help="Say what would be kept; write nothing.")
@overwrite_option
@output_options
def command(
    run: Path,
    query: str | None,
    name: str,
    ascending: bool,
    keep_leaks: bool,
    dry_run: bool,
    overwrite: bool,
    **rules: object,
) -> None:
    """Decide for every training row of RUN whether it is kept, and why; nothing is deleted."""
    from curate.verbs import filter_rows

    rules |= {"descending": not ascending, "drop_leaks": not keep_leaks}
    table = filter_rows(run, query, name, rules, overwrite=overwrite, dry_run=dry_run)
    emit(table, chosen_output(overwrite=overwrite))
    if not dry_run:
        Console().log(f"the decisions are in {run}; next: curate export {run} {name} DIR")
