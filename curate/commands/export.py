"""`curate export`: a selection as a dataset."""

from __future__ import annotations

from pathlib import Path

import click

from curate.commands.options import overwrite_option, quiet_option, run_argument
from curate.console import Console


@click.command("export")
@run_argument
@click.argument("selection")
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
@click.option("--column", "columns", multiple=True, help="Only these of the original columns.")
@click.option("--dry-run", is_flag=True, help="Say what would be written; write nothing.")
@overwrite_option
@quiet_option
def command(
    run: Path,
    selection: str,
    directory: Path,
    columns: tuple[str, ...],
    dry_run: bool,
    overwrite: bool,
    quiet: bool,
) -> None:
    """Write SELECTION of RUN to DIRECTORY, which `datasets.load_dataset(DIRECTORY)` reads.

    It holds the kept rows with their original columns, weights and scores, a card, and the
    decisions about every row.
    """
    from curate.verbs import export_selection

    line = export_selection(
        run, selection, directory, columns=columns or None, overwrite=overwrite, dry_run=dry_run
    )
    Console(quiet=quiet).log(line)
