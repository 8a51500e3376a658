"""SQL over a run, and SQL expressions over a table, in a process that can only read.

`sql` gives a user's statement the tables of a run; `evaluate` gives `--where` and `--by` the rows
they speak of. Both run in `curate.sandbox`, whose docstring says how it is fenced. Tables go there
as files: what the run has as Parquet is opened in place, so that only the columns and rows that the
statement asks for are read; anything else is written as one Arrow file, and only when the statement
names it. What belongs to the rows of a set and is not in its table is joined to it in SQL, so that
text and tokens need not be read for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from curate.errors import CurateError, UsageError
from curate.examplestore import ExampleStore
from curate.sandboxed import sandbox

if TYPE_CHECKING:
    from curate.manifest import File
    from curate.rundir import RunDirectory

_POSITION = "position__"


@dataclass(frozen=True)
class Limits:
    """What one statement may use: bytes of memory, threads, seconds."""

    memory: int = 2 << 30
    threads: int = 2
    timeout: float = 60.0

    @classmethod
    def of(cls, memory: str | int | None, threads: int | None, timeout: float | None) -> Limits:
        """Limits with the defaults for what is None; `memory` may be written "512MB"."""
        seconds = cls.timeout if timeout is None else timeout
        count = cls.threads if threads is None else threads
        if not seconds > 0 or count < 1:
            raise UsageError(f"the time limit ({seconds} s) and threads ({count}) must be positive")
        return cls(cls.memory if memory is None else parse_bytes(memory), count, seconds)


Content = tuple[Path, ...] | pl.LazyFrame


@dataclass(frozen=True)
class Part:
    """One piece of a table.

    Attributes:
        content: Parquet files or a lazy frame.
        constants: columns that go first, with the value of all rows.
        beside: makes tables of the same rows, whose columns go last. They are joined by `row`, and
            made only where the statement names the table.
    """

    content: Content
    constants: tuple[tuple[str, str], ...] = ()
    beside: Callable[[], list[Content]] | None = None


Tables = Mapping[str, Sequence[Part]]


def parse_bytes(text: str | int) -> int:
    """Bytes from a number or from "512MB", "2 GiB". Raises UsageError; at least 16 MiB."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", str(text).lower())
    if not found:
        raise UsageError(f"{text!r} is not an amount of memory; write it like 512MB or 2GiB")
    base = 1024 if found[3] else 1000
    amount = int(float(found[1]) * base ** " kmgt".index(found[2] or " "))
    if amount < 1 << 24:
        raise UsageError(f"a memory limit of {text} is too small to work in; give at least 16MiB")
    return amount


def sql(
    run: RunDirectory,
    statement: str,
    *,
    params: Sequence[Any] | Mapping[str, Any] | None = None,
    memory_limit: str | int | None = None,
    threads: int | None = None,
    timeout: float | None = None,
) -> pl.DataFrame:
    """The answer to one reading SQL statement about a run.

    Tables: `examples` (all sets, column `set`), `influence` and `tops` (all queries, column
    `query`), `influence_long` (one row per step), `decisions` (column `selection`), `steps`
    (index and label), `dropped` (rows left out at loading, where a set keeps them). Without an
    ORDER BY the rows of the answer come in any order.

    Raises:
        UsageError: the statement does more than read, is not SQL, or names what is not there.
        CurateError: it needed more memory or time than it was given.
    """
    limits = Limits.of(memory_limit, threads, timeout)
    return read(statement, run_tables(run), params=params, limits=limits, views=_views(run))


def run_tables(run: RunDirectory) -> dict[str, list[Part]]:
    """The tables of a run that `sql` offers, each as its parts; empty tables are left out."""
    manifest = run.manifest
    tables: dict[str, list[Part]] = {
        "examples": _examples(run),
        "influence": [],
        "tops": [],
        "decisions": [],
    }
    for query, entry in manifest.influence.items():
        for table, files in (("influence", entry.parts), ("tops", entry.tops)):
            tables[table] += _part(run, files, (("query", query),))
    for name, selection in manifest.selections.items():
        tables["decisions"] += _part(run, selection.files, (("selection", name),))
    labels = manifest.steps
    if labels:
        frame = pl.DataFrame({"step": range(1, len(labels) + 1), "label": list(labels)})
        tables["steps"] = [Part(frame.lazy())]
    tables["dropped"] = _dropped(run)
    return {name: parts for name, parts in tables.items() if parts}


