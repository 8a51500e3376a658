"""The process in which SQL runs, from outside: started early, asked once, ended.

Starting takes as long as the statement, a third of a second of imports. So whoever knows that there
will be a statement says so (`prepared`) before he reads what it is about.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from curate.errors import UsageError

START_SECONDS = 20.0  # allowed for starting the process, on top of the statement's own time
_KEPT_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONPATH", "SYSTEMROOT")
_ready: ContextVar[list[Sandbox]] = ContextVar("processes that no statement has taken")


class Sandbox:
    """One process of `curate.sandbox` and the directory that it has to itself.

    Attributes:
        directory: for the files of the request and of the answer; gone when this is closed.
    """

    def __init__(self) -> None:
        self._files = TemporaryDirectory(prefix="curate-sql-")
        self.directory = Path(self._files.name)
        environment = {key: os.environ[key] for key in _KEPT_ENVIRONMENT if key in os.environ}
        private = {"HOME": self._files.name, "TMPDIR": self._files.name}
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(Path(__file__).with_name("sandbox.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=self._files.name,
                env=environment | private,
            )
        except BaseException:
            self._files.cleanup()
            raise

    def ask(self, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        """The reply; a process that was killed, died or took too long replies by how it ended.

        Raises UsageError where a parameter of the statement is of no type that JSON has.
        """
        try:
            text = json.dumps(request)
        except TypeError as error:
            raise UsageError(f"a parameter is not a number, text, list or null: {error}") from error
        try:
            out, err = self._process.communicate(text, timeout + START_SECONDS)
        except subprocess.TimeoutExpired:
            return {"kind": "time", "message": ""}
        try:
            reply: dict[str, Any] = json.loads(out)
        except ValueError:
            killed = self._process.returncode < 0 or "bad_alloc" in err
            return {"kind": "memory" if killed else "crash", "message": err.strip()[-300:]}
        return reply

    def close(self) -> None:
        """End the process, whatever it does, and drop its directory."""
        self._process.kill()
        with self._process:  # closes the pipes and waits
            pass
        self._files.cleanup()


@contextmanager
def prepared() -> Iterator[None]:
    """Within, in this thread, the next statement finds its process started; once is enough."""
    if _ready.get([]):
        yield
        return
    mine = [Sandbox()]
    token = _ready.set(mine)
    try:
        yield
    finally:
        _ready.reset(token)
        for process in mine:  # who takes it ends it
            process.close()


@contextmanager
def sandbox() -> Iterator[Sandbox]:
    """A process for one statement: one that is prepared, or a new one."""
    try:
        found = _ready.get([]).pop()
    except IndexError:
        found = Sandbox()
    try:
        yield found
    finally:
        found.close()
