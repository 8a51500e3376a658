"""`curate score`: sketches to influence tables."""

from __future__ import annotations

from pathlib import Path

import click

from curate.commands.options import (
    chosen_output,
    named_numbers,
    number_pair,
    output_options,
    overwrite_option,
    quiet_option,
    run_argument,
)
from curate.console import Console, emit


@click.command("score")
@run_argument
@click.argument("queries", nargs=-1, metavar="[QUERY]...")
@click.option(
    "--train", "train_set", default="train", show_default=True, help="The set that is scored."
)
@click.option("--group-by", metavar="COLUMN", help="Also by group of queries, and their maximum.")
@click.option("--kind", type=click.Choice(["dot", "cosine"]), default="dot", show_default=True)
@click.option(
    "--precondition",
    type=click.FloatRange(min=0, min_open=True),
    metavar="LAMBDA",
    help="Score with (C + λI)⁻¹; λ is relative to the mean eigenvalue of C.",
)
@click.option("--early", callback=number_pair, metavar="A,B", help="The early window.")
@click.option("--late", callback=number_pair, metavar="A,B", help="The late window.")
@click.option("--steps", is_flag=True, help="The windows are step numbers, not fractions.")
@click.option("--raw-contrast", is_flag=True, help="Contrast = late − early, not standardised.")
@click.option("--top-k", type=click.IntRange(min=0), default=100, show_default=True)
@click.option("--name", help="The table's name; the set's if not said.")
@click.option("--pairs", is_flag=True, help="Also store every (row, query) pair: N × Q rows.")
@click.option(
    "--weight",
    "weights",
    multiple=True,
    callback=named_numbers,
    metavar="CHECKPOINT=η",
    help="Another weight for a checkpoint; may be repeated.",
)
@overwrite_option
@quiet_option
@output_options
def command(
    run: Path,
    queries: tuple[str, ...],
    early: tuple[float, float] | None,
    late: tuple[float, float] | None,
    steps: bool,
    raw_contrast: bool,
    weights: dict[str, float],
    overwrite: bool,
    quiet: bool,
    **options: object,
) -> None:
    """Score RUN's training rows against each QUERY set (all of them if none is named)."""
    from curate.verbs import score_queries

    windows = {"early": early, "late": late, "unit": "step" if steps else None}
    settings = {
        "windows": {key: value for key, value in windows.items() if value is not None},
        "contrast": "raw" if raw_contrast else "standardised",
        "weights": weights,
        "overwrite": overwrite,
        **options,
    }
    table = score_queries(run, queries, settings, Console(quiet=quiet))
    emit(table, chosen_output(overwrite=overwrite))