def _part(
    run: RunDirectory, files: Sequence[File], constants: tuple[tuple[str, str], ...]
) -> list[Part]:
    return [Part(tuple(run.path / file.path for file in files), constants)] if files else []


def _examples(run: RunDirectory) -> list[Part]:
    """Every set's table, with loss, steps and side columns beside it."""
    store = ExampleStore(run)

    def beside(name: str) -> list[Content]:
        return [(m,) if isinstance(m, Path) else m.lazy() for m in store.beside(name)]

    return [
        replace(part, beside=partial(beside, name))
        for name, entry in run.manifest.sets.items()
        for part in _part(run, entry.parts, (("set", name),))
    ]


def _dropped(run: RunDirectory) -> list[Part]:
    """Rows that loading left out, with their reasons: listed among a set's files, beside tokens."""
    return [
        part
        for name, entry in run.manifest.sets.items()
        for part in _part(
            run,
            [f for f in entry.arrays if Path(f.path).name.startswith("dropped")
             and f.path.endswith(".parquet")],
            (("set", name),),
        )
    ]  # fmt: skip


def _views(run: RunDirectory) -> dict[str, str]:
    """`influence_long`: one row per (query, row, step) that is present."""
    if not any(entry.parts for entry in run.manifest.influence.values()):
        return {}
    return {
        "influence_long": (
            'SELECT query, "row", CAST(substr(name, 2) AS INTEGER) AS step, sdi FROM '
            "(UNPIVOT (SELECT query, \"row\", COLUMNS('^s[0-9]+$') FROM influence) "
            "ON COLUMNS('^s[0-9]+$') INTO NAME name VALUE sdi)"
        )
    }


def evaluate(
    frame: pl.DataFrame, expressions: Mapping[str, str], limits: Limits | None = None
) -> pl.DataFrame:
    """One column for each named SQL expression over the columns of `frame`, in its row order.

    An expression may use window functions (`total > avg(total) OVER ()`), never a bare aggregate.

    Raises:
        UsageError: it is not an expression over these columns, or does more than read.
    """
    numbered = frame.with_row_index(_POSITION)
    columns = ", ".join(f'(\n{text}\n) AS "{name}"' for name, text in expressions.items())
    statement = f"SELECT {_POSITION}, {columns} FROM frame"
    try:
        found = read(statement, {"frame": [Part(numbered.lazy())]}, limits=limits)
    except UsageError as error:
        written = "; ".join(expressions.values())
        raise UsageError(f"in the expression {written!r}: {error}") from error
    if found.columns != [_POSITION, *expressions] or found.height != frame.height:
        raise UsageError(f"{'; '.join(expressions.values())!r} is not an expression with a value "
                         "for each row; write a formula over the columns")  # fmt: skip
    return found.sort(_POSITION).drop(_POSITION)


def read(
    statement: str,
    tables: Tables,
    *,
    params: Sequence[Any] | Mapping[str, Any] | None = None,
    limits: Limits | None = None,
    views: Mapping[str, str] | None = None,
) -> pl.DataFrame:
    """Run one statement over `tables` (and `views` over them) in the sandbox.

    Raises:
        UsageError: the statement does more than read, is not SQL, or names what is not there.
        CurateError: it needed more memory or time than `limits`.
    """
    limits = limits or Limits()
    with sandbox() as process:
        spill, out = process.directory / "spill", process.directory / "answer.arrow"
        spill.mkdir()
        request = _request(statement, tables, dict(views or {}), process.directory)
        request |= {
            "statement": statement,
            "params": params,
            "memory": limits.memory,
            "threads": limits.threads,
            "timeout": limits.timeout,
            "spill": str(spill),
            "out": str(out),
        }
        _raise_for(process.ask(request, limits.timeout), limits)
        return _answer(out)


