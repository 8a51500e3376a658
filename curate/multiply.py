"""Stored sketches times vectors, in integers where the processor multiplies them exactly.

A stored sketch is int8 already. Processors with VNNI or AMX multiply int8 at twice the rate of bf16
and five times that of float32, and add up in int32 without any rounding; so vectors are written in
int8 digits too, v ≈ s·(d₁ + d₂/254 + d₃/254²) with one scale s each. A query's own step vector is a
stored sketch, so only its first digit is not zero, and such products are exact. Means over queries
need all three, which leaves what float32 leaves, 1e-7 of the vector, and is still faster. With AMX
a kernel multiplies (`sdi.compiled.bytetiles`): the same numbers, at more of the processor's rate.

bf16 is not used: on the CPU its products come back rounded to bf16, 2⁻⁹ of each score, and two
halves of a vector in bf16 take as long as four digits. Without fast exact integers, and on a GPU,
products are float32.

Letters: R rows, V vectors, M sketch dimension.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from sdi import amx, team

LARGEST = 127
OFFSET = 128
"""What FAISS adds to a number to store it in a byte."""
BASE = 254.0
"""How many units of a digit make one of the digit before it."""
DIGITS = 3
_WIDE = 4 << 20
"""Bytes of float32 that rows are widened to at once; each core's share of a cache holds them."""
_COLUMNS = 16
"""Another number of float32 columns may cost more: MKL takes four times as long for ten."""
_DEEPEST = (2**31 - 1) // LARGEST**2
"""The largest M whose products are sure to fit in int32."""


