"""How a command ends from outside: a closed pipe, Ctrl-C, SIGTERM."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from curate.rundir import RunDirectory
from tests.test_cli import MODEL, ROOT, make


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """An empty run."""
    return RunDirectory.create(tmp_path / "empty").path


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def test_a_closed_pipe_is_no_failure(run: Path) -> None:
    """`curate sql … | head -1` exits 0 without a word on standard error."""
    statement = "select i, repeat('x', 200) as text from range(20000) t(i)"
    process = subprocess.Popen(
        [sys.executable, "-m", "curate.cli", "sql", str(run), statement, "--csv"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=60) == 0


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_a_signal_ends_a_run(tmp_path: Path, number: signal.Signals, code: int, word: str) -> None:
    """Ctrl-C and SIGTERM end it with a status of their own and a line: it can be resumed."""
    path = make(tmp_path, train="tiny.py:wait")
    slow = "\n\ndef wait(context):\n    import time\n    context.log('now')\n    time.sleep(60)\n"
    (tmp_path / "tiny.py").write_text(MODEL + slow)
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "curate.cli",
            "run",
            str(path),
            "--into",
            str(tmp_path / "run"),
            "--trust-code",
        ],
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    assert process.stderr is not None
    while "now" not in process.stderr.readline():
        assert process.poll() is None
    time.sleep(0.2)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert said.strip().endswith(f"{word}; nothing is lost: the same command continues")
    assert "Traceback" not in said


def test_a_terminated_statement_leaves_nothing(run: Path, tmp_path: Path) -> None:
    """After SIGTERM neither the process that runs SQL nor its directory is left."""
    there = tmp_path / "temporary"
    there.mkdir()
    statement = "select sum(a.i * b.i) from range(10000000) a(i), range(10000000) b(i)"
    process = subprocess.Popen(
        [sys.executable, "-m", "curate.cli", "sql", str(run), statement],
        stderr=subprocess.PIPE,
        env={**environment(), "TMPDIR": str(there)},
    )
    while not list(there.glob("curate-sql-*/*")):
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert not list(there.iterdir())


def test_sigterm_is_ours_only_while_a_command_runs(run: Path, tmp_path: Path) -> None:
    """A process forked within ends by the signal itself, one that ignores it goes on ignoring it,
    and a second one does not cut short what the first began.
    """
    code = """
import os, signal, sys, time
from curate import cli

def fork():
    child = os.fork()
    if child == 0:
        time.sleep(60)
    time.sleep(0.2)
    os.kill(child, signal.SIGTERM)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)

def twice():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
        print("unwound", flush=True)

def ignored():
    os.kill(os.getpid(), signal.SIGTERM)
    print("goes on", flush=True)

name = sys.argv[1]
if name == "ignored":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
cli.cli.main = lambda **_: globals()[name]()
sys.exit(cli.main([]))
"""
    expected = {"fork": (0, "-15"), "twice": (143, "unwound"), "ignored": (0, "goes on")}
    for name, (status, said) in expected.items():
        done = subprocess.run(
            [sys.executable, "-c", code, name],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stdout.strip()) == (status, said), done.stderr
        assert "Traceback" not in done.stderr
