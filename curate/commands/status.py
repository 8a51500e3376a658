"""`curate status`: what a run has and what is missing."""

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


@click.command("status")
@run_argument
@overwrite_option
@output_options
def command(run: Path, overwrite: bool) -> None:
    """What RUN holds, how much of the model it covers, and what is still to be done."""
    from curate.status import status

    emit(status(run), chosen_output(overwrite=overwrite))
