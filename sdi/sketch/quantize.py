"""Store a vector as int8 with one scale.

Symmetric: the largest magnitude becomes 127, so zero stays zero and no offset has to be carried
through an inner product. Rounding adds an error of at most half a scale to each of M entries,
uncorrelated between vectors; at M in the thousands that is far below the sketch's own noise.

Letters: M sketch dimension; ``...`` any leading shape.
"""

from __future__ import annotations

from typing import overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sdi.errors import SdiError

LARGEST = 127

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.int8]


@overload
def quantize(values: Tensor) -> tuple[Tensor, Tensor]: ...
@overload
def quantize(values: npt.NDArray[np.floating]) -> tuple[Bytes, Floats]: ...
def quantize(
    values: Tensor | npt.NDArray[np.floating],
) -> tuple[Tensor, Tensor] | tuple[Bytes, Floats]:
    """Round each vector to int8 with a scale of its own.

    Args:
        values: (..., M) floating, a torch tensor or a numpy array; computed in float32.

    Returns:
        int8 (..., M) in -127..127 and float32 scale (...,), of the same kind as ``values``, with
        ``values ≈ int8 * scale[..., None]``. A zero vector has scale 0.

    Raises:
        SdiError: a vector holds NaN or infinity.
    """
    if isinstance(values, Tensor):
        return _quantize_torch(values.detach().float())
    return _quantize_numpy(np.asarray(values, dtype=np.float32))


@overload
def dequantize(stored: Tensor, scale: Tensor) -> Tensor: ...
@overload
def dequantize(stored: Bytes, scale: Floats) -> Floats: ...
def dequantize(stored: Tensor | Bytes, scale: Tensor | Floats) -> Tensor | Floats:
    """Return float32 (..., M) from int8 (..., M) and float32 scale (...,)."""
    if isinstance(stored, Tensor) and isinstance(scale, Tensor):
        return stored.float() * scale[..., None]
    block: Floats = np.asarray(stored).astype(np.float32)
    block *= np.asarray(scale, dtype=np.float32)[..., None]
    return block


def _quantize_torch(values: Tensor) -> tuple[Tensor, Tensor]:
    scale = values.abs().amax(dim=-1) / LARGEST
    if not bool(torch.isfinite(scale).all()):
        raise _not_finite(int((~torch.isfinite(scale)).sum()))
    # Dividing by one where the scale is zero keeps the zero vector zero; the clamp matters only
    # for subnormal scales, which round by more than one part in 127.
    divisor = torch.where(scale > 0, scale, 1.0)[..., None]
    stored = (values / divisor).round_().clamp_(-LARGEST, LARGEST)
    return stored.to(torch.int8), scale


def _quantize_numpy(values: Floats) -> tuple[Bytes, Floats]:
    scale = (np.abs(values).max(axis=-1) / np.float32(LARGEST)).astype(np.float32)
    if not np.isfinite(scale).all():
        raise _not_finite(int((~np.isfinite(scale)).sum()))
    divisor = np.where(scale > 0, scale, np.float32(1))[..., None]
    stored = np.clip(np.rint(values / divisor), -LARGEST, LARGEST)
    return stored.astype(np.int8), scale


def _not_finite(count: int) -> SdiError:
    return SdiError(
        f"{count} vector(s) to be stored hold NaN or infinity; expected finite values. Look at "
        "these rows' losses and at the checkpoint's weights, or run in float32"
    )
