"""Attention of a captured pass on a CPU: gradients in float32 where the model is in half precision.

torch's flash attention for CPUs is slow at the gradient of short sequences in half precision: 17 ms
in bfloat16 and 24 in float16 where float32 takes 5 to 7 (64 rows of 64 tokens, 4 heads of 32). So
its backward kernel is given float32 copies of what it would get, and its results are rounded once,
at the end. Time with the copies over time without, by tokens T times width of a head D, on an AMD
processor that multiplies bfloat16: 0.15 to 0.6 up to 2¹², 0.5 to 1.0 at 2¹³, 0.8 to 1.0 at 2¹⁴, 1.2
to 1.4 beyond; in float16 0.1 to 0.5 everywhere. The results are nearer to float64: 2·10⁻³ off
instead of 3 to 5·10⁻³.

In a deep recurrence the rounding of half precision grows, and two ways to the same gradient differ:
in a TRM of 18 steps with bfloat16 activations this one and plain autograd by 0.4 to 3.5 %, where
either is 3 to 200 % off float64. A check against plain autograd must not take that for an error of
the pass, so it runs with torch's own gradient (`torchs_own`) and compares the two loosely. Whether
a row's attention goes this way depends on T, the width of its batch.

The forward pass is the call that torch itself makes. What is left to torch whole: float32, dropout,
fewer heads of keys than of queries, masks that require a gradient, autocast, tensors that are not
plain, transforms of torch.func, and whatever torch does not choose flash attention for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from sdi.onednn import is_plain, is_transformed
from sdi.rules.use import HALVES
from sdi.sketch.costs import multiplies_bfloat16

SHORT = 1 << 13
"""Tokens times the width of a head up to which bfloat16 gains, where it is multiplied as such."""
_FLASH = 1  # torch.nn.attention.SDPBackend.FLASH_ATTENTION
_aten = torch.ops.aten
_left: ContextVar[bool] = ContextVar("attention is left to torch", default=False)
_served = [0]


@contextmanager
def torchs_own() -> Iterator[None]:
    """Meanwhile gradients of attention are those of plain autograd, to the bit."""
    token = _left.set(True)
    try:
        yield
    finally:
        _left.reset(token)


def served() -> int:
    """How many calls of this process were not left to torch."""
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
    plain = enable_gqa is False and dropout_p == 0.0 and not _left.get()
    if not plain or not _suits(query, key, value, attn_mask, is_causal, scale):
        return None
    _served[0] += 1
    mask = _added(attn_mask, query.dtype)
    found: Tensor = _Attention.apply(query, key, value, mask, is_causal, scale)  # type: ignore[no-untyped-call]
    return found


class _Attention(torch.autograd.Function):
    """torch's flash attention, and its gradient in float32."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        query, key, value, mask, causal, scale = given
        found, logsumexp = _aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=mask, scale=scale
        )
        ctx.save_for_backward(query, key, value, found, logsumexp, mask)
        ctx.options = (causal, scale)
        return found  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *deltas: Tensor) -> tuple[Tensor | None, ...]:
        *operands, logsumexp, mask = ctx.saved_tensors
        causal, scale = ctx.options
        tensors, kind = [*deltas, *operands], operands[0].dtype
        if not (torch.is_grad_enabled() or is_transformed(deltas[0])):
            tensors = [tensor.float() for tensor in tensors]
            mask = mask if mask is None else mask.float()
        found = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *tensors, logsumexp, 0.0, causal, attn_mask=mask, scale=scale
        )
        return *(gradient.to(kind) for gradient in found), None, None, None


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
    if not (torch.is_grad_enabled() and all(is_plain(t, HALVES) and t.numel() for t in operands)):
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
        and any(t.requires_grad for t in operands)
        and not torch.is_autocast_enabled("cpu")
        and not is_transformed(query)
        and _gains(query, key)
        and torch._fused_sdp_choice(query, key, value, mask, 0.0, causal, scale=scale) == _FLASH
    )


def _gains(query: Tensor, key: Tensor) -> bool:
    """Whether the copies cost less than they gain."""
    if query.ndim != 4 or key.ndim != 4:
        return False
    if query.dtype == torch.float16 or not multiplies_bfloat16(query.device):
        return True
    return max(query.shape[2], key.shape[2]) * query.shape[3] <= SHORT
