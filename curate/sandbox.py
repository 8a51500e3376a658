"""The process in which a user's SQL runs; started by `curate.query`, never imported by it.

Why a process of its own: DuckDB's memory limit counts its buffers and its time limit is looked at
between chunks. `repeat('x', 3000000000)` or `list_sum(range(200000000))` is one chunk: measured,
the first took 6 GB and the second a minute under limits of 64 MB and 3 s. A process can be given a
limit by the system, and killed. It imports DuckDB and Arrow only and inherits no environment.

Three fences, each of which would do for the attacks we know. (1) The statement's syntax tree may
hold reading nodes only: a `COPY` inside a `WITH` parses as a SELECT, and DuckDB lets it write to
the temporary directory even with external access off; tables and table functions come from a list
of what is allowed. (2) The connection is in memory, without external access, extensions or
replacement scans, and its configuration is locked. (3) The limits of the process.

Reads one JSON request on standard input, writes one JSON reply on standard output and, if all is
well, the rows as an Arrow IPC file. What it gives up: about 0.3 s for each statement.
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class NoPandas:
    """Arrow imports pandas where it finds it: a quarter of a second that nothing here needs."""

    @staticmethod
    def find_spec(name: str, *_: object) -> None:
        """Nothing for anybody, and no pandas."""
        if name == "pandas":
            raise ModuleNotFoundError("pandas is not used in the sandbox", name=name)


if __name__ == "__main__":  # a process that only reads this file keeps its pandas
    sys.meta_path.insert(0, NoPandas)

import duckdb  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.dataset as arrow_dataset  # noqa: E402

SLACK = 1 << 30  # bytes beside DuckDB's own buffers: Arrow batches, threads, the interpreter
READING_NODES = {"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE"}
TABLE_FUNCTIONS = {"range", "generate_series", "unnest", "json_each"}


class RefusedError(Exception):
    """A statement that does more than read the tables it was given."""


def main() -> None:
    """Serve one request; DuckDB is opened before it is read, since it may be a while coming."""
    try:
        # One thread, so that no stacks of others count as this process's own; see `lock`.
        connection = duckdb.connect(":memory:", config={"threads": 1})
        request = json.load(sys.stdin)
        limit_process(request["memory"], request["timeout"])
        reply: dict[str, Any] = {"rows": serve(connection, request)}
    except RefusedError as error:
        reply = {"kind": "refused", "message": str(error)}
    except duckdb.InterruptException:
        reply = {"kind": "time", "message": ""}
    except (duckdb.OutOfMemoryException, MemoryError, pa.ArrowMemoryError):
        reply = {"kind": "memory", "message": ""}
    except (duckdb.Error, pa.ArrowException) as error:
        reply = {"kind": "sql", "message": str(error)}
    json.dump(reply, sys.stdout)


def limit_process(memory: int, timeout: float) -> None:
    """Bound the anonymous memory, processor time and core dumps of this process, where possible."""
    try:
        import resource
    except ImportError:  # no such limits on Windows; the parent's kill remains
        return
    own = _own_data()
    for name, value in (
        ("RLIMIT_DATA", own + memory + SLACK),
        ("RLIMIT_CPU", int(timeout * 64) + 60),
        ("RLIMIT_CORE", 0),
    ):
        try:
            hard = resource.getrlimit(getattr(resource, name))[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(getattr(resource, name), (value, value))
        except (ValueError, OSError, AttributeError):
            continue


def _own_data() -> int:
    """Bytes of data segment that this process has before any SQL; 256 MiB where it cannot say."""
    try:
        with Path("/proc/self/status").open() as status:
            return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData"))
    except (OSError, StopIteration):
        return 1 << 28


def serve(connection: Any, request: dict[str, Any]) -> int:
    """Run the request's statement, write its rows to `out` and return how many there are."""
    for name, files in request["files"].items():
        connection.register(name, opened(files))
    for view in request["views"]:
        connection.execute(view)
    lock(connection, request)
    statement = admitted(connection, request["statement"], request["tables"])
    result = connection.execute(statement, request["params"] or None)
    return write(result.to_arrow_reader(65_536), request["out"], request["memory"])


def opened(files: dict[str, Any]) -> Any:
    """The Arrow dataset over Parquet or Arrow files, memory-mapped where they can be."""
    if files["format"] == "arrow":
        return pa.ipc.open_file(pa.memory_map(files["paths"][0])).read_all()
    return arrow_dataset.dataset(files["paths"], format="parquet")


