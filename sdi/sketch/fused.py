"""Whether the fused GPU kernels run here, tried once a device.

Triton is imported only where a tensor on a GPU asks for it: `sdi` needs torch and numpy alone. It
also needs a C compiler and a GPU that knows bf16 (compute capability 8); without any of these the
torch path serves, and a warning says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch

from sdi.sketch.plan import Hashing, MatrixPlan


class Fused(NamedTuple):
    """The kernels: `sdi.sketch.triton_outer.fused_outer`, `sdi.sketch.triton_fourier`'s."""

    outer: Callable[..., None]
    fourier: Callable[..., None]


def fused(device: torch.device) -> Fused | None:
    """The kernels where they run; None on the CPU, and where they do not."""
    return _tried(device) if device.type == "cuda" else None


def attempt(kernels: Fused, device: torch.device) -> None:
    """Launch each kernel with factors of both types; whatever keeps one from running is raised."""
    plan = Hashing(32, 0, "").plan("trial", (16, 16), device)
    assert isinstance(plan, MatrixPlan)
    for dtype in (torch.bfloat16, torch.float32):
        ones = torch.ones(1, 16, 16, dtype=dtype, device=device)
        kernels.outer(plan, ones, ones, torch.zeros(1, plan.dim, device=device))
        spectrum = torch.zeros(1, plan.dim // 2 + 1, dtype=torch.complex64, device=device)
        kernels.fourier(plan, ones, ones, spectrum)


@cache
def _tried(device: torch.device) -> Fused | None:
    if torch.cuda.get_device_capability(device) < (8, 0):
        return None
    try:
        from sdi.sketch.triton_fourier import fused_fourier
        from sdi.sketch.triton_outer import fused_outer

        kernels = Fused(fused_outer, fused_fourier)
        attempt(kernels, device)
        torch.cuda.synchronize(device)
    except Exception as error:  # whatever keeps a compiler from working
        warnings.warn(
            f"the fused GPU kernels do not run on {device} ({type(error).__name__}: {error}); the "
            "slower torch path is used. They need triton (pip install 'sdi-curate[gpu]') and a C "
            "compiler",
            stacklevel=2,
        )
        return None
    return kernels
