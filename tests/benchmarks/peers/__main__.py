"""Other libraries on one Linear called three times: which crash, which are wrong, and by how much.

    python -m tests.benchmarks.peers [--cache DIR] [--only NAME ...] [--write] [--pip OPTION ...]

Each library gets a virtual environment of its own in the cache (a temporary directory unless named;
about 1 GB each), the torch of constraints.txt and its pinned version, and a driver that uses its
public interface (`with_*.py`). This project is in none of these environments: the published package
has the same import name. `--pip` passes an option to pip, such as an index with CPU builds of
torch. `--write` keeps the table in PEERS.md and the verdicts in PEERS.json beside this package.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

from tests.benchmarks.peers.roster import OURS, PEERS, ROOT, Peer, torch_requirement
from tests.benchmarks.peers.table import page

HERE = Path(__file__).parent
LIMIT = 900  # seconds for one driver


def environment(peer: Peer, cache: Path, options: list[str]) -> Path:
    """The interpreter of the peer's environment, installed unless it already was.

    Raises:
        subprocess.CalledProcessError: if pip fails; its `stderr` says why.
    """
    folder = cache / peer.name
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    ready, wanted = folder / "installed.txt", f"{torch_requirement()} {peer.requirement}"
    if ready.exists() and ready.read_text() == wanted:
        return python
    venv.create(folder, clear=True, with_pip=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    install = [
        *pip,
        "install",
        "--quiet",
        "--no-compile",
        *options,
        torch_requirement(),
        peer.requirement,
    ]
    subprocess.run(install, check=True, capture_output=True, text=True)
    if peer.drop:
        remove = [*pip, "uninstall", "--quiet", "--yes", *peer.drop]
        subprocess.run(remove, check=True, capture_output=True, text=True)
    ready.write_text(wanted)
    return python


def run(peer: Peer, python: Path, path: str = "") -> list[dict[str, Any]]:
    """The driver's verdicts; one that says so where it ended without any."""
    surroundings = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    surroundings |= {"PYTHONNOUSERSITE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    surroundings |= {"HF_HUB_OFFLINE": "1"} | ({"PYTHONPATH": path} if path else {})
    with tempfile.TemporaryDirectory() as folder:  # some libraries write where they stand
        try:
            done = subprocess.run(
                [str(python), str(HERE / peer.driver)], env=surroundings, cwd=folder, text=True,
                capture_output=True, timeout=LIMIT, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return [failure("crash", f"no answer within {LIMIT} s")]
    try:
        verdicts: list[dict[str, Any]] = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        return [failure("crash", last_line(done.stderr))]
    return verdicts


def failure(status: str, message: str) -> dict[str, Any]:
    """A verdict on a library that could not be asked."""
    return {
        "way": "-", "case": "-", "status": status, "error": None, "steps": None, "expected": 0.0,
        "message": message, "note": "", "versions": {},
    }  # fmt: skip


def last_line(text: str) -> str:
    """The last line that says something, without addresses and paths."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no output"]
    return re.sub(r"\w+://\S+|(?<![\w.])/\S+", "…", errors[-1])


def ask(peer: Peer, cache: Path, options: list[str]) -> list[dict[str, Any]]:
    """Install and run one peer; every verdict says whose it is."""
    print(f"{peer.name} …", file=sys.stderr, flush=True)  # noqa: T201
    if peer is OURS:
        verdicts = run(peer, Path(sys.executable), str(ROOT))
    else:
        try:
            verdicts = run(peer, environment(peer, cache, options))
        except subprocess.CalledProcessError as problem:
            verdicts = [failure("not installed", last_line(problem.stderr))]
    version = peer.version or ("checkout" if peer is OURS else torch_requirement().split("==")[1])
    for verdict in verdicts:
        verdict["message"] = re.sub(r"(?<![\w.])/\S+", "…", verdict["message"])
    return [{"peer": peer.name, "version": version, **verdict} for verdict in verdicts]


def main() -> None:
    """Ask them all, print the table, keep it where that is wanted."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.peers")
    parser.add_argument("--cache", type=Path, help="where the environments are kept")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these libraries only")
    parser.add_argument("--write", action="store_true", help="write PEERS.md and PEERS.json")
    parser.add_argument("--pip", action="append", default=[], metavar="OPTION")
    arguments = parser.parse_args()
    if arguments.write and arguments.only:
        parser.error("--write keeps the whole table: leave out --only")
    chosen = [p for p in (OURS, *PEERS) if not arguments.only or p.name in arguments.only]
    if not chosen:
        parser.error(f"--only {arguments.only}: expected {[p.name for p in (OURS, *PEERS)]}")
    with tempfile.TemporaryDirectory() as temporary:
        cache = (arguments.cache or Path(temporary)).absolute()
        verdicts = [v for peer in chosen for v in ask(peer, cache, arguments.pip)]
    text = page(verdicts, torch_requirement())
    print(text)  # noqa: T201
    if arguments.write:
        (HERE.parent / "PEERS.md").write_text(text)
        (HERE.parent / "PEERS.json").write_text(json.dumps(verdicts, indent=1) + "\n")


if __name__ == "__main__":
    main()
