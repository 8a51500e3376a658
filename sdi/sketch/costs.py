"""What the two evaluations cost on this machine: measured once, kept in a file, and compared.

`outer` does n·R·C multiply-adds an example in one batched product and R·C shifted adds; `fourier`
2n transforms of length M, and a few passes over their spectra. Each constant is the time of one
such operation, from a short run of the real thing; on a CPU on one thread, which a busy neighbour
disturbs least, and which says as much, since all of them gain alike from more. The choice changes
no result beyond rounding, so a file from another day does no harm; a processor or a torch that the
file does not know is measured again.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from sdi.sketch.kernels import shifted_add

_VERSION = 1


@dataclass(frozen=True)
class Costs:
    """Nanoseconds an operation.

    Attributes:
        product: a multiply-add of δᵀa in float32.
        half_product: the same with bfloat16 factors.
        add: one entry of δᵀa into its bucket.
        transform: one of the M·log₂M steps of a real Fourier transform of length M.
        spectrum: one element in a pass over spectra of length M.
    """

    product: float
    half_product: float
    add: float
    transform: float
    spectrum: float

    def outer(self, tokens: int, rows: int, columns: int, *, half: bool) -> float:
        """Nanoseconds an example by way of δᵀa."""
        product = self.half_product if half else self.product
        return rows * columns * (tokens * product + self.add)

    def fourier(self, tokens: int, rows: int, columns: int, dim: int) -> float:
        """Nanoseconds an example by way of the transforms of its tokens."""
        transforms = 2 * dim * math.log2(dim) * self.transform
        return tokens * (transforms + (4 * dim + rows + columns) * self.spectrum)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware, float32 sums included."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    found = _abilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def _abilities() -> dict[str, Any]:
    """What torch says of the processor; nothing where torch is too old to say."""
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return found


@cache
def costs(device: torch.device) -> Costs:
    """Of a device: from the file, or measured now (a fifth of a second) and written there."""
    path = _home() / "costs.json"
    known = _read(path)
    key = _key(device)
    try:
        return Costs(**known[key])
    except (KeyError, TypeError):
        found = measure(device)
        _write(path, {**_read(path), key: asdict(found)})
        return found


def measure(device: torch.device) -> Costs:
    """Time each kind of operation on `device`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _measured(device)
    finally:
        torch.set_num_threads(threads)


def _measured(device: torch.device) -> Costs:
    batch, tokens, rows, columns, dim = 4, 128, 384, 256, 4096
    left = torch.ones(batch, tokens, rows, device=device)
    right = torch.ones(batch, tokens, columns, device=device).transpose(1, 2)
    narrow = left.bfloat16(), right.bfloat16()
    product, out = right @ left, torch.zeros(batch, dim, device=device)
    starts = torch.arange(columns, device=device) * 7 % dim
    signs = left[0, 0], right[0, :, 0].contiguous()
    # Many vectors and no spectrum kept, as in a pass: memory is not what is measured here.
    folded = torch.ones(batch, tokens // 2, dim, device=device)
    spectra = torch.fft.rfft(folded)
    dense, places = batch * rows * columns, batch * (tokens // 2) * dim
    return Costs(
        product=_seconds(lambda: right @ left, device) * 1e9 / (dense * tokens),
        half_product=_seconds(lambda: narrow[1] @ narrow[0], device) * 1e9 / (dense * tokens),
        add=_seconds(lambda: shifted_add(product, starts, *signs, out), device) * 1e9 / dense,
        transform=_seconds(lambda: torch.fft.rfft(folded), device) * 1e9 / (places * 12),
        spectrum=_seconds(lambda: spectra.mul_(spectra), device) * 1e9 / places,
    )


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """The shortest of a few runs, after one to warm up."""
    found = []
    for _ in range(6):
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - begin)
    return min(found[1:])


def _home() -> Path:
    """Where caches go (XDG base directory specification)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdi"


def _key(device: torch.device) -> str:
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = str(_abilities().get("cpu_name", platform.processor()))
    return f"{_VERSION}, torch {torch.__version__}, {name}"


def _read(path: Path) -> dict[str, dict[str, float]]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, found: dict[str, dict[str, float]]) -> None:
    """Replace the file; where it cannot be written the next process measures again."""
    temporary = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(found, indent=1))
        temporary.replace(path)
    except OSError:
        return
