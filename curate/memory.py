"""Memory: how much of it is free, and how much of it a pass takes at its peak.

On a GPU torch's allocator tells both. On a CPU the system tells what is free (the cgroup's limit
included, which is what kills a process in a container). What a pass takes is counted, not watched:
every tensor that it makes is weighed when it appears and when it goes. Watching the resident size
instead gives other figures in every run, and none at all after something larger (training, say)
has left its pages with the allocator. Counting misses what is no tensor and what the allocator
loses between blocks: the peak resident size grew 1.04 to 1.26 times as fast as the count on six
looped GPTs (`python -m tests.benchmarks.memory --batches`), so a count is taken `CPU_SPILL` times.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CPU_SPILL = 1.3
GIVEN_BACK = 32
"""Batches after which memory is given back that nothing uses."""
_NO_LIMIT = 1 << 60  # cgroup v1 writes "none" as a number near 2⁶³

OutOfMemory = torch.cuda.OutOfMemoryError


def available(device: torch.device) -> int | None:
    """Bytes that this process may still take on a device; None where nothing tells."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + held)
    if device.type != "cpu":
        return None
    known = [size for size in (_free_pages(), _left_in_cgroup()) if size is not None]
    return min(known) if known else None


def _free_pages(path: Path = Path("/proc/meminfo")) -> int | None:
    """MemAvailable; where there is no such file, half of the machine's memory."""
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, OSError, ValueError):
        return None


def _left_in_cgroup(root: Path = Path("/sys/fs/cgroup"), own: str | None = None) -> int | None:
    """What the tightest memory limit above this process leaves; None without one.

    Args:
        root: where cgroups are mounted, version 2, or version 1 with `memory` below it.
        own: the contents of /proc/self/cgroup, read where not given.
    """
    if own is None:
        file = Path("/proc/self/cgroup")
        own = file.read_text() if file.exists() else ""
    found = []
    for line in own.splitlines():
        _, controllers, path = line.split(":", 2)
        names = controllers.split(",")
        if "memory" in names:
            limits = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            found += _limits(root / "memory", path, limits)
        elif names == [""]:
            found += _limits(root, path, ("memory.max", "memory.current", "inactive_file"))
    return min(found) if found else None


def _limits(mount: Path, path: str, names: tuple[str, str, str]) -> list[int]:
    """What is left at each level from a cgroup up to its mount; file pages count as free."""
    most, used, cache = names
    inside = mount / path.strip("/")
    left = []
    for folder in (inside, *inside.parents):
        if (folder / most).is_file() and (folder / used).is_file():
            limit = (folder / most).read_text().strip()
            if limit.isdigit() and int(limit) < _NO_LIMIT:
                held = int((folder / used).read_text()) - _counted(folder / "memory.stat", cache)
                left.append(max(0, int(limit) - held))
        if folder == mount:
            break
    return left


def _counted(path: Path, name: str) -> int:
    if not path.is_file():
        return 0
    pairs = (line.split() for line in path.read_text().splitlines())
    return next((int(value) for key, value in pairs if key == name), 0)


def peak_of(
    work: Callable[[], Any],
    device: torch.device,
    held: Iterable[Tensor] = (),
    most: int | None = None,
) -> int:
    """Bytes that `work` takes at its peak, over what is held before it.

    Args:
        work: runs on `device`; what it returns lives to the end of it.
        device: a GPU is asked; anywhere else tensors are counted.
        held: tensors that are there before, and are not to be counted (the model's).
        most: bytes at which the count stops the work; a GPU's allocator does so by itself.

    Raises:
        MemoryError: the tensors alone, without `CPU_SPILL`, have passed `most`.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    with _Weighing(held, most) as weighing:
        work()
    return int(weighing.peak * CPU_SPILL)


class _Weighing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages that are alive, from the call that makes one to its end."""

    def __init__(self, held: Iterable[Tensor], most: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now, self.peak, self._most = 0, 0, most
        self._alive: dict[int, tuple[int, Any]] = {}
        for tensor in held:
            for storage in _storages(tensor):
                self._see(storage, 0)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Whether torch imports its compiler to keep it off; a pass here runs eagerly anyway."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            for storage in _storages(tensor) if isinstance(tensor, Tensor) else ():
                self._see(storage, storage.nbytes())
        self.peak = max(self.peak, self.now)
        if self._most is not None and self.now > self._most:
            raise MemoryError(f"it takes more than the {sized(self._most)} that are free")
        return output

    def _see(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key in self._alive:
            return
        # The weak reference is kept with the size: it must outlive the storage to be called.
        self._alive[key] = (size, weakref.ref(storage, lambda _: self._gone(key)))
        self.now += size

    def _gone(self, key: int) -> None:
        self.now -= self._alive.pop(key)[0]


def _storages(tensor: Tensor) -> list[torch.UntypedStorage]:
    """What a tensor's numbers lie in; a wrapper has none of its own, its parts are seen."""
    sparse = tensor.layout == torch.sparse_coo
    parts = (tensor._indices(), tensor._values()) if sparse else (tensor,)
    try:
        return [part.untyped_storage() for part in parts]
    except (NotImplementedError, RuntimeError):
        return []


def give_back() -> None:
    """Return to the system what the allocator keeps of memory that nothing uses, where it can.

    Batches of other widths need other sizes, and glibc keeps what lies between them: over some
    hundred batches a process grew by a quarter. What is given back has to be cleared when it is
    taken again, a few hundredths of a second; so not after every batch.
    """
    if (trim := _trim()) is not None:
        trim(0)


@cache
def _trim() -> Callable[[int], int] | None:
    """Glibc's malloc_trim; None with another allocator."""
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
    return found


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or in torch's allocator on the CPU."""
    if isinstance(error, OutOfMemory | MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and "alloc" in text and "memory" in text


def sized(count: float) -> str:
    """Bytes as people read them: "3.2 GiB", "48 MiB"."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
