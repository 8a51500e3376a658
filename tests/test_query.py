"""The SQL sandbox: what it reads, and everything it must refuse."""

from __future__ import annotations

import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from curate import atomic, query, sandboxed
from curate.errors import CurateError, UsageError
from curate.examplestore import ExampleStore
from curate.manifest import ShardEntry
from curate.query import Limits, Part, evaluate, parse_bytes, read, run_tables, sql
from curate.run import Run
from curate.rundir import RunDirectory
from tests.sketchedrun import make

FRAME = pl.DataFrame({"row": [0, 1, 2], "total": [3.0, None, 1.0], "source": ["a", "b", "a"]})
SMALL = Limits(memory=64 << 20, threads=1, timeout=2.0)


def ask(statement: str, limits: Limits | None = None, **options: object) -> pl.DataFrame:
    return read(statement, {"t": [Part(FRAME.lazy())]}, limits=limits, **options)  # type: ignore[arg-type]


def test_reads_frames_and_parquet_as_one_table(tmp_path: Path) -> None:
    """Parts of a table are joined by column name, with their constant columns, from any source."""
    FRAME.with_columns(extra=pl.lit(7)).write_parquet(tmp_path / "p.parquet")
    parts = [
        Part(FRAME.lazy(), (("query", "it's"),)),
        Part((tmp_path / "p.parquet",), (("query", "b"),)),
    ]
    found = read(
        "SELECT query, count(*) AS n, sum(extra) AS e FROM pieces GROUP BY query ORDER BY query",
        {"pieces": parts, "unused": [Part(FRAME.lazy())]},
        views={"twice": "SELECT * FROM pieces UNION ALL SELECT * FROM pieces"},
    )
    assert found.rows() == [("b", 3, 21), ("it's", 3, None)]


def test_parameters_nulls_and_reading_forms() -> None:
    """Parameters are bound, NULLs come back as nulls, and WITH, DESCRIBE, PIVOT ... IN all read."""
    assert ask("SELECT total FROM t WHERE row = ?", params=[1]).rows() == [(None,)]
    assert ask("SELECT row FROM t WHERE total > $low", params={"low": 2}).rows() == [(0,)]
    assert ask("WITH q AS (SELECT * FROM t) SELECT count(*) FROM Q").rows() == [(3,)]
    assert ask("DESCRIBE t")["column_name"].to_list() == FRAME.columns
    assert ask("PIVOT t ON source IN ('a', 'b') USING count(*)").height > 0


WRITES = [
    "COPY t TO 'stolen.csv'",
    "WITH c AS (COPY t TO 'stolen.csv') SELECT 1",
    "WITH c AS (INSERT INTO t VALUES (9, 9, 'x') RETURNING *) SELECT * FROM c",
    "WITH c AS (DELETE FROM t RETURNING *) SELECT * FROM c",
    "CREATE TABLE z (a INT)",
    "CREATE MACRO m() AS 1",
    "DROP VIEW t",
    "ALTER VIEW t RENAME TO z",
    "INSERT INTO t VALUES (9, 9, 'x')",
    "EXPORT DATABASE 'stolen'",
    "IMPORT DATABASE 'stolen'",
    "EXPLAIN ANALYZE SELECT 1",
    "ATTACH 'stolen.db'",
    "ATTACH ':memory:' AS other",
    "SET threads = 4",
    "RESET lock_configuration",
    "PRAGMA enable_profiling",
    "INSTALL httpfs",
    "LOAD httpfs",
    "CALL pragma_version()",
    "BEGIN",
    "PREPARE p AS SELECT 1",
    "VACUUM",
    "SELECT 1; SELECT 2",
    "SELECT 1; COPY t TO 'stolen.csv'",
    "",
]
READS = [
    "SELECT * FROM read_csv('{file}')",
    "SELECT * FROM '{file}'",
    'SELECT * FROM "{file}"',
    "SELECT * FROM read_text('/etc/passwd')",
    "SELECT (SELECT count(*) FROM glob('/*')) FROM t",
    "SELECT * FROM t WHERE row IN (SELECT 1 FROM read_parquet('{file}'))",
    "SELECT * FROM query('SELECT 1')",
    "SELECT * FROM query_table('{file}')",
    "SELECT * FROM json_execute_serialized_sql(json_serialize_sql('SELECT 1'))",
    "SELECT * FROM python_map_function(1)",
    "SELECT * FROM pandas_scan(1)",
    "SELECT * FROM sniff_csv('{file}')",
    "SELECT * FROM duckdb_settings()",
    "SELECT * FROM enable_logging()",
    "SELECT * FROM information_schema.tables",
    "SELECT * FROM FRAME",
    "SELECT getenv('HOME')",
    "SUMMARIZE SELECT * FROM read_csv('{file}')",
    "DESCRIBE '{file}'",
    "WITH RECURSIVE r AS (SELECT 1 UNION ALL (SELECT 2 FROM read_csv('{file}'))) SELECT * FROM r",
]


