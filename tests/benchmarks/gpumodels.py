"""The models whose pass is timed on a GPU: some layers, a stack of layers looped, some layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sdi
from tests.benchmarks.workers.models import Block


@dataclass(frozen=True)
class Model:
    """Width d, heads, layers before, in and after the loop, steps τ, tokens T, rows B, M."""

    name: str
    width: int
    heads: int
    layers: tuple[int, int, int]
    steps: int
    tokens: int
    rows: int
    dim: int
    vocabulary: int
    dtype: str = "bfloat16"


# The paper's 135M model, at two sizes of batch to tell what launching costs; a stack of Ouro's
# size, of plain blocks.
MODELS = (
    Model("table 1", 768, 12, (2, 4, 2), 32, 128, 40, 8192, 50304),
    Model("table 1, 80 rows", 768, 12, (2, 4, 2), 32, 128, 80, 8192, 50304),
    Model("ouro-shaped", 2048, 16, (0, 24, 0), 4, 1024, 4, 8192, 49152),
)
SMALL = (Model("small", 32, 4, (1, 2, 1), 2, 8, 2, 64, 64),)


class LoopedStack(nn.Module):
    """Embedding, prelude, body τ times, coda, head with weights of its own."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        prelude, body, coda = (self._stack(model, count) for count in model.layers)
        self.embed = nn.Embedding(model.vocabulary, model.width)
        self.position = nn.Embedding(model.tokens, model.width)
        self.prelude, self.body, self.coda = prelude, body, coda
        self.norm = nn.LayerNorm(model.width)
        self.head = nn.Linear(model.width, model.vocabulary, bias=False)
        self.steps = model.steps

    @staticmethod
    def _stack(model: Model, count: int) -> nn.Sequential:
        return nn.Sequential(*(Block(model.width, model.heads) for _ in range(count)))

    def begin(self, input_ids: Tensor) -> Tensor:
        """(B, T, d): the state that enters the loop."""
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        return self.prelude(self.embed(input_ids) + self.position(places))

    def finish(self, x: Tensor) -> Tensor:
        """(B, T, V): the loop and what follows."""
        for _ in range(self.steps):
            x = self.body(x)
        return self.head(self.norm(self.coda(x)))

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.finish(self.begin(input_ids))


def passes(case: Model, device: str) -> dict[str, Callable[[], Any]]:
    """A training step, the floor (no weight gradients), and our pass with each evaluation."""
    torch.manual_seed(0)
    with torch.device(device):
        model = LoopedStack(case).to(getattr(torch, case.dtype))
        ids = torch.randint(0, case.vocabulary, (case.rows, case.tokens))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    names = [str(row) for row in range(case.rows)]
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)

    def train() -> None:
        sdi.causal_lm_loss(model, batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    def floor() -> None:
        model.requires_grad_(False)
        state = model.begin(ids).requires_grad_()
        logits = model.finish(state)[:, :-1].flatten(0, 1).float()
        torch.autograd.grad(F.cross_entropy(logits, ids[:, 1:].flatten()), state)
        model.requires_grad_(True)

    found: dict[str, Callable[[], Any]] = {"training step": train, "floor": floor}
    for method in ("outer", "fourier", "auto"):
        sketcher = sdi.Sketcher(sdi.Loop(model, "body"), dim=case.dim, method=method)
        found[method] = lambda sketcher=sketcher: sketcher(batch, names)
    return found


def operations(case: Model, what: str) -> float:
    """Of a piece of `passes` over a batch, in its matrix products; attention's own are left out.

    Two for each weight and token: forward, backward to the activations, and the product δᵀa, which
    the floor has nowhere, our pass in the body, and a training step everywhere.
    """
    layer = 12 * case.width**2
    before, body, after = layer * case.layers[0], layer * case.layers[1], layer * case.layers[2]
    body, after = body * case.steps, after + case.width * case.vocabulary
    used = 2 * before + 4 * (body + after)
    if what == "training step":
        used += 4 * before + 2 * (body + after)
    elif what != "floor":
        used += 2 * body
    return float(case.rows * case.tokens * used)
