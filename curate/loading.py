"""Examples read in a process of their own, so that what reading them takes goes with it.

`datasets` brings pandas and much else: 80 MiB that a process which goes on to sketch would keep,
and a tokenizer of `transformers` some hundred more.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from curate.errors import CurateError
from curate.examples import DataSpec, ExampleSet, Progress, load_examples, open_examples

_PDEATHSIG = 1  # prctl's PR_SET_PDEATHSIG
_LOOK_SECONDS = 0.2
_END_SECONDS = 5.0


class Loader:
    """A process that reads sets, one after another; a context manager, which ends it.

    It is of no further use once `load` was interrupted or said that it had ended.
    """

    def __init__(self) -> None:
        answers, theirs = os.pipe()  # not stdout, where libraries write as well
        paths = [path for path in sys.path if isinstance(path, str)]
        code = (
            "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); "
            f"sys.path[:] = {paths!r}; from curate.loading import main; "
            f"main({theirs}, {os.getpid()})"
        )
        self._answers = os.fdopen(answers, "rb")
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs,),
            )
        except BaseException:
            self._answers.close()
            raise
        finally:
            os.close(theirs)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._answers.close()
        with suppress(BrokenPipeError), self._process:  # closes the pipe and waits
            pass

    def load(
        self,
        spec: DataSpec,
        directory: Path,
        *,
        name: str,
        known_ids: Sequence[str] = (),
        progress: Progress | None = None,
    ) -> ExampleSet:
        """As `load_examples`, raising what it raises.

        Raises:
            CurateError: the process ended without an answer.
        """
        request = {
            "spec": spec,
            "directory": directory,
            "name": name,
            "known_ids": list(known_ids),
        }
        try:
            kind, value = self._asked(request, progress)
        except BaseException:
            self._process.kill()  # or the next set would get this one's answers
            raise
        if kind == "error":
            raise value
        return open_examples(directory)

    def _asked(self, request: dict[str, Any], progress: Progress | None) -> tuple[str, Any]:
        """The last answer to a request."""
        stream = self._process.stdin
        assert stream is not None
        try:
            pickle.dump(request, stream)
            stream.flush()
        except BrokenPipeError as cause:
            raise self._ended(request["name"]) from cause
        while True:
            try:
                kind, value = pickle.load(self._answers)
            except (EOFError, pickle.UnpicklingError) as cause:
                raise self._ended(request["name"]) from cause
            if kind != "progress":
                return kind, value
            if progress is not None:
                progress(*value)

    def _ended(self, name: str) -> CurateError:
        """What to say of a process that answers no more."""
        try:
            status = self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        why = ": killed, perhaps for memory" if status < 0 else ""
        return CurateError(f"the process that read set {name!r} ended with status {status}{why}")


def main(descriptor: int, parent: int) -> None:
    """Answer requests until there are no more: ("progress", …) …, ("done", None) or ("error", …).

    What libraries print goes to standard error, and they find nothing on standard input. The
    process does not outlive `parent`, the one that asks, which holds the lock of the directory that
    is written to.
    """
    _end_with(parent)
    answers, requests = os.fdopen(descriptor, "wb"), os.fdopen(os.dup(0), "rb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)

    def answer(kind: str, value: Any) -> None:
        pickle.dump((kind, value), answers)
        answers.flush()

    while True:
        try:
            request = pickle.load(requests)
        except EOFError:
            return
        try:
            load_examples(**request, progress=lambda done, of: answer("progress", (done, of)))
        except BrokenPipeError:
            return
        except Exception as error:  # whatever it is, it is raised where it was asked for
            answer("error", _portable(error))
        else:
            answer("done", None)


def _end_with(parent: int) -> None:
    """End this process as soon as its parent has ended; at once if it has already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL)

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_SECONDS)
        os._exit(1)

    if os.getppid() != parent:
        os._exit(1)
    if sys.platform != "linux":
        threading.Thread(target=look, daemon=True).start()


def _portable(error: Exception) -> Exception:
    """The error, with its trace as a note, or what it says where it cannot be sent."""
    error.add_note("".join(traceback.format_exception(error)).rstrip())
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # a class may refuse in any way it likes
        return CurateError(f"{type(error).__name__}: {error}")
    return error
