"""Random models as plain data: a tree of layers for each member of a body, and how it is looped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.zoo.case import VOCABULARY, WIDTH, Case, pick, tokens
from tests.zoo.kinds import KINDS
from tests.zoo.looped import lm, row_losses

Tree = tuple[Any, ...]


@dataclass(frozen=True)
class Plan:
    """A drawn model.

    Attributes:
        members: the body's members, a tree each.
        schedule: for each loop, which members are called, in that order.
        layout: of the body's input: "rows" (B, T, d), "flat" (B·T, d) or "second" (T, B, d).
        without: loops under no_grad; the last is never one.
        detached: loops that begin with a detached state.
        injected: whether the embedding is added to the state at each loop.
        supervised: whether the losses of all loops with gradient count.
        depths: rows stop after so many loops; empty where all run to the end.
        rows, length: B and T.
        double: float64 weights instead of float32.
        seed: of weights and tokens.
    """

    members: tuple[Tree, ...]
    schedule: tuple[tuple[int, ...], ...]
    layout: str = "rows"
    without: tuple[int, ...] = ()
    detached: tuple[int, ...] = ()
    injected: bool = False
    supervised: bool = False
    depths: tuple[int, ...] = ()
    rows: int = 3
    length: int = 5
    double: bool = True
    seed: int = 0


class Grown(nn.Module):
    """A layer after a tree.

    Args:
        tree: what to build.
        made: the leaves so far, which "shared" refers to, and whether they treat tokens alone.
        token: whether the layer is handed something else than (B, T, d).
    """

    def __init__(self, tree: Tree, made: list[tuple[nn.Module, bool]], token: bool) -> None:
        super().__init__()
        self.what = tree[0]
        fitting = [module for module, alone in made if alone or not token]
        if self.what == "leaf":
            self.inner = KINDS[tree[1]].make()
            made.append((self.inner, KINDS[tree[1]].token))
        elif self.what == "shared":
            self.inner = fitting[tree[1] % len(fitting)] if fitting else nn.Linear(WIDTH, WIDTH)
            self.what = "leaf" if fitting else "bare"
        else:
            token = token or self.what in RESHAPED
            self.parts = nn.ModuleList([Grown(part, made, token) for part in tree[1:]])

    def forward(self, x: Tensor, t: int = 0) -> Tensor:
        if self.what in ("leaf", "bare"):
            return self.inner(x, t) if self.what == "leaf" else self.inner(x)
        first, *rest = self.parts
        return _COMBINED[self.what](x, t, first, *rest)


def _rows_alone(x: Tensor, t: int, a: nn.Module) -> Tensor:
    """Only rows of the leading axis whose first features are positive go through the layer."""
    mine = (x.detach()[..., 0].flatten(1).sum(1) > 0).nonzero()[:, 0]
    return x.index_copy(0, mine, a(x[mine], t)) if len(mine) else x


def _in_place(x: Tensor, t: int, a: nn.Module) -> Tensor:
    y = a(x, t) * 1.0
    y += x
    y.mul_(0.5)
    return y.tanh_()


_COMBINED: dict[str, Any] = {
    "chain": lambda x, t, a, b: b(torch.tanh(a(x, t)), t),
    "sum": lambda x, t, a, b: a(x, t) + 0.5 * b(x, t),
    "gate": lambda x, t, a, b: a(x, t) * torch.sigmoid(b(x, t)),
    "residual": lambda x, t, a: x + torch.tanh(a(x, t)),
    "twice": lambda x, t, a: a(torch.tanh(a(x, t)), t),
    "where": lambda x, t, a, b: torch.where(x > 0, a(x, t), b(x, t)),
    "stopped": lambda x, t, a: x + a(x.detach(), t),
    "joined": lambda x, t, a, b: torch.stack([a(x, t), b(x, t)], dim=-1).mean(-1),
    "in place": _in_place,
    "again": lambda x, t, a: checkpoint(a, x, t, use_reentrant=False),
    "flat": lambda x, t, a: a(x.reshape(-1, WIDTH), t).view(x.shape),
    "second": lambda x, t, a: a(x.transpose(0, 1), t).transpose(0, 1),
    "second, copied": lambda x, t, a: a(x.transpose(0, 1).contiguous(), t).transpose(0, 1),
    "one more axis": lambda x, t, a: a(x.unsqueeze(1), t).squeeze(1),
    "reversed": lambda x, t, a: a(x.flip(1), t).flip(1),
    "rows alone": _rows_alone,
}
ONE = ("residual", "twice", "stopped", "in place", "again")
TWO = ("chain", "sum", "gate", "where", "joined")
RESHAPED = ("flat", "second", "second, copied", "one more axis")
ROWWISE = ("reversed", "rows alone")


class GrownLoop(nn.Module):
    """Embedding, the plan's loops over its members, head."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        made: list[tuple[nn.Module, bool]] = []
        self.plan, self.embed = plan, nn.Embedding(VOCABULARY, WIDTH)
        token = plan.layout != "rows"
        self.body = nn.ModuleList([Grown(tree, made, token) for tree in plan.members])
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.states: list[Tensor] = []

    def forward(self, input_ids: Tensor, depth: Tensor | None = None) -> Tensor:
        plan, e = self.plan, self.embed(input_ids)
        x, self.states = e, []
        for loop, order in enumerate(plan.schedule):
            x = x.detach() if loop in plan.detached else x
            with torch.set_grad_enabled(loop not in plan.without):
                y = self._step(x + e if plan.injected else x, order, loop)
            if depth is not None:
                y = torch.where((loop < depth)[:, None, None], y, x)
            x = y
            if loop not in plan.without:
                self.states.append(x)
        return self.head(x)

    def _step(self, x: Tensor, order: tuple[int, ...], loop: int) -> Tensor:
        shape = x.shape
        flat, second = self.plan.layout == "flat", self.plan.layout == "second"
        x = x.reshape(-1, WIDTH) if flat else x.transpose(0, 1) if second else x
        for member in order:
            x = F.layer_norm(self.body[member](x, loop), (WIDTH,))
        return x.view(shape) if flat else x.transpose(0, 1) if second else x


def _supervised(model: Any, batch: Any) -> Tensor:
    lm(model, batch)
    return torch.stack([row_losses(model.head(x), batch["labels"]) for x in model.states]).sum(0)


def grown(plan: Plan) -> Case:
    """The case of a plan."""
    torch.manual_seed(plan.seed)
    model = GrownLoop(plan)
    batch = tokens(plan.rows, plan.length, seed=plan.seed)
    batch["labels"] = batch["input_ids"]
    if plan.depths:
        batch["depth"] = torch.tensor(plan.depths)
    return Case(
        model.double() if plan.double else model, batch, pick(batch), "body",
        _supervised if plan.supervised else lm, plan.rows,
    )  # fmt: skip