@pytest.mark.parametrize("statement", WRITES + READS)
def test_refuses_whatever_is_not_reading_its_tables(
    statement: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Statements that write, configure, load or reach a file are refused, in one line, by the
    check of the syntax tree alone, and leave no file behind.
    """
    monkeypatch.chdir(tmp_path)
    secret = tmp_path / "secret.csv"
    secret.write_text("a,b\n1,2\n")
    with pytest.raises(UsageError) as caught:
        admit(statement.replace("{file}", str(secret)))
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["secret.csv"]


def admit(statement: str) -> None:
    """Check a statement in this process as the sandbox does, then run it if it passes."""
    from curate import sandbox

    connection = duckdb.connect(":memory:")
    connection.register("t", FRAME.to_arrow())
    sandbox.lock(connection, {"spill": "", "threads": 1, "memory": 1 << 27, "timeout": 5})
    try:
        connection.execute(sandbox.admitted(connection, statement, ["t"]))
    except (sandbox.RefusedError, duckdb.Error) as error:
        raise UsageError(str(error).split("\n")[0]) from error


@pytest.mark.parametrize(
    "statement",
    ["COPY t TO '{out}'", "WITH c AS (COPY t TO '{out}') SELECT 1", "FROM read_text('/etc/passwd')",
     "SELECT getenv('HOME')", "SELECT * FROM sniff_csv('/etc/passwd')", "ATTACH '{out}'"],
)  # fmt: skip
def test_locked_connection_holds_without_the_tree_check(statement: str, tmp_path: Path) -> None:
    """The second fence holds alone: a locked connection refuses files to a statement that was
    never checked.
    """
    from curate import sandbox

    connection = duckdb.connect(":memory:")
    connection.register("t", FRAME.to_arrow())
    sandbox.lock(connection, {"spill": "", "threads": 1, "memory": 1 << 27, "timeout": 5})
    with pytest.raises(duckdb.Error):
        connection.execute(statement.replace("{out}", str(tmp_path / "out")))
    assert not list(tmp_path.iterdir())


def test_writing_is_refused_end_to_end(tmp_path: Path) -> None:
    """Through the whole path a COPY inside a WITH names what it is and writes nothing."""
    target = tmp_path / "stolen.csv"
    with pytest.raises(UsageError, match=r"only statements that read are run here.*COPY"):
        ask(f"WITH c AS (COPY t TO '{target}') SELECT 1")
    assert not target.exists()


def test_environment_is_not_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that runs SQL is started without the caller's environment."""
    monkeypatch.setenv("SOME_TOKEN", "hidden")
    seen: dict[str, Any] = {}
    start = subprocess.Popen

    def started(*arguments: Any, **options: Any) -> Any:
        seen.update(options)
        return start(*arguments, **options)

    monkeypatch.setattr(subprocess, "Popen", started)
    ask("SELECT 1")
    assert "PATH" in seen["env"] and "SOME_TOKEN" not in seen["env"]


def test_prepared_processes_belong_to_their_threads() -> None:
    """Each thread's statement runs in the process that it prepared, and ends no other's."""

    def asked(number: int) -> list[int]:
        found = []
        for turn in range(2):
            with sandboxed.prepared():
                time.sleep(0.02 * number)
                found += ask(f"SELECT {10 * number + turn} AS n")["n"].to_list()
        return found

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(asked, range(4))) == [[10 * n, 10 * n + 1] for n in range(4)]


