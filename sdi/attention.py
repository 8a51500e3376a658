"""Attention of a captured pass on a CPU: compiled, and its gradient always in float32.

torch's flash attention for CPUs multiplies small blocks through a library, at a fifth to a half of
what the processor can do, and gains little from a second core. Where numba is installed, that of
`sdi.compiled` serves float32; on two cores of an AMD processor with AVX-512 it takes 0.2 to 0.7 of
the time, as near to float64. Which of the two is quicker is measured (`sdi.sketch.costs`), and
heads so few that threads would have nothing to do are left to torch.

In half precision the gradient of short rows is torch's weak spot: 17 ms in bfloat16 and 24 in
float16 where float32 takes 5 to 7 (64 rows of 64 tokens, 4 heads of 32). So it is taken in float32,
of copies, and rounded once at the end: compiled, for rows of any length, in 0.15 to 1.0 of the time
(0.03 to 0.15 in float16); without numba by torch, where tokens T times width of a head D are few.
The results are nearer to float64: 2·10⁻³ off instead of 3 to 5·10⁻³. The forward pass stays the
call that torch itself makes.

In a deep recurrence the rounding of half precision grows, and two ways to the same gradient differ:
in a TRM of 18 steps with bfloat16 activations this one and plain autograd by 0.4 to 3.5 %, where
either is 3 to 200 % off float64. A check against plain autograd must not take that for an error of
the pass, so it runs with torch's own gradient (`torchs_own`) and compares the two loosely. In
float32 there is no need: the check sees the pass as it is.

What is left to torch whole: float64, dropout, fewer heads of keys than of queries, masks that
require a gradient, autocast, tensors that are not plain, transforms of torch.func, and whatever
torch does not choose flash attention for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from sdi import team
from sdi.flash import TORCHS, Flash, Options, compiled
from sdi.onednn import is_plain, is_transformed
from sdi.rules.use import HALVES
from sdi.sketch.costs import costs, multiplies_bfloat16

LARGE = 1 << 17
"""Multiply-adds of a product of all heads from which compiled attention is worth its call."""
SHORT = 1 << 13
"""Tokens times the width of a head up to which bfloat16 gains by torch's kernel for float32."""
_FLASH = 1  # torch.nn.attention.SDPBackend.FLASH_ATTENTION
_left: ContextVar[bool] = ContextVar("attention is left to torch", default=False)
_served = [0]


@contextmanager
def torchs_own() -> Iterator[None]:
    """Meanwhile attention in half precision is that of plain autograd, to the bit."""
    token = _left.set(True)
    try:
        yield
    finally:
        _left.reset(token)


def served() -> int:
    """How many calls of this process had a gradient in float32 in place of half precision."""
    return _served[0]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """As `F.scaled_dot_product_attention`, or None where it is to be left to it; (B, H, T, D)."""
    if enable_gqa is not False or dropout_p != 0.0:
        return None
    if not _suits(query, key, value, attn_mask, is_causal, scale):
        return None
    _served[0] += query.dtype in HALVES
    options = Options(_added(attn_mask, query.dtype), is_causal, scale)
    found: Tensor = _Attention.apply(query, key, value, options)  # type: ignore[no-untyped-call]
    return found


class _Attention(torch.autograd.Function):
    """Flash attention, whose gradient is taken in float32."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor:
        operands = query, key, value
        kernels = (query.dtype == torch.float32 and _compiled(query, key)) or TORCHS
        results = kernels.forward(operands, options)
        ctx.save_for_backward(*operands, *results, options.mask)
        ctx.options = options._replace(mask=None)
        return results[0]

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, logarithms, mask = ctx.saved_tensors  # may run a region again, to be seen
        tensors, kind, kernels = [*deltas, *tensors], tensors[0].dtype, TORCHS
        with torch._C.DisableTorchFunction():
            if not (torch.is_grad_enabled() or is_transformed(deltas[0])):
                tensors = [tensor.float() for tensor in tensors]
                mask = mask if mask is None else mask.float()
                kernels = _compiled(tensors[1], tensors[2]) or TORCHS
            delta, query, key, value, output = tensors
            options = ctx.options._replace(mask=mask)
            found = kernels.backward(delta, (query, key, value), (output, logarithms), options)
            return *(gradient.to(kind) for gradient in found), None


def _compiled(query: Tensor, key: Tensor) -> Flash | None:
    """The compiled kernels, where they do better than torch's in float32."""
    rows, heads, tokens, width = query.shape
    large = rows * heads * tokens * key.shape[2] * width >= LARGE
    threads = torch.get_num_threads()
    if not large or rows * heads < threads or team.size() < threads:
        return None
    return compiled() if costs(query.device).compiles_attention else None


def _added(mask: Tensor | None, kind: torch.dtype) -> Tensor | None:
    """A mask as what is added to the scores, as torch makes it of one that says what to keep."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=kind).masked_fill_(~mask, -torch.inf)


def _suits(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
) -> bool:
    operands = (query, key, value)
    kinds = (torch.float32,) if _left.get() else (torch.float32, *HALVES)
    if not (torch.is_grad_enabled() and all(is_plain(t, kinds) and t.numel() for t in operands)):
        return False
    if mask is not None and (
        causal
        or not is_plain(mask, (query.dtype, torch.bool))
        or mask.requires_grad
        or mask.ndim not in (2, 4)  # torch's wrapper gives others their axes
    ):
        return False
    return (
        len({t.dtype for t in operands}) == 1
        and key.shape == value.shape
        and any(t.requires_grad for t in operands)
        and not torch.is_autocast_enabled("cpu")
        and not is_transformed(query)
        and _gains(query, key)
        and torch._fused_sdp_choice(query, key, value, mask, 0.0, causal, scale=scale) == _FLASH
    )


def _gains(query: Tensor, key: Tensor) -> bool:
    """Whether there is a quicker way than torch's; in half precision, with the copies it needs."""
    if query.ndim != 4 or key.ndim != 4:
        return False
    if _compiled(query, key) is not None:
        return True
    if query.dtype == torch.float32:
        return False
    if query.dtype == torch.float16 or not multiplies_bfloat16(query.device):
        return True
    return max(query.shape[2], key.shape[2]) * query.shape[3] <= SHORT
