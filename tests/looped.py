"""Small looped models that the tests share: each has a body called several times."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sdi


class Attention(nn.Module):
    """Causal self-attention with fused qkv."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        split = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(split[0], split[1], split[2], is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))


class Block(nn.Module):
    """A block with every ordinary kind of parameter, and some raw ones."""

    def __init__(self, width: int, tokens: int = 32) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width)
        self.norm2 = nn.RMSNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)
        self.gain = nn.Parameter(torch.randn(width) * 0.1)
        self.position = nn.Embedding(tokens, width)
        self.raw = nn.Parameter(torch.randn(width, width) * 0.05)

    def forward(self, x: Tensor) -> Tensor:
        places = self.position(torch.arange(x.shape[1], device=x.device))
        x = x + self.attention(self.norm1(x) + places) * (1 + self.gain)
        hidden = self.up(self.norm2(x))
        hidden.relu_()
        return x + self.down(hidden) + torch.tanh(x @ self.raw.T)


class LoopedModel(nn.Module):
    """Embedding, one body called `steps` times, head."""

    def __init__(self, body: nn.Module, width: int = 16, vocabulary: int = 23, steps: int = 3):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.body = body
        self.head = nn.Linear(width, vocabulary)
        self.steps = steps

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        for _ in range(self.steps):
            x = self.body(x)
        return self.head(x)


class ListModel(LoopedModel):
    """A list of layers looped in Python: the list itself is never called."""

    def __init__(self, width: int = 16, layers: int = 2, loops: int = 3) -> None:
        members = nn.ModuleList(Block(width) for _ in range(layers))
        super().__init__(members, width, steps=loops)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        for _ in range(self.steps):
            for layer in self.body:  # type: ignore[attr-defined]
                x = layer(x)
        return self.head(x)


class Custom(nn.Module):
    """One body after a function of (module, x)."""

    def __init__(self, run: Any, **parameters: nn.Parameter | nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, value in parameters.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


class Square(torch.autograd.Function):
    """x · w², in a way that no torch call shows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w.square()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grads[0] * w.square(), (grads[0] * 2 * x * w).sum((0, 1))


def make(body: nn.Module | None = None, seed: int = 0, **options: Any) -> LoopedModel:
    """A looped model with fixed random weights."""
    torch.manual_seed(seed)
    width = options.pop("width", 16)
    return LoopedModel(body or Block(width), width, **options).eval()


def tokens(
    rows: int = 4, length: int = 7, seed: int = 1, vocabulary: int = 23
) -> dict[str, Tensor]:
    """A batch of random tokens; the first tokens of some rows are masked from the loss."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (rows, length), generator=generator)
    labels = ids.clone()
    for row in range(rows):
        labels[row, : row % 3] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def names(rows: int) -> list[str]:
    """Ids r0, r1, …"""
    return [f"r{i}" for i in range(rows)]


def checked(model: nn.Module, body: Any = "body", batch: Any = None, **options: Any) -> None:
    """The self-check compares with per-row autograd and raises where a step differs by 1e-3."""
    batch = batch or tokens()
    loop = sdi.Loop(model, body, **options)
    rows = len(batch["input_ids"])
    report = sdi.self_check(sdi.Sketcher(loop, dim=128), batch, names(rows), rows=3)
    assert report.worst < 1e-4 and report.conservation < 1e-4
    assert report.sketch is not None and report.sketch < 1e-4
    assert report.parameters == report.of
