"""The GPU kernels: interpreted where there is no GPU, compiled for one all the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sdi.sketch.fused import Fused, _tried, fused
from tests.benchmarks.kernelcheck import NAMED

ROOT = Path(__file__).resolve().parent.parent
RANDOM = 8
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed: it has wheels for Linux x86-64"
)


def lines_of(folder: Path, *words: str) -> list[dict[str, Any]]:
    """What `tests.benchmarks.kernelcheck` finds, in a process of its own.

    Triton decides when it is imported whether it interprets or compiles.
    """
    into = folder / "lines.json"
    command = [sys.executable, "-W", "error", "-m", "tests.benchmarks.kernelcheck"]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [*command, "--json", str(into), *words],
        cwd=ROOT,
        env={**environment, "TRITON_CACHE_DIR": str(folder / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines: list[dict[str, Any]] = json.loads(into.read_text())
    return lines


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return lines_of(tmp_path_factory.mktemp("interpreted"), "--random", str(RANDOM))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return lines_of(tmp_path_factory.mktemp("built"), "--compile")


@needs_triton
@pytest.mark.parametrize("kernel", ["outer", "fourier"])
@pytest.mark.parametrize("number", range(len(NAMED) + RANDOM))
def test_kernel_is_the_sketch(number: int, kernel: str, interpreted: list[dict[str, Any]]) -> None:
    """The kernel adds the sketch that float64 finds by way of the dense product, and no more:
    for sizes that no tile divides, R or C above M, one token, zero rows, halves and views.
    """
    line = interpreted[number]
    assert line[kernel] < 2e-6, line
    assert line["others untouched"], line


@needs_triton
def test_outer_never_writes_the_dense_product(built: list[dict[str, Any]]) -> None:
    """Compiled for compute capability 8.0 and 9.0, the program of `outer` has no store to global
    memory, only adds; halves are multiplied by the tensor cores; nothing spills, and its shared
    memory is within the 99 KiB that every such GPU has.
    """
    outer = [line for line in built if line["kernel"].startswith("outer")]
    assert len(outer) == 16
    for line in built:
        assert line["spills"] == 0 and line["shared"] <= 99 << 10, line
    for line in outer:
        assert line["stores"] == 0 and line["adds"] > 0, line
        assert (line["products"] > 0) == ("bf16" in line["kernel"]), line


@needs_triton
def test_places_of_long_batches_fit(built: list[dict[str, Any]]) -> None:
    """Where a factor of `outer` is read is reckoned in 64 bits, so that an example of 2³¹ entries
    and more does not overflow.
    """
    halves = [line for line in built if line["kernel"].startswith("outer bf16")]
    assert len(halves) == 8
    for line in halves:
        assert line["narrow"] == 0 and line["wide"] > 0, line


@needs_triton
def test_a_group_of_columns_goes_out_together(built: list[dict[str, Any]]) -> None:
    """Eight columns of a group cost two adds, one at its foot and one past it, instead of eight."""
    adds = {(line["capability"], line["kernel"]): line["adds"] for line in built}
    for (capability, kernel), count in adds.items():
        if kernel.endswith("group 8"):
            assert 8 * count == 2 * adds[capability, kernel.replace("group 8", "group 1")]


@needs_triton
def test_fourier_writes_its_sums_once(built: list[dict[str, Any]]) -> None:
    """Placing stores and never adds; the product of spectra adds its sums and stores nothing."""
    for line in built:
        if line["kernel"] == "place":
            assert line["stores"] > 0 and line["adds"] == 0, line
        if line["kernel"] == "multiply":  # a real and an imaginary part
            assert line["stores"] == 0 and line["adds"] == 2, line


@needs_triton
def test_whole_pass_is_the_one_in_torch(tmp_path: Path) -> None:
    """A pass whose matrices all go through the kernels gives the sketches of a pass in torch, in
    float32 and bf16, with learning rates that scale the gradients; the trial before it passes.
    """
    lines = lines_of(tmp_path, "--pass")
    assert len(lines) == 4
    for line in lines:
        assert line["used"] == [line["method"]], line
        assert line["gap"] < 1e-5, line


def test_a_cpu_tensor_keeps_to_torch() -> None:
    """Without a GPU nothing asks for triton: the evaluation stays the one in torch."""
    assert fused(torch.device("cpu")) is None


def test_a_gpu_without_triton_falls_back_aloud(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernels cannot be built, a warning says why and torch serves."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "sdi.sketch.triton_outer", raising=False)
    monkeypatch.delitem(sys.modules, "sdi.sketch.triton_fourier", raising=False)
    with pytest.warns(UserWarning, match=r"do not run on cuda:7 .*triton.*slower torch path"):
        assert fused(torch.device("cuda", 7)) is None


@pytest.mark.parametrize("kernel", ["outer", "fourier"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_any_kernel_that_fails_falls_back_aloud(
    kernel: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One kernel that fails in one type is found by the trial, not in the midst of a run: a
    warning says why and torch serves. Kernels that all run serve.
    """

    def served(broken: bool) -> Fused | None:
        for name in ("outer", "fourier"):

            def run(_: Any, left: torch.Tensor, *rest: Any, name: str = name) -> None:
                if broken and name == kernel and left.dtype == dtype:
                    raise RuntimeError("out of resource: shared memory")

            module = SimpleNamespace(**{f"fused_{name}": run})
            monkeypatch.setitem(sys.modules, f"sdi.sketch.triton_{name}", module)
        return _tried.__wrapped__(torch.device("cpu"))

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    assert served(broken=False) is not None
    with pytest.warns(UserWarning, match=r"do not run on cpu \(RuntimeError: out of resource"):
        assert served(broken=True) is None


def test_an_old_gpu_keeps_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Below compute capability 8 there is no bf16 product, and torch serves."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert fused(torch.device("cuda", 8)) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@needs_triton
def test_compiled_kernels_are_the_sketch(tmp_path: Path) -> None:
    """On a GPU the compiled kernels give what float64 gives, over many random shapes."""
    for line in lines_of(tmp_path, "--device", "cuda", "--random", "40"):
        assert max(line["outer"], line["fourier"]) < 5e-6, line
        assert line["others untouched"], line
