"""`curate doctor`: is the machine, the run or the model in order?"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import click

from curate.commands.options import (
    chosen_output,
    output_options,
    overwrite_option,
    quiet_option,
    trust_option,
)
from curate.console import Console, Output, emit


@click.command("doctor")
@click.argument("target", required=False, metavar="[RUN | MODEL]")
@click.option(
    "--body",
    "bodies",
    multiple=True,
    metavar="NAME",
    help="The loop body, a module or a list of modules; may be repeated. Found if not said.",
)
@click.option("--untied", is_flag=True, help="An ordinary stack of layers, each a step of its own.")
@click.option(
    "--skip",
    multiple=True,
    metavar="NAME_OR_GLOB",
    help="Leave parameters of the body out, as loop.skip in a recipe does; may be repeated.",
)
@click.option(
    "--arg", "arguments", multiple=True, metavar="NAME=VALUE", help="An argument of the model."
)
@click.option(
    "--loss",
    metavar="NAME",
    help="causal, masked or file.py:callable; if not said, masked for …ForMaskedLM, else causal.",
)
@click.option("--data", metavar="FILE", help="Take the rows from a file; else they are made up.")
@click.option(
    "--tokens",
    type=click.IntRange(min=2),
    help="Tokens of a made-up row (16 if not said), or the most of a row of --data.",
)
@click.option(
    "--rows", type=click.IntRange(min=2), default=2, show_default=True, help="How many rows."
)
@click.option(
    "--checkpoint",
    type=click.Path(exists=True, path_type=Path),
    metavar="PATH",
    help="Load these weights first.",
)
@click.option(
    "--dim",
    type=click.IntRange(min=2),
    default=1024,
    show_default=True,
    help="Dimension of the sketches that are checked.",
)
@trust_option
@quiet_option
@overwrite_option
@output_options
def command(
    target: str | None, quiet: bool, overwrite: bool, bodies: tuple[str, ...], **options: Any
) -> None:
    """Check the installation, a run, or whether a model can be attributed.

    RUN is a run directory: every checksum is verified. MODEL is hf:DIR or file.py:callable: it is
    built, its loop is found, step gradients of two rows are compared with plain autograd, and every
    parameter of the body is shown with the rule that serves it and the norm of its gradient at
    each step; then what is covered, and the verdict. A model that cannot be attributed is refused
    with the reason and exit status 3.
    """
    output = chosen_output(overwrite=overwrite)
    if target is not None and (".py:" in target or target.startswith("hf:")):
        _model(target, bodies, options, output, Console(quiet=quiet))
    else:
        _installation(target, output)


def _installation(target: str | None, output: Output) -> None:
    import polars as pl

    from curate import doctor
    from curate.errors import CheckFailed

    findings = doctor.installation()
    if target is not None:
        findings += doctor.run(Path(target))
    emit(pl.DataFrame([finding.as_dict() for finding in findings]), output)
    bad = [finding for finding in findings if finding.verdict == "bad"]
    if bad:
        raise CheckFailed(f"{len(bad)} of {len(findings)} checks failed: {bad[0].detail}")


def _model(
    source: str, bodies: tuple[str, ...], options: dict[str, Any], output: Output, console: Console
) -> None:
    from curate import examtables
    from curate.errors import CheckFailed, UsageError
    from curate.examine import Request, examine

    tied = not options.pop("untied")
    found = examine(Request(source, bodies, tied, **options), console.progress)
    if output.format == "table":
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        for title, table in examtables.shown(found, width):
            emit(table, output, title=title)
            if not title:
                click.echo()
        if found.refused is None or not sys.stdout.isatty():  # on a terminal the error says it
            click.echo(found.verdict)
    else:
        emit(examtables.whole(found), output)
    if isinstance(found.refused, UsageError):
        raise found.refused
    if found.refused is not None:
        raise CheckFailed(found.verdict)