def test_a_prepared_process_serves_the_next_statement_and_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One process for each statement, prepared or not, and none is left."""
    made: list[sandboxed.Sandbox] = []
    init = sandboxed.Sandbox.__init__

    def noted(self: sandboxed.Sandbox) -> None:
        init(self)
        made.append(self)

    monkeypatch.setattr(sandboxed.Sandbox, "__init__", noted)
    with sandboxed.prepared():
        assert len(made) == 1
        assert ask("SELECT 1 AS one")["one"].to_list() == [1]
        assert len(made) == 1
        ask("SELECT 2")
        assert len(made) == 2
    with pytest.raises(UsageError), sandboxed.prepared():  # not asked
        raise UsageError("something else")
    with pytest.raises(UsageError, match="parameter"):
        ask("SELECT ?", params=[object()])
    assert len(made) == 4
    with sandboxed.prepared(), sandboxed.prepared():
        ask("SELECT 1")
    assert len(made) == 5
    assert all(s._process.returncode is not None and not s.directory.exists() for s in made)


@pytest.mark.parametrize(
    ("statement", "text"),
    [
        ("SELECT count(*) FROM range(1000000000000) r(i) WHERE hash(i) % 7 = 9", "longer than its"),
        ("SELECT length(repeat('x', 3000000000))", "MiB of memory"),
        ("SELECT list_sum(range(400000000))", "MiB of memory"),
        ("SELECT * FROM range(100000000)", "larger than the memory limit"),
        ("SELECT string_agg(i::VARCHAR, ',') FROM range(100000000) r(i)", "MiB of memory"),
    ],
)
def test_time_and_memory_are_bounded(statement: str, text: str) -> None:
    """Endless, exploding and enormous answers end at the limits, with the limit and a remedy."""
    slow = replace(SMALL, timeout=120.0)  # so that memory, not a busy machine, ends the others
    with pytest.raises(CurateError, match=text):
        ask(statement, SMALL if "longer" in text else slow)


def test_mistakes_get_one_line() -> None:
    """A misspelt table, a misspelt column and broken SQL each give one line that helps."""
    cases = {
        "SELECT * FROM tt": "did you mean t",
        "SELECT totl FROM t": "total",
        "SELEC 1": "syntax error",
        "SHOW TABLES": "the tables are t;",
        "SELECT a.row, b.row FROM t a, t b": "several columns row",
        "PIVOT t ON source USING count(*)": "IN",
    }
    for statement, text in cases.items():
        with pytest.raises(UsageError, match=text) as caught:
            ask(statement)
        assert "\n" not in str(caught.value)


def test_what_cannot_be_shown_is_refused() -> None:
    """A column of a type that a frame cannot hold is one line that says to cast it."""
    with pytest.raises(UsageError, match="cast it in the statement"):
        ask("SELECT INTERVAL 1 DAY AS day")


def test_names_that_differ_in_case_only() -> None:
    """A user's column Loss and ours beside it: SQL does not tell cases apart, so one is renamed."""
    frames = {
        "rows": pl.LazyFrame({"row": [0], "Loss": ["x"], "loss_right": ["y"]}),
        "losses": pl.LazyFrame({"row": [0], "loss": [0.5]}),
    }
    connection = duckdb.connect(":memory:")
    for name, frame in frames.items():
        connection.register(name, frame.collect().to_arrow())
    statement = query._select((("side", "train"),), frames)
    found = connection.execute(f"{statement} UNION ALL BY NAME {statement}").fetchall()
    assert found == [("train", 0, "x", "y", 0.5)] * 2


