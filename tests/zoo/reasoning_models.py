"""HRM and TRM: nested cycles, mostly without gradient, and a carry between supervised steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.case import VOCABULARY, WIDTH, Case, pick, tokens
from tests.zoo.literature import Cast, PostNormBlock

D = WIDTH
REASONING: dict[str, Callable[[], Case]] = {}
Carry = dict[str, Tensor]


class Level(nn.Module):
    """A reasoning module: its input is added to its state, then blocks."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([PostNormBlock() for _ in range(blocks)])

    def forward(self, state: Tensor, given: Tensor) -> Tensor:
        state = state + given
        for layer in self.layers:
            state = layer(state)
        return state


class Inner(nn.Module):
    """What HRM and TRM share: embedding, head, halting head, states learned by nobody."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, D), Cast(D, VOCABULARY)
        self.halt, self.dtype = Cast(D, 2, bias=True), dtype
        self.register_buffer("start", torch.randn(2, D))

    def first(self, ids: Tensor) -> Carry:
        """The carry of rows that begin."""
        high, low = (state.to(self.dtype).expand(*ids.shape, D) for state in self.start)
        return {"high": high, "low": low, "halted": torch.ones(len(ids), dtype=torch.bool)}

    def restarted(self, carry: Carry, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The states, begun anew where the row had halted."""
        anew, halted = self.first(ids), carry["halted"][:, None, None]
        return (
            torch.where(halted, anew["high"], carry["high"]),
            torch.where(halted, anew["low"], carry["low"]),
        )

    def finished(self, high: Tensor, low: Tensor) -> tuple[Carry, Tensor, Tensor]:
        """The detached carry, (B, T, V) logits and (B, 2) halting logits."""
        halt = self.halt(high[:, 0]).float()
        halted = (halt[:, 0] > halt[:, 1]).detach()
        carry = {"high": high.detach(), "low": low.detach(), "halted": halted}
        return carry, self.head(high), halt


class HRM(Inner):
    """Two levels; all cycles but the very last low and high step run without gradient."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(dtype)
        self.H_level, self.L_level = Level(1), Level(1)

    def forward(self, carry: Carry, ids: Tensor) -> tuple[Carry, Tensor, Tensor]:
        x = (D**0.5 * self.embed(ids)).to(self.dtype)
        high, low = self.restarted(carry, ids)
        with torch.no_grad():
            for cycle in range(2):
                for step in range(2):
                    if not (cycle == 1 and step == 1):
                        low = self.L_level(low, high + x)
                if cycle == 0:
                    high = self.H_level(high, low)
        low = self.L_level(low, high + x)
        return self.finished(self.H_level(high, low), low)


class TRM(Inner):
    """One small network for both states; the last of three cycles has its whole gradient."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(dtype)
        self.L_level = Level(2)

    def forward(self, carry: Carry, ids: Tensor) -> tuple[Carry, Tensor, Tensor]:
        x = (D**0.5 * self.embed(ids)).to(self.dtype)
        high, low = self.restarted(carry, ids)
        with torch.no_grad():
            for _ in range(2):
                high, low = self._cycle(high, low, x)
        return self.finished(*self._cycle(high, low, x))

    def _cycle(self, high: Tensor, low: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        for _ in range(2):
            low = self.L_level(low, high + x)
        return self.L_level(high, low), low


def _stablemax_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """(B,): stablemax cross-entropy in float64, over each row's own targets."""
    logits = logits.double()
    kept = torch.where(logits < 0, 1 / (1 - logits + 1e-30), logits + 1)
    share = (kept / kept.sum(-1, keepdim=True)).log()
    valid = labels != -100
    picked = share.gather(-1, torch.where(valid, labels, 0)[..., None]).squeeze(-1)
    return -(picked * valid).sum(1) / valid.sum(1)


def _supervised(segments: int) -> Any:
    """(model, batch) → (B,): the losses of every supervised step, the carry detached between."""

    def loss(model: Any, batch: Any) -> Tensor:
        carry, total = model.first(batch["input_ids"]), 0.0
        for _ in range(segments):
            carry, logits, halt = model(carry, batch["input_ids"])
            solved = (logits.argmax(-1) == batch["labels"]).all(1).float()
            right = nn.functional.binary_cross_entropy_with_logits(
                halt[:, 0], solved, reduction="none"
            )
            total = total + _stablemax_losses(logits, batch["labels"]) + 0.5 * right
        return total.float()

    return loss


def _case(model: nn.Module, body: Any, segments: int, **more: Any) -> Case:
    batch = tokens()
    return Case(model.eval(), batch, pick(batch), body, loss=_supervised(segments), **more)


BOTH, HALF = ["L_level", "H_level"], torch.bfloat16
REASONING["HRM, one supervised step"] = lambda: _case(HRM(), BOTH, 1)
REASONING["HRM, three supervised steps"] = lambda: _case(HRM(), BOTH, 3)
REASONING["HRM, the low level"] = lambda: _case(HRM(), "L_level", 2, steps=8)
REASONING["HRM, bf16 activations"] = lambda: _case(HRM(HALF), BOTH, 2, bound=1e-2)
REASONING["TRM, one supervised step"] = lambda: _case(TRM(), "L_level", 1, steps=9)
REASONING["TRM, three supervised steps"] = lambda: _case(TRM(), "L_level", 3, steps=27)
REASONING["TRM, bf16 activations"] = lambda: _case(TRM(HALF), "L_level", 2, bound=1e-2)
