"""The command line: what it prints where, its exit statuses, and a recipe from end to end."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml

from curate import cli, doctor
from curate.cli import VERBS, main
from curate.console import Console, Output, cell, clock, emit, progress_line
from curate.errors import CheckFailed, UsageError

ROOT = Path(__file__).resolve().parent.parent
MODEL = """
import torch

from torch import nn


class Tiny(nn.Module):
    def __init__(self, width, depth):
        super().__init__()
        self.token, self.depth = nn.Embedding(259, width), depth
        self.body, self.head = nn.Linear(width, width), nn.Linear(width, 259)

    def forward(self, input_ids):
        hidden = given = self.token(input_ids)
        for _ in range(self.depth):
            hidden = torch.tanh(self.body(hidden)) + given
        return self.head(hidden)


def build(width=8, depth=3):
    torch.manual_seed(0)
    return Tiny(width, depth)


def train(context, rate):
    from safetensors.torch import save_file

    folder = context.run / "checkpoints"
    folder.mkdir(exist_ok=True)
    save_file(context.model().state_dict(), folder / "step-1.safetensors")
    context.log(f"rate {rate}")


def compare(context):
    import polars

    return {"a small comparison": polars.DataFrame({"trained on": ["curated"], "loss": [1.5]})}
"""


def recipe(**more: Any) -> dict[str, Any]:
    return {
        "name": "tiny",
        "model": {"source": "tiny.py:build", "args": {"depth": 3}},
        "loop": {"body": "body"},
        "checkpoints": {"path": "{run}/checkpoints/*.safetensors", "weight": 0.1},
        "data": {
            "defaults": {"text": "text", "source": "kind", "id": "id"},
            "train": "train.jsonl",
            "query": {"like": "train", "path": "query.jsonl"},
        },
        "train": {"call": "tiny.py:train", "args": {"rate": 0.1}},
        "sketch": {"dim": 64, "budget_tokens": 128},
        "score": {"query": "query"},
        "filter": {"query": "query", "top": 4},
        "reweight": {"method": "rank"},
        "export": {"directory": "{run}/export"},
        "compare": "tiny.py:compare",
        **more,
    }


def rows(count: int, prefix: str) -> str:
    lines = [
        {"id": f"{prefix}-{n}", "text": f"{prefix} {n} plus {n * 7 % 5}", "kind": "ab"[n % 2]}
        for n in range(count)
    ]
    return "".join(json.dumps(line) + "\n" for line in lines)


def make(folder: Path, **more: Any) -> Path:
    (folder / "tiny.py").write_text(MODEL)
    (folder / "train.jsonl").write_text(rows(12, "train"))
    (folder / "query.jsonl").write_text(rows(3, "query"))
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe(**more)))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that a recipe with code of its own made, through the command line."""
    folder = tmp_path_factory.mktemp("tiny")
    path = folder / "run"
    assert main(["run", str(make(folder)), "--into", str(path), "--trust-code", "-q"]) == 0
    return path


def ask(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Any:
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path, status: int = 2) -> str:
    capsys.readouterr()
    assert main([*map(str, arguments)]) == status
    seen = capsys.readouterr()
    assert seen.out == ""
    said = seen.err.lstrip("\n")  # click ends the line of a ^C
    assert said.startswith("curate: ")
    assert said.count("\n") == 1
    return said


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`curate VERB --help` works for every verb and describes each of its options."""
    assert main([verb, "--help"]) == 0
    assert f"Usage: curate {verb}" in capsys.readouterr().out
    command = cli.cli.get_command(None, verb)  # type: ignore[arg-type]
    assert command is not None
    assert command.help


def test_a_recipe_from_end_to_end(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A recipe leaves a run whose tables every verb can be asked about, and an exported dataset."""
    state = ask(capsys, "status", run)
    assert {"what": "set", "name": "train", "state": "12 rows, train"} in state
    assert {"what": "selection", "name": "curated", "state": "4 of 12 rows kept"} in state
    ranked = ask(capsys, "rank", run, "query", "--by", "late", "--top", "3")
    assert [row["rank"] for row in ranked] == [1, 2, 3]
    counted = ask(capsys, "sql", run, "select count(*) as n from decisions where kept")
    assert counted == [{"n": 4}]
    assert {row["verdict"] for row in ask(capsys, "doctor", run)} <= {"ok", "note"}
    exported = pl.read_parquet(run / "export" / "data" / "*.parquet")
    assert exported.height == 4
    assert exported["weight"].mean() == pytest.approx(1)


