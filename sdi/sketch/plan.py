"""The hashes of one parameter: which bucket and sign each of its entries has.

A matrix (R, C) has TensorSketch hashes, bucket (h_out(i) + h_in(j)) mod M and sign
s_out(i)·s_in(j) (Pham & Pagh 2013), with h_out contiguous and h_in drawn without replacement, so
that up to max(R, C) = M no two entries of one row or one column collide. A stack of matrices
(E, R, C), such as the weights of experts, has such hashes for each of them; a stack whose matrices
are thinner than `THIN` (a convolution's kernel) does not count as one. Any other shape has a
CountSketch over its flattened entries (Charikar et al. 2002), without replacement as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdi import hashes

THIN = 16


@dataclass(frozen=True)
class MatrixPlan:
    """TensorSketch hashes of an (R, C) matrix.

    Attributes:
        dim: M.
        row_bucket: (R,) int64, h_out; contiguous modulo M within each block of M rows.
        row_sign: (R,) float32.
        column_bucket: (C,) int64, h_in; a permutation within each block of M columns.
        column_sign: (C,) float32.
    """

    dim: int
    row_bucket: Tensor
    row_sign: Tensor
    column_bucket: Tensor
    column_sign: Tensor

    def buckets(self) -> Tensor:
        """(R, C) int64, the bucket of every entry."""
        return (self.row_bucket[:, None] + self.column_bucket[None, :]) % self.dim

    @cached_property
    def starts(self) -> tuple[Tensor, ...]:
        """For each block of M rows (C,) int64: the bucket of its first row in every column."""
        firsts = self.row_bucket[:: self.dim]
        return tuple((self.column_bucket + first) % self.dim for first in firsts)


@dataclass(frozen=True)
class VectorPlan:
    """CountSketch hashes of D entries: `bucket` (D,) int64 and `sign` (D,) float32, M = `dim`."""

    dim: int
    bucket: Tensor
    sign: Tensor


@dataclass(frozen=True)
class StackPlan:
    """The hashes of E matrices (R, C) of one parameter (E, R, C), M = `dim`."""

    dim: int
    parts: tuple[MatrixPlan, ...]


Plan = MatrixPlan | StackPlan | VectorPlan


@dataclass(frozen=True)
class Hashing:
    """What the hashes of every parameter depend on, besides its name and shape."""

    dim: int
    seed: int
    checkpoint: str

    def plan(self, name: str, shape: tuple[int, ...], device: torch.device | str = "cpu") -> Plan:
        """The hashes of the parameter `name` of the given shape."""
        if len(shape) == 2:
            return self._matrix(name, shape, "", device)
        if len(shape) == 3 and min(shape[1:]) >= THIN:
            parts = (self._matrix(name, shape[1:], f"[{e}]", device) for e in range(shape[0]))
            return StackPlan(self.dim, tuple(parts))
        size = int(np.prod(shape, dtype=np.int64))
        bucket = hashes.buckets_without_replacement(self._stream(name, "flat"), size, self.dim)
        sign = hashes.signs(self._stream(name, "flat-sign"), size)
        return VectorPlan(
            self.dim, torch.from_numpy(bucket).to(device), torch.from_numpy(sign).to(device)
        )

    def _stream(self, name: str, role: str) -> int:
        return hashes.key(self.seed, hashes.SKETCH_VERSION, self.checkpoint, name, role)

    def _matrix(
        self, name: str, shape: tuple[int, ...], part: str, device: torch.device | str
    ) -> MatrixPlan:
        """The hashes of a matrix; `part` says which of a stack it is."""

        def stream(role: str) -> int:
            return self._stream(name, role + part)

        def on(array: np.ndarray[Any, Any]) -> Tensor:
            return torch.from_numpy(array).to(device)

        rows, columns = shape
        return MatrixPlan(
            self.dim,
            on(hashes.contiguous_buckets(stream("out"), rows, self.dim)),
            on(hashes.signs(stream("out-sign"), rows)),
            on(hashes.buckets_without_replacement(stream("in"), columns, self.dim)),
            on(hashes.signs(stream("in-sign"), columns)),
        )