def lock(connection: Any, request: dict[str, Any]) -> None:
    """Close every way out of the connection, then lock its settings."""
    spill = str(request["spill"]).replace("'", "''")
    for setting in (
        "autoinstall_known_extensions = false",
        "autoload_known_extensions = false",
        "allow_community_extensions = false",
        "allow_persistent_secrets = false",
        "python_enable_replacements = false",
        f"threads = {int(request['threads'])}",
        f"memory_limit = '{int(request['memory'])}B'",
        f"temp_directory = '{spill}'",
        f"max_execution_time = {max(1, int(request['timeout'] * 1000))}",
        f"max_temp_directory_size = '{4 * int(request['memory'])}B'",
        "enable_external_access = false",
        "lock_configuration = true",
    ):
        connection.execute(f"SET {setting}")


def admitted(connection: Any, text: str, tables: list[str]) -> Any:
    """The one statement in `text`, if all it does is read `tables`. Raises RefusedError."""
    statements = connection.extract_statements(text)
    if len(statements) != 1:
        raise RefusedError(f"one statement expected, {len(statements)} seen; run them one by one")
    kind = statements[0].type
    if kind == duckdb.StatementType.MULTI:
        raise RefusedError(
            "PIVOT needs its values spelled out here: PIVOT ... ON column IN (a, b, ...)"
        )
    if kind != duckdb.StatementType.SELECT:
        raise RefusedError(f"only statements that read are run here, this one is {kind.name}")
    tree = syntax_tree(connection, statements[0].query)
    names = set(tables) | {name for node in nodes(tree) for name in defined(node)}
    for node in nodes(tree):
        check(node, names)
    return statements[0]


def syntax_tree(connection: Any, text: str) -> Any:
    """The parsed statement as DuckDB serialises it. Raises RefusedError where it cannot."""
    serialised = connection.execute("SELECT json_serialize_sql(?::VARCHAR)", [text]).fetchone()[0]
    try:
        tree = json.loads(serialised)
    except RecursionError:
        raise RefusedError("the statement is nested too deeply; take it apart with WITH") from None
    if tree.get("error"):
        raise RefusedError(f"the statement cannot be checked: {tree.get('error_message')}")
    return tree


def nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """Every mapping in a syntax tree; by a stack, since trees may be deep."""
    stack = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, dict):
            yield node
            stack.extend(node.values())
        elif isinstance(node, list):
            stack.extend(node)


def defined(node: dict[str, Any]) -> Iterator[str]:
    """Names that a WITH at this node defines."""
    entries = node.get("map")
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, dict) and isinstance(entry.get("key"), str):
            yield entry["key"]


def check(node: dict[str, Any], names: set[str]) -> None:
    """Refuse a node that writes, or that reads what is not in `names`."""
    kind = node.get("type")
    if isinstance(kind, str) and kind.endswith("_NODE") and kind not in READING_NODES:
        verb = kind.removesuffix("_NODE").removesuffix("_QUERY")
        raise RefusedError(f"only statements that read are run here, this one holds a {verb}")
    if kind == "TABLE_FUNCTION":
        function = (node.get("function") or {}).get("function_name", "").lower()
        if function not in TABLE_FUNCTIONS:
            allowed = ", ".join(sorted(TABLE_FUNCTIONS))
            raise RefusedError(
                f"the table function {function}() is not available; there are {allowed}"
            )
    if kind == "BASE_TABLE":
        check_table(node, names)
    if kind == "SHOW_REF" and node.get("query") is None:
        raise RefusedError(
            f"the tables are {', '.join(sorted(names))}; DESCRIBE one for its columns"
        )


def check_table(node: dict[str, Any], names: set[str]) -> None:
    """Refuse a table that was not given to this process: a file, a catalogue, a misspelling."""
    path = (node.get("qualified_name") or {}).get("path") or [node.get("table_name")]
    known = {name.lower() for name in names}
    if len(path) == 1 and str(path[0]).lower() in known:
        return
    wanted = ".".join(map(str, path))
    near = difflib.get_close_matches(wanted.lower(), sorted(known), n=1)
    hint = f", did you mean {near[0]}?" if near else ""
    raise RefusedError(f"there is no table {wanted!r}{hint} (there are {', '.join(sorted(known))})")


def write(reader: Any, path: str, limit: int) -> int:
    """Write the batches of `reader` to an Arrow file of at most `limit` bytes; returns rows."""
    rows = size = 0
    named = reader.schema.names
    twice = sorted({name for name in named if named.count(name) > 1})
    if twice:
        raise RefusedError(
            f"the answer has several columns {', '.join(twice)}; rename them with AS"
        )
    with pa.ipc.new_file(path, reader.schema) as sink:
        for batch in reader:
            rows, size = rows + batch.num_rows, size + batch.nbytes
            if size > limit:
                raise RefusedError(
                    f"the answer is larger than the memory limit ({limit >> 20} MiB); "
                    "aggregate, add a LIMIT, or raise the limit"
                )
            sink.write_batch(batch)
    return rows


if __name__ == "__main__":
    main()
