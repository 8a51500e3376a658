"""`tests.benchmarks.gpu` as a whole, small, so that it works when a GPU is there for once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.benchmarks import gpu

ROOT = Path(__file__).resolve().parent.parent


def ran(*words: str) -> subprocess.CompletedProcess[str]:
    """The script in a process of its own, which sees no GPU."""
    command = [sys.executable, "-W", "error", "-m", "tests.benchmarks.gpu", *words]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed: it has wheels for Linux x86-64"
)
def test_the_whole_script_runs_small(tmp_path: Path) -> None:
    """Every section gives its lines, nothing fails, and the kernels are right."""
    done = ran("--small", "--json", str(tmp_path / "gpu.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((tmp_path / "gpu.json").read_text())
    lines = written["lines"]
    assert written["small"] and written["device"] == "CPU"
    assert {line["section"] for line in lines} == set(gpu.SECTIONS)
    assert all(line["worst error"] < 2e-6 for line in lines if line["section"] == "check")
    for section, base in (("passes", "training step"), ("kernels", "product")):
        ratios = {line["what"]: line["ratio"] for line in lines if line["section"] == section}
        assert ratios[base] == 1 and {"outer", "fourier"} < set(ratios)
    table = done.stdout.splitlines()
    assert len(table) == 2 + len(lines) and table[0].startswith("CPU")


def test_a_failing_section_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in one section stands in the table, and the next section runs."""

    def broken(_: gpu.Run) -> Iterator[gpu.Line]:
        yield {"section": "rate", "case": "first"}
        raise RuntimeError("no such card\nmore")

    def works(_: gpu.Run) -> Iterator[gpu.Line]:
        yield {"section": "after", "case": "second"}

    monkeypatch.setattr(gpu, "SECTIONS", {"rate": broken, "after": works})
    lines = gpu.measured(gpu.Run("cpu", True, {}), ["rate", "after"])
    assert [line.get("error") for line in lines] == [None, "RuntimeError: no such card", None]


def test_without_a_gpu_it_says_what_to_do() -> None:
    """On the CPU the script refuses to pretend, and names the option that tries it there."""
    done = ran("--section", "rate")
    assert done.returncode == 2 and "add --small" in done.stderr