def test_a_second_run_does_nothing_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Running the recipe of a finished run skips its steps, prints its tables, keeps its files."""
    before = {path: path.stat().st_mtime_ns for path in (run / "sketches").rglob("*.npy")}
    folder = run.parent
    assert main(["run", str(folder / "tiny.yaml"), "--into", str(run), "--trust-code"]) == 0
    seen = capsys.readouterr()
    assert "train: done before" in seen.err
    assert "nothing was missing" in seen.err
    assert "a small comparison" in seen.out
    assert {p: p.stat().st_mtime_ns for p in (run / "sketches").rglob("*.npy")} == before


def test_changed_settings_replace_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A recipe changed under results that exist says how to do the step again, and stops."""
    changed = ["run", str(run.parent / "tiny.yaml"), "--into", str(run), "--trust-code", "-q"]
    message = refused(capsys, *changed, "--set", "filter.top=5")
    assert "step filter was done with other settings; redo it with --from filter" in message
    plan = ask(capsys, *changed, "--set", "filter.top=5", "--dry-run")
    assert {row["step"]: row["state"] for row in plan}["filter"] == "changed"


def test_from_does_a_step_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--from STEP makes that step and those after it again, with the new settings."""
    path, into = make(tmp_path), tmp_path / "run"
    start = ["run", str(path), "--into", str(into), "--trust-code", "-q"]
    assert main(start) == 0
    assert main([*start, "--set", "filter.top=5", "--from", "filter"]) == 0
    kept = ask(capsys, "sql", into, "select count(*) as n from decisions where kept")
    assert kept == [{"n": 5}]
    assert pl.read_parquet(into / "export" / "data" / "*.parquet").height == 5


def test_a_new_query_set_is_added(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`curate sketch --set data.NAME=FILE` and `curate score` add a query set to a run."""
    path, into = make(tmp_path, steps=["train", "sketch"]), tmp_path / "run"
    assert main(["run", str(path), "--into", str(into), "--trust-code", "-q"]) == 0
    (tmp_path / "more.jsonl").write_text(rows(2, "more"))
    more = f"data.more={tmp_path / 'more.jsonl'}"
    assert main(["sketch", str(into), "--set", more, "--trust-code", "-q"]) == 0
    table = ask(capsys, "score", into, "more", "-q")
    assert [row["query"] for row in table] == ["more"]


