"""How much memory is free, and how much a pass takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from curate import memory, sketching
from curate.memory import CPU_SPILL, available, give_back, peak_of, ran_out, sized
from curate.sketching import sketch_run
from tests.loopedrun import LOOP, OPTIONS, checkpoints, factory, make_run

CPU = torch.device("cpu")


def test_a_peak_is_what_lives_at_one_time() -> None:
    """Tensors that are gone before others are made do not add up; those that live do."""

    def one_by_one() -> None:
        for _ in range(5):
            torch.ones(1000)

    def together() -> list[torch.Tensor]:
        return [torch.ones(1000) for _ in range(5)]

    assert peak_of(one_by_one, CPU) == int(4000 * CPU_SPILL)
    assert peak_of(together, CPU) == int(20_000 * CPU_SPILL)


def test_views_and_what_was_there_before_count_nothing() -> None:
    """A view of a tensor shares its bytes, and the tensors named as held are not counted."""
    held = torch.ones(1000)
    assert peak_of(lambda: (held.view(10, 100).T, held[5:]), CPU, [held]) == 0
    assert peak_of(lambda: held.view(10, 100).T, CPU) == int(4000 * CPU_SPILL)


def test_sparse_tensors_do_not_stop_the_count() -> None:
    """A sparse tensor has no storage of its own; its indices and values are counted."""
    dense = torch.eye(100)
    taken = peak_of(dense.to_sparse, CPU, [dense, dense.to_sparse()])
    assert taken >= int(100 * (4 + 2 * 8) * CPU_SPILL)


def test_what_autograd_keeps_is_counted() -> None:
    """Activations kept for the backward pass are in the peak: it grows by each layer's output."""

    def deep(layers: int) -> int:
        model = nn.Sequential(*(nn.Tanh() for _ in range(layers)))
        given = torch.ones(50, 20, requires_grad=True)
        return peak_of(lambda: model(given).sum().backward(), CPU, [given])

    assert deep(8) - deep(4) == pytest.approx(4 * 4000 * CPU_SPILL, abs=1)


def test_a_count_that_passes_what_is_free_stops_the_work() -> None:
    """Also within the backward pass: what comes out is lack of memory, and the work has ended."""

    def work() -> None:
        given = torch.ones(100, requires_grad=True)
        wide = given.expand(50, 100).clone()  # 20,000 bytes; as many once more in the backward pass
        wide.square().sum().backward()

    takes = peak_of(work, CPU)
    with pytest.raises(MemoryError, match="more than the 0 MiB that are free") as caught:
        peak_of(work, CPU, most=int(takes / CPU_SPILL) - 1)
    assert ran_out(caught.value)
    assert peak_of(work, CPU, most=int(takes / CPU_SPILL) + 1) == takes


def test_free_memory_is_positive_here() -> None:
    """The machine that runs the tests has some memory left, and less than 2⁶⁰ bytes."""
    free = available(CPU)
    assert free is not None
    assert 2**20 < free < 2**60
    assert available(torch.device("meta")) is None


def test_the_limit_of_a_container_counts(tmp_path: Path) -> None:
    """Of nested cgroups the tightest decides; what file pages hold can be had back."""
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    for folder, limit, used in ((inner, "max", 100), (inner.parent, "1000", 700)):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text("anon 300\ninactive_file 50\n")
    assert memory._left_in_cgroup(tmp_path, "0::/outer/inner\n") == 350
    (inner / "memory.max").write_text("120\n")
    assert memory._left_in_cgroup(tmp_path, "0::/outer/inner\n") == 70
    assert memory._left_in_cgroup(tmp_path, "0::/elsewhere\n") is None


def test_cgroups_of_version_one_are_read(tmp_path: Path) -> None:
    """The older names are understood; their number for "no limit" is none."""
    own = tmp_path / "memory" / "job"
    own.mkdir(parents=True)
    (own / "memory.usage_in_bytes").write_text("400\n")
    (own / "memory.stat").write_text("total_inactive_file 100\n")
    for limit, left in (("9223372036854771712", None), ("1000", 700)):
        (own / "memory.limit_in_bytes").write_text(f"{limit}\n")
        assert memory._left_in_cgroup(tmp_path, "4:memory:/job\n1:cpu:/\n") == left


def test_running_out_is_told_from_other_errors() -> None:
    """Torch's own refusal to allocate is recognised on the CPU and on a GPU; others are not."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert ran_out(caught.value)
    assert ran_out(torch.cuda.OutOfMemoryError("CUDA out of memory"))
    assert ran_out(MemoryError())
    with pytest.raises(RuntimeError) as caught:
        torch.ones(2) @ torch.ones(3)
    assert not ran_out(caught.value)


def test_bytes_read_well() -> None:
    """Gibibytes from one on, mebibytes below."""
    assert (sized(3.24 * 2**30), sized(48 * 2**20)) == ("3.2 GiB", "48 MiB")


@pytest.mark.skipif(memory._trim() is None, reason="another allocator than glibc's")
def test_what_nothing_uses_is_given_back() -> None:
    """Blocks freed between others stay with the process until it is asked to give them back."""

    def held() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    size, count = 60_000, 2000
    kept = []
    for _ in range(count):  # below what malloc takes from the system block by block
        kept.append((bytearray(b"x" * size), bytearray(b"y" * 1000)))
    kept = [small for _, small in kept]
    before = held()
    give_back()
    assert len(kept) == count
    assert held() < before - count * size // 2


def test_other_allocators_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory cannot be given back, nothing is done."""

    def without(_name: None) -> object:
        return object()

    memory._trim.cache_clear()
    monkeypatch.setattr(memory.ctypes, "CDLL", without)
    assert memory._trim() is None
    give_back()
    memory._trim.cache_clear()


def test_memory_is_given_back_as_batches_go_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first batch, after so many of whatever shards, and at the end."""
    events: list[str] = []
    monkeypatch.setattr(sketching, "GIVEN_BACK", 2)
    monkeypatch.setattr(sketching, "give_back", lambda: events.append("back"))
    sketched = sketching.sketched

    def noted(*given: Any) -> Any:
        events.append("batch")
        return sketched(*given)

    monkeypatch.setattr(sketching, "sketched", noted)
    options = replace(OPTIONS, budget_tokens=64)
    sketch_run(make_run(tmp_path), factory, LOOP, checkpoints(tmp_path), options=options)
    assert events[:4] == ["back", "batch", "batch", "back"]
    assert events.count("back") == (events.count("batch") + 1) // 2 + 1
    assert events[-1] == "back"
