"""Attention that keeps no matrix of scores, and its gradient, on a CPU: torch's and a compiled one.

Letters: B rows, H heads, T queries, N keys, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdi import team

_aten = torch.ops.aten
Three = tuple[Tensor, Tensor, Tensor]


class Options(NamedTuple):
    """What is done to the scores.

    Attributes:
        mask: added to them, broadcast to (B, H, T, N); or None.
        causal: whether query t sees keys up to t only.
        scale: factor of the products; 1/√D where it is None.
    """

    mask: Tensor | None
    causal: bool
    scale: float | None


class Flash(NamedTuple):
    """One way to attention.

    Attributes:
        forward: (query, key and value, options) → output (B, H, T, D) and the logarithms of the
            sums of exponentials (B, H, T).
        backward: (gradient of the output, query, key and value, output and logarithms, options) →
            gradients of query, key and value.
    """

    forward: Callable[[Three, Options], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Three, tuple[Tensor, Tensor], Options], Three]


def _forward(operands: Three, options: Options) -> tuple[Tensor, Tensor]:
    mask, causal, scale = options
    found: tuple[Tensor, Tensor] = _aten._scaled_dot_product_flash_attention_for_cpu(
        *operands, 0.0, causal, attn_mask=mask, scale=scale
    )
    return found


def _backward(
    delta: Tensor, operands: Three, results: tuple[Tensor, Tensor], options: Options
) -> Three:
    mask, causal, scale = options
    found: Three = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        delta, *operands, *results, 0.0, causal, attn_mask=mask, scale=scale
    )
    return found


TORCHS = Flash(_forward, _backward)
"""torch's own, in the type of the operands."""


@cache
def compiled() -> Flash | None:
    """That of `sdi.compiled`, in float32; None without numba."""
    kernels = team.kernels("flash")
    if kernels is None:
        return None

    def forward(operands: Three, options: Options) -> tuple[Tensor, Tensor]:
        query = operands[0]
        results = _written(query), query.new_empty(query.shape[:3])
        _run(kernels, operands, results, options)
        return results

    def backward(
        delta: Tensor, operands: Three, results: tuple[Tensor, Tensor], options: Options
    ) -> Three:
        query, key, value = operands
        found = _written(query), _written(key), _written(value)
        _run(kernels, operands, results, options, delta, *found)
        return found

    return Flash(forward, backward)


def _written(like: Tensor) -> Tensor:
    """To be written, in the order of axes of an operand, as torch's own kernel does."""
    found = torch.empty_like(like)
    return found if found.stride(-1) == 1 else like.new_empty(like.shape)


def _run(
    kernels: Any, operands: Three, results: tuple[Tensor, Tensor], options: Options, *more: Tensor
) -> None:
    """Run a kernel of `sdi.compiled.flash`, which says what a job is; with `more`, backward."""
    query, key, value = operands
    rows, heads, queries, width = query.shape
    keys = key.shape[2]
    assert key.shape == value.shape == (rows, heads, keys, width), (key.shape, value.shape)
    scale = width**-0.5 if options.scale is None else options.scale
    mask = options.mask
    if mask is not None:
        mask = mask.expand(rows, heads, queries, keys)
    output, logarithms = results
    every = [*operands, mask, output, logarithms[..., None], *more]
    laid = [None if tensor is None else _laid(tensor) for tensor in every]
    threads = team.size()
    scratch = query.new_empty(threads, kernels.room(keys, width, backward=bool(more)))
    sizes = rows, heads, queries, keys, width, int(options.causal), team.bits(scale)
    places = (number for tensor in laid for number in _place(tensor))
    kernel = kernels.backward if more else kernels.forward
    team.run(kernel, [0, 0, scratch.data_ptr(), *sizes, *places], threads)


def _laid(tensor: Tensor) -> Tensor:
    """In memory as it is, with its last axis one number after another."""
    assert tensor.dtype == torch.float32, tensor.dtype
    tensor = team.in_memory(tensor)
    return tensor if tensor.shape[-1] == 1 or tensor.stride(-1) == 1 else tensor.contiguous()


def _place(tensor: Tensor | None) -> Sequence[int]:
    """The address, and bytes along the first three axes."""
    if tensor is None:
        return 0, 0, 0, 0
    return tensor.data_ptr(), *(4 * stride for stride in tensor.stride()[:3])
