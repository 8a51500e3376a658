"""What the models from the literature share: their blocks, small and in their own conventions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import WIDTH

D, HEADS = WIDTH, 2


class RMS(nn.Module):
    """RMSNorm with a gain, computed in float32."""

    def __init__(self, width: int = D) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width) + 0.1 * torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        hat = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return hat.type_as(x) * self.weight


def rms(x: Tensor) -> Tensor:
    """RMSNorm without weights."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def rotary(tokens: int, width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, (T, width) each."""
    turns = 1.0 / 100.0 ** (torch.arange(0, width, 2) / width)
    angles = torch.outer(torch.arange(tokens).float(), turns)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on (B, H, T, width)."""
    one, two = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-two, one], dim=-1) * sin).to(x.dtype)


class Cast(nn.Module):
    """A linear map that casts its weights to its input's dtype, as HRM's and TRM's."""

    def __init__(self, columns: int, rows: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, columns) / columns**0.5)
        self.bias = nn.Parameter(torch.zeros(rows)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class SelfAttention(nn.Module):
    """Fused qkv, rotary positions, and Huginn's query and key biases where asked for."""

    def __init__(self, make: Any, causal: bool = True, biased: bool = False) -> None:
        super().__init__()
        self.qkv, self.out, self.causal = make(D, 3 * D), make(D, D), causal
        self.bias = nn.Parameter(torch.randn(2, 1, HEADS, 1, D // HEADS) * 0.3) if biased else None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1)
        )
        if self.bias is not None:
            q, k = q + self.bias[0], k + self.bias[1]
        places = rotary(x.shape[1], D // HEADS)
        q, k = rotate(q, *places), rotate(k, *places)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).flatten(-2))


class SwiGLU(nn.Module):
    """Gate and up in one product, then down."""

    def __init__(self, make: Any, inner: int = 24) -> None:
        super().__init__()
        self.gate_up, self.down = make(D, 2 * inner), make(inner, D)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


def unbiased(columns: int, rows: int) -> nn.Linear:
    """`nn.Linear` without bias, by columns and rows."""
    return nn.Linear(columns, rows, bias=False)


class SandwichBlock(nn.Module):
    """A norm before and after both halves, as Ouro and Huginn have it."""

    def __init__(self, biased: bool = False) -> None:
        super().__init__()
        self.norms = nn.ModuleList([RMS() for _ in range(4)])
        self.attention, self.mlp = SelfAttention(unbiased, biased=biased), SwiGLU(unbiased)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.norms[1](self.attention(self.norms[0](x)))
        return x + self.norms[3](self.mlp(self.norms[2](x)))


class PostNormBlock(nn.Module):
    """HRM's and TRM's block: cast linear maps, a norm without weights after each half."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = SelfAttention(Cast, causal=False), SwiGLU(Cast)

    def forward(self, x: Tensor) -> Tensor:
        x = rms(x + self.attention(x))
        return rms(x + self.mlp(x))
