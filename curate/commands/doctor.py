"""`curate doctor`: is the machine, the run or the model in order?"""

from __future__ import annotations

from pathlib import Path

import click

from curate.commands.options import (
    chosen_output,
    output_options,
    overwrite_option,
    trust_option,
)
from curate.console import emit


@click.command("doctor")
@click.argument("target", required=False, metavar="[RUN | MODEL]")
@click.option("--body", "bodies", multiple=True, help="The loop body to check; may be repeated.")
@click.option("--untied", is_flag=True, help="An ordinary stack of layers, each a step of its own.")
@click.option(
    "--arg", "arguments", multiple=True, metavar="NAME=VALUE", help="An argument of the model."
)
@trust_option
@overwrite_option
@output_options
def command(
    target: str | None,
    bodies: tuple[str, ...],
    untied: bool,
    arguments: tuple[str, ...],
    trust_code: bool,
    overwrite: bool,
) -> None:
    """Check the installation and, if given, a run or a model.

    RUN is a run directory: every checksum is verified. MODEL is hf:DIR or file.py:callable: it is
    built, its loops are found, and step gradients of two rows are compared with plain autograd.
    """
    import polars as pl

    from curate import doctor
    from curate.errors import CheckFailed

    findings = doctor.installation()
    if target is not None and (".py:" in target or target.startswith("hf:")):
        findings += doctor.model(
            target, bodies, tied=not untied, arguments=arguments, trust_code=trust_code
        )
    elif target is not None:
        findings += doctor.run(Path(target))
    table = pl.DataFrame([finding.as_dict() for finding in findings])
    emit(table, chosen_output(overwrite=overwrite))
    bad = [finding for finding in findings if finding.verdict == "bad"]
    if bad:
        raise CheckFailed(f"{len(bad)} of {len(findings)} checks failed: {bad[0].detail}")