def _request(
    statement: str, tables: Tables, views: dict[str, str], private: Path
) -> dict[str, Any]:
    """The files and view definitions for the tables that the statement may name."""
    wanted = _mentioned(statement, tables, views)
    files: dict[str, Any] = {}
    definitions: list[str] = []
    for table, parts in tables.items():
        selects = []
        whole = table in wanted
        for number, part in enumerate(parts if whole else parts[:1]):
            more = part.beside() if part.beside and whole else []
            named = {f"__{table}_{number}_{n}": c for n, c in enumerate([part.content, *more])}
            for name, content in named.items():
                files[name] = _files(content, private / f"{name}.arrow", whole)
            selects.append(_select(part.constants, named))
        definitions.append(f'CREATE VIEW "{table}" AS ' + " UNION ALL BY NAME ".join(selects))
    definitions += [f'CREATE VIEW "{name}" AS {query}' for name, query in views.items()]
    return {"files": files, "views": definitions, "tables": [*tables, *views]}


def _mentioned(statement: str, tables: Tables, views: dict[str, str]) -> set[str]:
    """Tables whose name occurs in the statement or in a view that it names: more than needed is
    harmless, fewer is not.
    """
    text = statement + " ".join(body for name, body in views.items() if name in statement.lower())
    return {name for name in tables if name.lower() in text.lower()}


def _select(constants: tuple[tuple[str, str], ...], contents: Mapping[str, Content]) -> str:
    """The rows of the first of `contents`, with the columns of the others joined by `row`.

    A name that was there before gets `_right` behind it, as in `RunDirectory.examples`.
    """
    first, *others = contents
    columns = ["'{}' AS {}".format(value.replace("'", "''"), _quoted(n)) for n, value in constants]
    columns.append(f"{_quoted(first)}.*")
    taken = {name.lower() for name in _names(contents[first])} if others else set()
    joins = ""
    for other in others:
        for name in _names(contents[other]):
            if name != "row":
                shown = name
                while shown.lower() in taken:  # SQL does not tell cases apart
                    shown += "_right"
                columns.append(f"{_quoted(other)}.{_quoted(name)} AS {_quoted(shown)}")
                taken.add(shown.lower())
        joins += f' LEFT JOIN "{other}" ON "{other}"."row" = "{first}"."row"'
    return f'SELECT {", ".join(columns)} FROM "{first}"{joins}'


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _names(content: Content) -> list[str]:
    frame = pl.scan_parquet(content[0]) if isinstance(content, tuple) else content
    return frame.collect_schema().names()


def _files(content: Content, path: Path, whole: bool) -> dict[str, Any]:
    """Where the rows lie; a lazy frame is written, without rows if none are asked for."""
    if isinstance(content, tuple):
        return {"format": "parquet", "paths": [str(file.resolve()) for file in content]}
    frame = content if whole else content.head(0)
    frame.sink_ipc(path, compression="uncompressed", compat_level=pl.CompatLevel.oldest())
    return {"format": "arrow", "paths": [str(path)]}


def _raise_for(reply: dict[str, Any], limits: Limits) -> None:
    """Turn a failure's reply into the error it stands for."""
    kind = reply.get("kind")
    text = str(reply.get("message", ""))
    make: dict[str, Callable[[], CurateError]] = {
        "refused": lambda: UsageError(text),
        "sql": lambda: UsageError(_one_line(text)),
        "time": lambda: CurateError(
            f"the statement took longer than its {limits.timeout:g} s; narrow it, or give it a "
            "longer time limit"
        ),
        "memory": lambda: CurateError(
            f"the statement needed more than its {limits.memory >> 20} MiB of memory; narrow it, "
            "or give it a higher memory limit"
        ),
        "crash": lambda: CurateError(f"the process that runs SQL failed: {_one_line(text)}"),
    }
    if kind is not None:
        raise make[kind]()


def _one_line(message: str) -> str:
    """DuckDB's message without the excerpt of the statement, on one line."""
    text = message.split("\n\nLINE ")[0]
    return " ".join(text.replace("\n", " ").split())


def _answer(path: Path) -> pl.DataFrame:
    """The rows as a frame that no longer needs the file."""
    try:
        return pl.read_ipc(path.read_bytes())
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, ValueError) as error:
        raise UsageError(
            f"the answer has a column of a type that cannot be shown ({error}); cast it in the "
            "statement"
        ) from error


__all__ = ["Limits", "Part", "evaluate", "parse_bytes", "read", "run_tables", "sql"]
