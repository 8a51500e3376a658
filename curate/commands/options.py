"""Arguments and options that several verbs share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from curate.console import Output

Command = TypeVar("Command", bound=Callable[..., Any])

run_argument = click.argument(
    "run", type=click.Path(exists=True, file_okay=False, path_type=Path), metavar="RUN"
)
overwrite_option = click.option(
    "--overwrite", is_flag=True, help="Replace what is there already; otherwise nothing is."
)
quiet_option = click.option("--quiet", "-q", is_flag=True, help="No progress and no log lines.")
trust_option = click.option(
    "--trust-code",
    is_flag=True,
    help="Allow code named by the recipe that did not come with this package.",
)
set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Replace one value of the recipe, such as sketch.dim=1024; may be repeated.",
)


def output_options(command: Command) -> Command:
    """Add --json, --csv and --parquet FILE; the command gets them as one `output`."""

    def pack(ctx: click.Context, parameter: click.Parameter, value: Any) -> Any:
        if value:
            ctx.ensure_object(dict).setdefault("output", []).append((parameter.name, value))
        return value

    for name, text in (("json", "JSON, one list of records"), ("csv", "CSV")):
        command = click.option(
            f"--{name}", is_flag=True, expose_value=False, callback=pack, help=f"Print {text}."
        )(command)
    return click.option(
        "--parquet",
        type=click.Path(dir_okay=False, allow_dash=True, path_type=Path),
        metavar="FILE",
        expose_value=False,
        callback=pack,
        help="Write a Parquet file; - is standard output.",
    )(command)


def chosen_output(*, overwrite: bool = False) -> Output:
    """The output that the options of the command being run ask for; one at most."""
    chosen = click.get_current_context().ensure_object(dict).get("output", [])
    if len(chosen) > 1:
        names = " and ".join(f"--{name}" for name, _ in chosen)
        raise click.UsageError(f"{names} exclude each other; choose one")
    if not chosen:
        return Output()
    name, value = chosen[0]
    return Output(name, value if name == "parquet" else None, overwrite)


def number_pair(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> Any:
    """`0,0.5` as a pair of numbers."""
    if value is None:
        return None
    try:
        low, high = (float(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r}; expected two numbers such as 0,0.5") from None
    return low, high


def named_numbers(_ctx: click.Context, _parameter: click.Parameter, value: tuple[str, ...]) -> Any:
    """Several `name=number` as a mapping."""
    found: dict[str, float] = {}
    for text in value:
        name, _, number = text.rpartition("=")
        try:
            found[name] = float(number)
        except ValueError:
            name = ""
        if not name:
            raise click.BadParameter(f"{text!r}; expected NAME=NUMBER")
    return found
