"""`curate index`: build the search index."""

from __future__ import annotations

from pathlib import Path

import click

from curate.commands.options import overwrite_option, quiet_option, run_argument
from curate.console import Console


@click.command("index")
@run_argument
@click.option("--set", "set_name", default="train", show_default=True, help="The set to index.")
@overwrite_option
@quiet_option
def command(run: Path, set_name: str, overwrite: bool, quiet: bool) -> None:
    """Build the FAISS index over RUN's step vectors, which `curate neighbours` searches.

    The index is a cache: it is only built where it is missing or out of date.
    """
    from curate.verbs import build_run_index

    build_run_index(run, set_name, overwrite=overwrite, console=Console(quiet=quiet))
