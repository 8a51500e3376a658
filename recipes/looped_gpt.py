"""A small looped GPT in plain torch: the model that the shipped recipes train and audit.

How it works: token and position embeddings make e (the prelude); one ``body`` with one set of
weights is called ``depth`` times, h_t = body(h_{t-1} + e) with h_0 = 0; a norm and a read-out
make the logits (the coda). Adding e at every step ("input injection") keeps the prompt in reach
of late steps, so that depth is used for computing rather than for remembering.

Why this way: everything that holds a parameter is a plain ``nn.Linear``, ``nn.Embedding`` or
``nn.LayerNorm``, so that a reader can check a step gradient by hand; attention itself goes
through ``scaled_dot_product_attention``, which has no parameters. What it gives up: no key/value
cache (greedy decoding recomputes the prefix), no left padding, no dropout.

Letters: B examples, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY = 259  # 256 bytes, then padding, beginning and end: curate's byte tokenizer


class Block(nn.Module):
    """Pre-norm attention and a two-layer perceptron, each added to the residual stream."""

    def __init__(self, width: int, heads: int, expansion: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}; change either")
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.attention_in = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, expansion * width, bias=False)
        self.mlp_out = nn.Linear(expansion * width, width, bias=False)

    def attend(self, x: Tensor) -> Tensor:
        """Causal self-attention of x (B, T, D) -> (B, T, D)."""
        rows, tokens, width = x.shape
        parts = self.attention_in(x).view(rows, tokens, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.attention_out(mixed.transpose(1, 2).reshape(rows, tokens, width))

    def forward(self, x: Tensor) -> Tensor:
        """X (B, T, D) -> (B, T, D)."""
        x = x + self.attend(self.attention_norm(x))
        hidden = functional.gelu(self.mlp_in(self.mlp_norm(x)))
        return x + self.mlp_out(hidden)


class LoopedGPT(nn.Module):
    """A causal language model whose ``body`` is applied ``depth`` times with tied weights."""

    def __init__(
        self,
        *,
        vocabulary: int = VOCABULARY,
        context: int = 64,
        width: int = 64,
        heads: int = 4,
        blocks: int = 1,
        depth: int = 6,
        expansion: int = 4,
        positions: str = "random",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if positions not in ("random", "waves"):
            raise ValueError(f"positions is {positions!r}; expected random or waves")
        self.context, self.depth, self.positions = context, depth, positions
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.body = nn.Sequential(*(Block(width, heads, expansion) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.reset(seed)

    def reset(self, seed: int) -> None:
        """Draw every matrix afresh from ``seed`` alone, whatever the global generator did."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                continue
            embedding = name.startswith(("token.", "position."))
            scale = 0.5 if embedding else parameter.shape[1] ** -0.5
            if name.endswith("_out.weight"):  # residual branches start small: depth is stable
                scale *= self.depth**-0.5
            with torch.no_grad():
                parameter.normal_(0.0, scale, generator=generator)
        if self.positions == "waves":
            with torch.no_grad():
                self.position.weight.copy_(waves(*self.position.weight.shape))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """input_ids (B, T) int64, attention_mask (B, T) or None -> logits (B, T, V).

        Padding goes on the right, where causal attention cannot see it: outputs of real tokens
        do not depend on it. Raises ValueError on padding at the left and on T over the context.
        """
        self._refuse(input_ids, attention_mask)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        embedded = self.token(input_ids) + self.position(positions)
        hidden = torch.zeros_like(embedded)
        for _ in range(self.depth):
            hidden = self.body(hidden + embedded)
        return self.head(self.norm(hidden))

    def _refuse(self, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        tokens = input_ids.shape[1]
        if tokens > self.context:
            raise ValueError(
                f"a batch has {tokens} tokens, the model's context is {self.context}; "
                "set data max_tokens to the context, or build the model with a longer one"
            )
        if attention_mask is not None and bool((attention_mask.diff(dim=1) > 0).any()):
            raise ValueError("attention_mask has padding on the left; pad on the right")


def waves(context: int, width: int, scale: float = 0.5) -> Tensor:
    """Sines and cosines (context, width) to start positions from: neighbours look alike."""
    rates = torch.exp(-math.log(100.0) * torch.arange(width // 2) / (width // 2))
    angles = torch.arange(context)[:, None] * rates
    return functional.pad(torch.cat([angles.sin(), angles.cos()], 1), (0, width % 2)) * scale


def build(**args: Any) -> LoopedGPT:
    """The recipe's ``model.source``: a fresh LoopedGPT; arguments as in its constructor."""
    return LoopedGPT(**args)


def save(model: nn.Module, directory: Path, *, step: int, learning_rate: float) -> Path:
    """Write ``model.safetensors`` and ``training.json`` {step, learning_rate} into directory.

    Both are written under a temporary name and renamed; the weights come last, so that a
    directory that holds them is whole. Returns the path of the weights.
    """
    directory.mkdir(parents=True, exist_ok=True)
    note = directory / "training.json"
    partial_note = note.with_suffix(".json.partial")
    partial_note.write_text(json.dumps({"step": step, "learning_rate": learning_rate}) + "\n")
    partial_note.replace(note)
    weights = directory / "model.safetensors"
    partial = directory / "model.safetensors.partial"
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, partial)
    partial.replace(weights)
    return weights


def load(model: nn.Module, weights: Path) -> None:
    """Load weights that `save` wrote, strictly: missing or unexpected names raise."""
    model.load_state_dict(load_file(weights), strict=True)