def test_evaluate_keeps_order_and_nulls() -> None:
    """Expressions give one value per row in row order, NULL where SQL says so, windows included."""
    found = evaluate(FRAME, {"where": "total > 1", "by": "total - avg(total) OVER ()"})
    assert found.rows() == [(True, 1.0), (None, None), (False, -1.0)]


@pytest.mark.parametrize(
    "expression",
    ["1) AS a FROM frame WHERE (1=2", "1), (2", "sum(total)", "nothing", "1); DROP TABLE frame; --",
     "(SELECT count(*) FROM read_csv('/etc/passwd'))", "*"],
)  # fmt: skip
def test_evaluate_refuses_what_is_not_one_expression(expression: str) -> None:
    """Text that closes the bracket, aggregates, misspells or reaches a file is refused by name."""
    with pytest.raises(UsageError, match="expression"):
        evaluate(FRAME, {"by": expression})


def test_amounts_of_memory() -> None:
    """Decimal and binary units are read as written; nonsense and too little are refused."""
    assert parse_bytes("512MB") == 512_000_000
    assert parse_bytes("2 GiB") == 2 << 30
    for text in ("lots", "-1", "1kB"):
        with pytest.raises(UsageError):
            parse_bytes(text)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run with losses of its first 32 training rows, and a side table with a name of its own and
    one that is there already.
    """
    run = make(tmp_path_factory.mktemp("asked") / "run").run
    directory = run.sketches_directory("train", "a")
    for number, rows in enumerate([(0, 16), (16, 32)]):
        files = {}
        for name, kind in (("loss", np.float32), ("depth", np.int32)):
            path = directory / f"{name}-{number:05d}.npy"
            np.save(path, np.arange(*rows, dtype=kind) % 5 + 1)
            files[path.name] = atomic.sha256(path)
        run.add_shard(
            ShardEntry(set="train", checkpoint="a", kind="rows", number=number, rows=rows,
                       steps=4, files=files)
        )  # fmt: skip
    side = {"row": [1, 40], "leaks": [["q"], []], "topic": ["other", None]}
    run.add_side("train", "more", pl.DataFrame(side))
    return run


def test_examples_are_those_of_the_run(run: RunDirectory) -> None:
    """SQL sees the examples as the run's own table has them: every set, loss and steps, side
    columns, and a name that is there twice; however the statement names the columns.
    """
    expected = Run(run).examples.sort("set", "row")
    assert {"loss", "steps", "leaks", "topic_right"} <= set(expected.columns)
    assert expected["loss"].null_count() == 9 + 7
    found = sql(run, 'SELECT * FROM examples ORDER BY "set", "row"')
    assert found.columns[0] == "set"
    assert_frame_equal(found, expected, check_column_order=False)
    short = sql(run, "FROM (SELECT COLUMNS('row|loss|leaks|set') FROM examples) ORDER BY ALL")
    columns = ["set", "row", "loss", "leaks"]
    assert_frame_equal(short.select(columns).sort("set", "row"), expected.select(columns))
    assert sql(run, "SELECT count(loss), sum(steps) FROM examples").rows() == [
        (32, int(expected["steps"].sum()))
    ]


def test_examples_are_read_in_place(run: RunDirectory, tmp_path: Path) -> None:
    """The rows' own table is opened as it lies; what is written for the sandbox is the row, its
    loss and its steps.
    """
    request = query._request("SELECT * FROM examples", run_tables(run), {}, tmp_path)
    own = {name: files for name, files in request["files"].items() if "examples" in name}
    kinds = [files["format"] for files in own.values()]
    assert sorted(kinds) == ["arrow", "parquet", "parquet", "parquet"]
    (written,) = [files["paths"][0] for files in own.values() if files["format"] == "arrow"]
    assert pl.read_ipc(written).columns == ["row", "loss", "steps"]


def test_what_is_not_asked_for_is_not_read(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A statement that does not name the examples reads no losses."""

    def never(*_: object) -> None:
        raise AssertionError("the losses were read")

    monkeypatch.setattr(ExampleStore, "beside", never)
    assert sql(run, "SELECT count(*) FROM steps").rows() == [(4,)]
