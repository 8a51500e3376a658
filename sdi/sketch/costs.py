"""What the two evaluations cost on this machine: measured once, kept in a file, and compared.

`outer` does n·R·C multiply-adds an example in one batched product, then R·C shifted adds; `fourier`
takes n tokens through transforms of length M. The constants come from short runs of the real thing;
on a CPU on one thread, which a busy neighbour disturbs least. The choice changes no result beyond
rounding, so a file from another day does no harm; a processor or a torch that the file does not
know is measured again.
"""

from __future__ import annotations

import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sdi import amx
from sdi.flash import TORCHS, Flash, Options, compiled
from sdi.sketch import tiles
from sdi.sketch.kernels import halves, has_numba
from sdi.sketch.plan import Hashing, MatrixPlan

_VERSION = 9


@dataclass(frozen=True)
class Costs:
    """Nanoseconds an operation.

    Attributes:
        product: a multiply-add of δᵀa in float32.
        half_product: the same with bfloat16 factors, on a CPU with their rounding.
        tiled_product: the same in tile registers, with the adds; infinite where there are none.
        add: one entry of δᵀa into its bucket.
        transform: one of the M·log₂M steps of a token's two transforms, all that is done to its
            spectra included.
        linear: a multiply-add of a float32 linear layer as torch takes it.
        onednn_linear: the same by oneDNN; infinite where that cannot be had.
        attention: a multiply-add of float32 attention and its gradient as torch takes them.
        compiled_attention: the same by `sdi.compiled`; infinite where that cannot be had.
    """

    product: float
    half_product: float
    tiled_product: float
    add: float
    transform: float
    linear: float
    onednn_linear: float
    attention: float
    compiled_attention: float

    @property
    def onednn(self) -> bool:
        """Whether oneDNN is the faster by more than these constants vary."""
        return self.onednn_linear < 0.95 * self.linear

    @property
    def compiles_attention(self) -> bool:
        """Whether compiled attention is the faster by more than these constants vary."""
        return self.compiled_attention < 0.95 * self.attention

    def outer(self, tokens: int, rows: int, columns: int, *, half: bool, tiled: bool) -> float:
        """Nanoseconds an example by way of δᵀa."""
        if tiled:
            return rows * columns * tokens * self.tiled_product
        product = self.half_product if half else self.product
        return rows * columns * (tokens * product + self.add)

    def fourier(self, tokens: int, dim: int) -> float:
        """Nanoseconds an example by way of the transforms of its tokens."""
        return tokens * dim * math.log2(dim) * self.transform


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware, float32 sums included."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    found = amx.abilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