def test_code_is_not_run_without_trust(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A recipe with code of its own stops before anything is made, unless --trust-code is given."""
    path, into = make(tmp_path), tmp_path / "run"
    assert "--trust-code" in refused(capsys, "run", path, "--into", into)
    assert not into.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["skech"], "did you mean 'sketch'?"),
        (["run", "no-such-recipe"], "no recipe 'no-such-recipe'"),
        (["run", "tiny.yaml", "--set", "sketch.dims=4"], "did you mean 'dim'?"),
        (["run", "tiny.yaml", "--trust-code", "--from", "skore"], "did you mean 'score'?"),
        (["rank", "no-such-run"], "does not exist"),
        (["neighbours", ".", "--step", "1"], "--row and --id"),
        (["sql", ".", "select 1", "--json", "--csv"], "exclude each other"),
    ],
)
def test_wrong_usage(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    run: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wrong usage is exit status 2 and one line that says what would be right."""
    make(tmp_path)
    monkeypatch.chdir(run if "." in arguments else tmp_path)
    assert said in refused(capsys, *arguments)


def test_errors_keep_their_exit_status(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed check is 3, a failure 1, an interrupt 130, and none of them is a traceback."""

    def raising(error: BaseException) -> Any:
        def status(path: Path) -> pl.DataFrame:
            raise error

        return status

    for error, code in (
        (CheckFailed("a sum differs"), 3),
        (RuntimeError("two\nlines"), 1),
        (OSError("no space left"), 1),
        (KeyboardInterrupt(), 130),
    ):
        monkeypatch.setattr("curate.status.status", raising(error))
        refused_line = refused(capsys, "status", run, status=code)
        assert "Traceback" not in refused_line


def test_damage_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`curate doctor RUN` names a file whose contents changed, with exit status 3."""
    path, into = make(tmp_path, steps=["train", "sketch"]), tmp_path / "run"
    assert main(["run", str(path), "--into", str(into), "--trust-code", "-q"]) == 0
    shard = next(iter(sorted((into / "sketches").rglob("*.npy"))))
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    capsys.readouterr()
    assert main(["doctor", str(into)]) == 3
    assert shard.name in capsys.readouterr().err


def test_doctor_checks_a_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`curate doctor file.py:callable` finds the loop and checks step gradients of two rows."""
    make(tmp_path)
    monkeypatch.chdir(tmp_path)
    found = ask(capsys, "doctor", "tiny.py:build", "--trust-code", "--arg", "depth=4")
    assert any(row["check"] == "loop body" and "4 times" in row["detail"] for row in found)
    assert any(row["check"] == "self-check" and row["verdict"] == "ok" for row in found)


def test_two_faiss_are_one_too_many() -> None:
    """faiss-cpu and faiss-gpu own the same module; having both is said to be bad."""
    both = doctor.faiss_finding({"faiss-cpu": "1.15", "faiss-gpu-cu12": "1.15"})
    assert both.verdict == "bad"
    assert doctor.faiss_finding({"faiss-cpu": "1.15"}).verdict == "ok"


def test_formats(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same table as JSON, CSV and Parquet; a file that exists is not overwritten unasked."""
    query = "select 1 as one, [2, 3] as list"
    assert ask(capsys, "sql", run, query) == [{"one": 1, "list": [2, 3]}]
    assert main(["sql", str(run), query, "--csv"]) == 0
    assert capsys.readouterr().out == 'one,list\n1,"[2, 3]"\n'
    file = tmp_path / "answer.parquet"
    for options, status in (([], 0), ([], 2), (["--overwrite"], 0)):
        assert main(["sql", str(run), query, "--parquet", str(file), *options]) == status
    assert pl.read_parquet(file)["one"].to_list() == [1]
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO("select 5 as five"))
    assert ask(capsys, "sql", run, "-") == [{"five": 5}]


def test_printed_cells() -> None:
    """Numbers have four digits, absent values a dash, text is on one line; times read as clocks."""
    values = [None, True, 0.123456, float("nan"), [1, 2.0], "two\nlines"]
    assert [cell(value) for value in values] == ["–", "yes", "0.1235", "–", "1, 2", "two lines"]
    assert (clock(75), clock(3725)) == ("1:15", "1:02:05")


def test_the_eta_counts_only_what_this_process_did() -> None:
    """What an earlier process had done is in the share that is done, but not in the speed."""
    line = progress_line("sketch", 600, 1000, gained=100, seconds=10)
    assert line == "sketch  600/1,000 (60%)  0:10, 0:40 left"
    assert progress_line("sketch", 500, 1000, gained=0, seconds=0.0).endswith("0:00")


def test_progress_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    """Progress and log lines never mix with data; quiet silences them."""
    console = Console()
    console.progress("read", 1, 2)
    console.log("a line")
    Console(quiet=True).log("nothing")
    emit(pl.DataFrame({"a": [1]}), Output("csv"))
    seen = capsys.readouterr()
    assert seen.out == "a\n1\n"
    assert "1/2 (50%)" in seen.err
    assert "nothing" not in seen.err


def test_parquet_needs_overwrite(tmp_path: Path) -> None:
    """A table is not written over a Parquet file that is there."""
    output = Output("parquet", tmp_path / "t.parquet")
    emit(pl.DataFrame({"a": [1]}), output)
    with pytest.raises(UsageError, match="--overwrite"):
        emit(pl.DataFrame({"a": [2]}), output)