@dataclass(frozen=True)
class Operand:
    """V vectors, laid out for the device that multiplies.

    Attributes:
        columns: int8 (M, V), (M, 2V) or (M, 3V), digit by digit, each column's numbers side by side
            in memory; or float32 (M, V or more), where what is more is zero.
        count: V.
        scale: (V,) float64, what products of digits are multiplied with; None for float32.
        single_scale: the same in float32.
    """

    columns: Tensor
    count: int
    scale: Tensor | None
    single_scale: Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        """Once, since compiled code is given its address."""
        single = None if self.scale is None else self.scale.float()
        object.__setattr__(self, "single_scale", single)

    def some(self, which: Tensor) -> Operand:
        """Those of the vectors whose numbers are given."""
        if self.scale is None:
            return Operand(_filled(self.columns[:, which]), len(which), None)
        digits = self.columns.T.view(-1, self.count, len(self.columns))[:, which]
        return Operand(digits.flatten(0, 1).T, len(which), self.scale[which])

    @classmethod
    def of(cls, values: npt.NDArray[np.floating], device: torch.device) -> Operand:
        """Lay out `values` (V, M)."""
        if not in_digits(device, values.shape[1]):
            single = torch.from_numpy(np.ascontiguousarray(values.T, dtype=np.float32))
            return cls(_filled(single.to(device)), len(values), None)
        digits, scale = digits_of(values)
        return cls(torch.from_numpy(digits).T, len(values), torch.from_numpy(scale))

    @property
    def width(self) -> int:
        """How many columns are multiplied for each row, all digits included."""
        return int(self.columns.shape[1])

    @property
    def digits(self) -> int:
        """D, how many digits the vectors have; 0 for float32."""
        return 0 if self.scale is None else self.width // self.count

    def products(self, rows: Tensor, place: int = 0, *, tiled: bool = False) -> Tensor:
        """Inner products of rows (R, M) with each column, int32 or float32 (R, width or more).

        On the CPU they are written over what the thread was given last for that `place`.

        Args:
            rows: int8, or uint8 with `OFFSET` added, as FAISS stores them.
            tiled: whether there is so much to do that loading a kernel pays, where there is one.
        """
        serve = tiled and self.scale is not None and rows.stride(1) == 1
        kernels = tiles_for(rows.shape[1]) if serve else None
        if kernels is None:
            rows = _signed(rows)
            if self.scale is None:
                return _widened_product(rows, self.columns, place)
            out = _room(place, torch.int32, len(rows), self.width)
            return torch._int_mm(rows, self.columns, out=out)
        assert rows.dtype in (torch.int8, torch.uint8), rows.dtype
        assert rows.shape[1] == len(self.columns), rows.shape
        packed, dim = self._packed, rows.shape[1]
        width, height = 16 * len(packed), amx.up(len(rows), kernels.SPAN)
        out = _room(place, torch.int32, height, width)
        size = kernels.CHUNK * dim
        threads = min(team.size(), -(-height // kernels.CHUNK))
        flips = 0x80808080 if rows.dtype == torch.uint8 else 0
        addresses = (rows.data_ptr(), rows.stride(0), flips, packed.data_ptr(), out.data_ptr())
        room = amx.configuration().ctypes.data, amx.rooms(threads * size), size
        team.run(kernels.multiplied, (0, 0, len(rows), dim, width, *addresses, *room), threads)
        return out[: len(rows)]

    @cached_property
    def _packed(self) -> Tensor:
        """Columns as tiles are read, zeros behind them: (W / 16, M / 64, 16, 16, 4)."""
        dim = len(self.columns)
        filled = torch.nn.functional.pad(self.columns.T, (0, 0, 0, -self.width % 32))
        return filled.view(-1, 16, dim // 64, 16, 4).permute(0, 2, 3, 1, 4).contiguous()

    def times(self, rows: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """Inner products (R, V) of int8 rows (R, M), on the CPU."""
        whole = self.products(rows)
        product = whole[:, : self.count].to("cpu", dtype, copy=True)
        if self.scale is None:
            return product
        for digit in range(1, self.digits):
            own = whole[:, digit * self.count : (digit + 1) * self.count]
            product.add_(own, alpha=BASE**-digit)
        return product.mul_(self.scale.to(dtype))


def tiles_for(dim: int) -> ModuleType | None:
    """The kernel that multiplies int8 of M = `dim` in tile registers, where there is one."""
    kernels = amx.kernels("bytetiles")
    return kernels if kernels is not None and dim % kernels.LINE == 0 else None


def _signed(rows: Tensor) -> Tensor:
    """int8 rows, of uint8 ones in memory that the thread's next ones are written over."""
    if rows.dtype != torch.uint8:
        return rows
    out = team.room("signed", torch.uint8, rows.numel()).view(rows.shape)
    return torch.bitwise_xor(rows, OFFSET, out=out).view(torch.int8)


def _room(place: int, dtype: torch.dtype, rows: int, width: int) -> Tensor:
    """(rows, width) that the thread's next product of that place is written over."""
    return team.room(f"products {place}", dtype, rows * width).view(rows, width)


def _filled(columns: Tensor) -> Tensor:
    """float32 (M, V), on a CPU with zeros behind them up to a multiple of `_COLUMNS`."""
    count = columns.shape[1]
    missing = -count % _COLUMNS if count > 1 and columns.device.type == "cpu" else 0
    return torch.nn.functional.pad(columns, (0, missing)) if missing else columns


def _widened_product(rows: Tensor, columns: Tensor, place: int) -> Tensor:
    """int8 (R, M) times float32 (M, V), where the columns are.

    On the CPU a stretch of rows is widened and multiplied at a time, before it leaves the cache.
    """
    if columns.device.type != "cpu":
        return rows.to(columns.device, torch.float32) @ columns
    dim = len(columns)
    product = _room(place, torch.float32, len(rows), columns.shape[1])
    most = max(1, min(len(rows), _WIDE // (4 * dim)))
    room = columns.new_empty(most, dim)
    for part, out in zip(torch.split(rows, most), torch.split(product, most), strict=True):
        torch.mm(room[: len(part)].copy_(part), columns, out=out)
    return product


def digits_of(
    values: npt.NDArray[np.floating],
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float64]]:
    """int8 (D · V, M), the first digits of all above the second, and scale (V,) of (V, M).

    D is as small as leaves no more than float32 rounds off a stored sketch: its entry and its
    largest one each by half a unit in the last place.
    """
    scale = np.abs(values).max(axis=1).astype(np.float64) / LARGEST
    rest = values / np.where(scale > 0, scale, 1.0)[:, None]
    found: list[npt.NDArray[np.int8]] = []
    enough = LARGEST * float(np.finfo(np.float32).eps)
    while len(found) < DIGITS:
        digit = np.rint(rest)
        found.append(digit.astype(np.int8))
        rest -= digit
        if np.abs(rest).max(initial=0.0) <= enough:
            break
        rest *= BASE
        enough *= BASE
    return np.concatenate(found), scale


def as_tensor(rows: npt.NDArray[np.int8]) -> Tensor:
    """A tensor over an array that may be mapped for reading only; nobody here writes to it."""
    try:
        return from_dlpack(rows)
    except (BufferError, RuntimeError, TypeError):  # NumPy before 2.1 exports no such array
        return torch.from_numpy(np.array(rows))


def in_digits(device: torch.device, dim: int) -> bool:
    """Whether vectors of M = `dim` are written in digits there, whose products are exact."""
    return device.type == "cpu" and exact_integers() and dim <= _DEEPEST


@lru_cache
def exact_integers() -> bool:
    """Whether this processor has fast int8 products, and they come out exact.

    Older ones add pairs of products in 16 bits, which can overflow.
    """
    fast = [getattr(torch.cpu, f"_is_{name}_supported", bool) for name in ("vnni", "amx_tile")]
    if not any(has() for has in fast) or not hasattr(torch, "_int_mm"):
        return False
    probe = torch.full((16, 256), LARGEST, dtype=torch.int8, device="cpu")
    product = torch._int_mm(probe, -probe.T)
    return bool((product == -256 * LARGEST**2).all())
