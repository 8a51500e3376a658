"""Worker processes: started, asked, watched while they answer, and dismissed."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.benchmarks import memory
from tests.benchmarks.peers.__main__ import environment, last_line
from tests.benchmarks.peers.roster import PEERS, ROOT

WORKERS = Path(__file__).parent / "workers"
LOOK = 0.005  # seconds between two looks at a worker's memory
PUBLISHED, BERGSON = "step-decomposed-influence", "bergson"


class WorkerError(Exception):
    """A worker's exception, or its end."""


@dataclass(frozen=True)
class Shop:
    """Where workers come from.

    Attributes:
        cache: folder of the other libraries' environments.
        pip: options for pip, where one has to be made.
        threads: that every worker computes with.
        keeps: whether glibc keeps freed memory rather than give it back to the system. By default
            it gives large blocks back, and passes that allocate many of them spend up to half
            their seconds, now more and now less, on getting zeroed pages again.
    """

    cache: Path
    pip: tuple[str, ...] = ()
    threads: int = os.cpu_count() or 1
    keeps: bool = False

    def python(self, library: str | None) -> Path:
        """The interpreter that has the library; this one has ours."""
        if library is None:
            return Path(sys.executable)
        peer = next(peer for peer in PEERS if peer.name == library)
        return environment(peer, self.cache, list(self.pip))

    def with_package(self, library: str, package: str) -> Path:
        """As `python`, with one more package, at the version of constraints.txt."""
        python = self.python(library)
        pinned = next(
            line
            for line in (ROOT / "constraints.txt").read_text().splitlines()
            if line.startswith(f"{package}==")
        )
        known = subprocess.run([str(python), "-c", f"import {package}"], capture_output=True)
        if known.returncode:
            command = [str(python), "-m", "pip", "install", "--quiet", *self.pip, pinned]
            subprocess.run(command, check=True, capture_output=True, text=True)
        return python

    def surroundings(self, library: str | None) -> dict[str, str]:
        """A worker's environment variables.

        OpenMP is left as it is: its threads spin for some milliseconds after their work and then
        sleep, so that an idle worker takes no core (measured). Told to sleep at once
        (OMP_WAIT_POLICY=passive), a training step at d128 took 1.3 times as long.
        """
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "OMP", "GOMP"))}
        ours = {} if library else {"PYTHONPATH": str(ROOT)}
        if self.keeps:
            ours |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
        return kept | ours | {
            "PYTHONNOUSERSITE": "1",
            "OMP_NUM_THREADS": str(self.threads),
            "NUMBA_NUM_THREADS": str(self.threads),
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
        }  # fmt: skip


@dataclass
class Worker:
    """One process; `peak` is the most anonymous memory seen while it answered, in bytes."""

    shop: Shop
    script: str
    library: str | None = None
    peak: int = 0
    process: subprocess.Popen[str] = field(init=False)

    def __post_init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()  # some libraries write where they stand
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by `dismiss`
        ours, theirs = os.pipe()  # not stdout, where libraries write as well
        self._replies = os.fdopen(ours)
        command = [self.shop.python(self.library), WORKERS / self.script, theirs]
        self.process = subprocess.Popen(
            [str(part) for part in command], env=self.shop.surroundings(self.library),
            cwd=self._folder.name, text=True, pass_fds=(theirs,),
            stdin=subprocess.PIPE, stdout=self._said, stderr=self._said,
        )  # fmt: skip
        os.close(theirs)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.dismiss()

    def tell(self, do: str, **arguments: Any) -> None:
        """Send a request; `answer` waits for its reply."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(self._last_words()) from None

    def answer(self) -> dict[str, Any]:
        """The reply to the last request.

        Raises:
            WorkerError: with the worker's exception, or what it said last if it ended.
        """
        while not select.select([self._replies], [], [], LOOK)[0]:
            self.look()
        self.look()
        line = self._replies.readline()
        if not line:
            raise WorkerError(self._last_words())
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise WorkerError(f"{self.script}: {reply['error']}")
        return reply

    def look(self) -> None:
        """Take note of the worker's memory."""
        self.peak = max(self.peak, anonymous(self.process.pid))

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send a request and wait for the reply."""
        self.tell(do, **arguments)
        return self.answer()

    def dismiss(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self._replies, self._said):
            stream.close()
        self._folder.cleanup()

    def _last_words(self) -> str:
        code = self.process.wait()
        self._said.seek(0)
        return f"{self.script} ended with status {code}: {last_line(self._said.read())}"


def anonymous(pid: int) -> int:
    """Anonymous resident memory of a process and of those its main thread started, in bytes.

    Whoever is gone has none.
    """
    total = 0
    with suppress(OSError):
        total = memory.anonymous(pid) * 1024
        started = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        total += sum(anonymous(int(child)) for child in started)
    return total
