"""What a person or a pipe sees: tables on standard output, progress and log lines on the other.

On a terminal progress is one live line per piece of work; elsewhere it is a plain line every few
seconds, so that a log file stays readable. The ETA comes from the rate since this process began
the piece of work: what an earlier, killed process had done already is not counted as speed.
Colours obey NO_COLOR.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from curate.errors import UsageError

if TYPE_CHECKING:
    import polars as pl
    from rich.console import Console as RichConsole

Format = Literal["table", "json", "csv", "parquet"]
SECONDS_BETWEEN_LINES = 5.0


@dataclass(frozen=True)
class Output:
    """Where a command's table goes: a printed table, JSON or CSV on stdout, or a Parquet file."""

    format: Format = "table"
    file: Path | None = None
    overwrite: bool = False


@dataclass
class _Work:
    """One piece of work whose progress is shown; `base` is what was done before we started."""

    base: int
    started: float
    shown: float = 0.0


@dataclass
class Console:
    """Progress and log lines on standard error.

    `quiet` silences both; errors are not its business.
    """

    quiet: bool = False
    _works: dict[tuple[str, int], _Work] = field(default_factory=dict)
    _live: bool = False

    def log(self, line: str) -> None:
        """Print one line on standard error."""
        if not self.quiet:
            self._end_live()
            print(line, file=sys.stderr, flush=True)  # noqa: T201

    def progress(self, label: str, done: int, total: int) -> None:
        """Show that `done` of `total` units of `label` are done, with the time that is left.

        What has the same first word and total is one piece of work: the rest of the label may
        change on the way (a loss, a set's name) without starting the clock again.
        """
        if self.quiet:
            return
        now = time.monotonic()
        key = (label.split()[0].rstrip(",:"), total)
        work = self._works.setdefault(key, _Work(base=done, started=now))
        finished = done >= total
        live = sys.stderr.isatty()
        if not finished and now - work.shown < (0.1 if live else SECONDS_BETWEEN_LINES):
            return
        work.shown = now
        line = progress_line(label, done, total, done - work.base, now - work.started)
        self._show(line, live=live and not finished)
        if finished:
            del self._works[key]

    def _show(self, line: str, *, live: bool) -> None:
        clear = "\r\x1b[2K" if self._live or live else ""
        print(f"{clear}{line}", end="" if live else "\n", file=sys.stderr, flush=True)  # noqa: T201
        self._live = live

    def _end_live(self) -> None:
        if self._live:
            print(file=sys.stderr)  # noqa: T201
            self._live = False


def progress_line(label: str, done: int, total: int, gained: int, seconds: float) -> str:
    """`sketch step-100  1,024/7,473 (14%)  0:12, 1:15 left`; no ETA before there is a rate."""
    share = f"{done / total:4.0%}" if total else "100%"
    line = f"{label}  {done:,}/{total:,} ({share.strip()})  {clock(seconds)}"
    if gained > 0 and seconds > 0 and done < total:
        line += f", {clock((total - done) * seconds / gained)} left"
    return line


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def emit(table: pl.DataFrame, output: Output | None = None, *, title: str | None = None) -> None:
    """Write `table` to standard output, or to the Parquet file that `output` names.

    Raises UsageError where the file exists and `overwrite` is not set.
    """
    output = output or Output()
    if output.format == "parquet":
        _write_parquet(table, output)
    elif output.format == "json":
        sys.stdout.write(json.dumps(table.to_dicts(), default=str, ensure_ascii=False) + "\n")
    elif output.format == "csv":
        sys.stdout.write(_flat(table).write_csv())
    else:
        print_table(table, title=title)
    sys.stdout.flush()


def _write_parquet(table: pl.DataFrame, output: Output) -> None:
    file = output.file
    if file is None or str(file) == "-":
        buffer = io.BytesIO()
        table.write_parquet(buffer)
        sys.stdout.buffer.write(buffer.getvalue())
        return
    if file.exists() and not output.overwrite:
        raise UsageError(f"{file} exists; pass --overwrite to replace it")
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        table.write_parquet(temporary)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def _flat(table: pl.DataFrame) -> pl.DataFrame:
    """Nested columns as JSON text, which is all that CSV can hold."""
    import polars as pl

    nested = [name for name, kind in table.schema.items() if kind.is_nested()]
    texts = [
        pl.Series(
            name,
            [None if v is None else json.dumps(v, default=str) for v in table[name].to_list()],
            dtype=pl.String,
        )
        for name in nested
    ]
    return table.with_columns(texts)


def print_table(table: pl.DataFrame, *, title: str | None = None) -> None:
    """Print a table; numbers to four digits, text on one line, cut only on a terminal."""
    from rich.table import Table

    console = _stdout()
    if title:
        console.print(title, style="bold", soft_wrap=True)
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for name, kind in table.schema.items():
        shown.add_column(
            name,
            justify="right" if kind.is_numeric() else "left",
            no_wrap=True,
            overflow="ellipsis",
        )
    for row in table.iter_rows():
        shown.add_row(*(cell(value) for value in row))
    console.print(shown)
    if title:
        console.print()


def _stdout() -> RichConsole:
    """A console as wide as the terminal, or, into a pipe or a file, as wide as the table."""
    from rich.console import Console as RichConsole

    wide = None if sys.stdout.isatty() else 10_000
    return RichConsole(file=sys.stdout, width=wide, highlight=False, markup=False, emoji=False)


def cell(value: Any) -> str:
    """One value as it stands in a printed table."""
    if value is None or value != value:  # NaN is the one value that is not itself
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(cell(item) for item in value)
    return " ".join(str(value).split())
