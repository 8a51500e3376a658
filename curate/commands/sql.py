"""`curate sql`: a question about a run, in the sandbox."""

from __future__ import annotations

import sys
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


@click.command("sql")
@run_argument
@click.argument("statement")
@click.option("--param", "params", multiple=True, help="A value for a ? of the statement.")
@click.option("--memory-limit", metavar="SIZE", help="Such as 512MB; 2 GiB if not said.")
@click.option("--threads", type=click.IntRange(min=1), help="At most so many threads.")
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS")
@overwrite_option
@output_options
def command(
    run: Path,
    statement: str,
    params: tuple[str, ...],
    memory_limit: str | None,
    threads: int | None,
    timeout: float | None,
    overwrite: bool,
) -> None:
    """Answer one SQL STATEMENT (DuckDB's dialect; - reads it from stdin) about RUN.

    It can only read, and sees the tables examples, influence, influence_long, tops, decisions and
    steps; no files, no network.
    """
    text = sys.stdin.read() if statement == "-" else statement
    with prepared():
        from curate import query
        from curate.rundir import RunDirectory

        table = query.sql(
            RunDirectory.open(run),
            text,
            params=params or None,
            memory_limit=memory_limit,
            threads=threads,
            timeout=timeout,
        )
    emit(table, chosen_output(overwrite=overwrite))