@cache
def costs(device: torch.device) -> Costs:
    """Of a device: from the file, or measured now and written there.

    That takes a quarter of a second; on a CPU, where numba has not compiled the kernels of this
    version of `sdi` before, 5 to 15 seconds more. What a compiler that failed left unmeasured is
    not written, for it may not fail the next time.
    """
    path = _home() / "costs.json"
    known = _read(path)
    key = _key(device)
    try:
        return Costs(**known[key])
    except (KeyError, TypeError):
        found = measure(device)
        if device.type != "cpu" or (compiled() is not None) == has_numba():
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
    from sdi.sketch import tensorsketch  # which asks here

    # On a GPU enough work for the launch not to count.
    batch, tokens, side = (4, 128, 384) if device.type == "cpu" else (16, 512, 1024)
    dim = 4096
    plan = Hashing(dim, 0, "trial").plan("trial", (side, side), device)
    assert isinstance(plan, MatrixPlan)
    factor = torch.ones(batch, tokens, side, dtype=torch.float32, device=device)
    out = factor.new_zeros(batch, dim)
    spectrum = torch.zeros(batch, dim // 2 + 1, dtype=torch.complex64, device=device)

    def rounded() -> None:
        left, right, _ = halves(factor, factor, None)
        torch.bmm(right, left)

    def product(*, half: bool) -> float:
        """With the rounding of factors; on a GPU with the adds, which the fused kernel does."""
        if device.type == "cpu":
            return _nanoseconds(rounded if half else lambda: factor.mT @ factor, device)
        narrow = factor.bfloat16() if half else factor
        return _nanoseconds(
            lambda: tensorsketch.add_outer(plan, narrow, narrow, out, 1 << 26, half=half), device
        )

    def tiled() -> float:
        kernels = tiles.kernels_for(plan, factor, factor)
        if kernels is None:
            return math.inf
        return _nanoseconds(lambda: tiles.add(kernels, plan, factor, factor, out, None), device)

    def fourier() -> None:
        tensorsketch.add_fourier(plan, factor, factor, spectrum, 1 << 26)

    entries, add = batch * side * side, 0.0
    if device.type == "cpu":
        dense = factor.new_ones(batch, side, side)
        add = _nanoseconds(lambda: tensorsketch.add_dense_columns(plan, dense, out), device)
    return Costs(
        **_linear_layers(factor),
        **_attention(device),
        product=product(half=False) / (entries * tokens),
        half_product=product(half=True) / (entries * tokens),
        tiled_product=tiled() / (entries * tokens),
        add=add / entries,
        transform=_nanoseconds(fourier, device) / (batch * tokens * dim * math.log2(dim)),
    )


def _linear_layers(inputs: Tensor) -> dict[str, float]:
    """Nanoseconds a multiply-add of both libraries on a CPU; elsewhere there is no choice.

    Forward and backward, which read the weight in two orders: one library may be quicker at either.
    """
    weight = inputs.new_ones(inputs.shape[2], inputs.shape[2])
    operations = 2 * inputs.numel() * len(weight)
    if inputs.device.type != "cpu":
        return {"linear": 0.0, "onednn_linear": math.inf}

    def both(product: Callable[[Tensor], Tensor]) -> float:
        orders = [partial(product, weight), partial(product, weight.t())]
        return sum(_nanoseconds(run, inputs.device) for run in orders)

    plain = both(lambda w: F.linear(inputs, w))
    try:
        product = torch.ops.mkldnn._linear_pointwise
        other = both(lambda w: product(inputs, w, None, "none", [], ""))
    except (AttributeError, RuntimeError):  # a torch without oneDNN, or one that refuses
        other = math.inf
    return {"linear": plain / operations, "onednn_linear": other / operations}


def _attention(device: torch.device) -> dict[str, float]:
    """Nanoseconds a multiply-add of both kinds of attention on a CPU, causal."""
    if device.type != "cpu":
        return {"attention": 0.0, "compiled_attention": math.inf}
    heads, tokens, width = 2, 256, 32
    query, key, value = (torch.ones(1, heads, tokens, width) for _ in range(3))
    options = Options(None, True, None)

    operations = 3.5 * heads * tokens**2 * width  # two products and five, of half of the scores

    def by(kernels: Flash) -> float:
        def run() -> None:
            results = kernels.forward((query, key, value), options)
            kernels.backward(results[0], (query, key, value), results, options)

        return _nanoseconds(run, device) / operations

    ours = compiled()
    return {"attention": by(TORCHS), "compiled_attention": by(ours) if ours else math.inf}


def _nanoseconds(run: Callable[[], object], device: torch.device) -> float:
    """The shortest of a few runs, after one to warm up."""
    found = []
    for _ in range(8):
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - begin)
    return 1e9 * min(found[1:])


def _home() -> Path:
    """Where caches go (XDG base directory specification); a user may have no home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdi"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / "sdi"


def _key(device: torch.device) -> str:
    """What the constants depend on."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = str(amx.abilities().get("cpu_name", platform.processor()))
    kernel = f"numba {version('numba')}" if has_numba() else "scattered adds"
    half = "bfloat16" if multiplies_bfloat16(device) else "float32"
    if device.type == "cpu" and amx.kernels("tiles") is not None:
        half = "tiles of bfloat16"
    said = (_VERSION, f"torch {torch.__version__}", device.type, name, kernel, half)
    return ", ".join(map(str, said))


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
