"""Loop structures whose depth or initial state is random, chosen by row, or found while running."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.case import LOOPS, ROWS, WIDTH, Case, Make
from tests.zoo.loop_structures import case
from tests.zoo.looped import Structures, lm
from tests.zoo.parts import linear

D = WIDTH
DEPTH = Structures()


@DEPTH.named("random depth per batch, seeded")
def _per_batch(make: Make) -> Case:
    def run(m: Any, x: Tensor, _: Any) -> Tensor:
        for t in range(int(torch.randint(2, 6, ()))):
            x = m.body(x, t)
        return x

    def loss(model: nn.Module, batch: Any) -> Tensor:
        torch.manual_seed(7)
        return lm(model, batch)

    return case(run, make(), loss=loss)


@DEPTH.named("depth per sequence, by mask")
def _by_mask(make: Make) -> Case:
    def run(m: Any, x: Tensor, rest: Any) -> Tensor:
        for t in range(int(rest["depth"].max())):
            x = torch.where((t < rest["depth"])[:, None, None], m.body(x, t), x)
        return x

    return case(run, make(), extra={"depth": torch.tensor([2, 4, 3])})


@DEPTH.named("depth per sequence, by rows gathered")
def _by_rows(make: Make) -> Case:
    def run(m: Any, x: Tensor, rest: Any) -> Tensor:
        for t in range(int(rest["depth"].max())):
            going = (t < rest["depth"]).nonzero()[:, 0]
            x = x.index_copy(0, going, m.body(x[going], t))
        return x

    return case(run, make(), extra={"depth": torch.tensor([2, 4, 3])})


@DEPTH.named("depth per token, by mask")
def _by_token(make: Make) -> Case:
    def run(m: Any, x: Tensor, _: Any) -> Tensor:
        depth = 1 + (x.detach().sum(-1, keepdim=True) > 0).long() * 2
        for t in range(LOOPS):
            x = torch.where(t < depth, m.body(x, t), x)
        return x

    return case(run, make())


@DEPTH.named("adaptive halting")
def _halting(make: Make) -> Case:
    def run(m: Any, x: Tensor, _: Any) -> Tensor:
        left, total = x.new_ones(*x.shape[:2], 1), torch.zeros_like(x)
        for t in range(5):
            x = m.body(x, t)
            share = torch.sigmoid(m.halt(x))
            share = torch.where((left * (1 - share) < 0.2) | (t == 4), torch.ones_like(left), share)
            total, left = total + left * share * x, left * (1 - share)
            if not bool(left.any()):  # a token that has halted takes no part in later steps
                break
        return total

    return case(run, make(), {"halt": linear(1)})


@DEPTH.named("adaptive halting, with bins of their own")
def _halting_bins(make: Make) -> Case:
    return replace(_halting(make), options={"outside": True})


@DEPTH.named("adaptive halting inside the body")
def _halting_inside(make: Make) -> Case:
    def run(m: Any, x: Tensor, _: Any) -> Tensor:
        left, total = x.new_ones(*x.shape[:2], 1), torch.zeros_like(x)
        for t in range(4):
            x = m.body["main"](x, t)
            share = torch.sigmoid(m.body["halt"](x))
            total, left = total + left * share * x, left * (1 - share)
        return total + left * x

    return case(run, nn.ModuleDict({"main": make(), "halt": linear(1)}))


@DEPTH.named("every row leaves when it has converged")
def _converged(make: Make) -> Case:
    def run(m: Any, x: Tensor, _: Any) -> Tensor:
        going = torch.ones(x.shape[0], dtype=torch.bool)
        for t in range(5):
            y = m.body(x, t)
            moved = (y - x).detach().flatten(1).norm(dim=1) / x.detach().flatten(1).norm(dim=1)
            x = torch.where(going[:, None, None], y, x)
            going = going & ((moved > 0.3) | (t == 0))
            if not bool(going.any()):
                break
        return x

    return case(run, make())


@DEPTH.named("random state, drawn by row from its seed")
def _drawn_by_row(make: Make) -> Case:
    def run(m: Any, x: Tensor, rest: Any) -> Tensor:
        each = [
            torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(int(seed)))
            for seed in rest["seeds"]
        ]
        state = torch.stack(each).to(x.dtype)
        for t in range(LOOPS):
            state = m.body(state + x, t)
        return state

    return case(run, make(), extra={"seeds": torch.arange(ROWS) + 40})


@DEPTH.named("random state, drawn for the batch", expected="random")
def _drawn_for_batch(make: Make) -> Case:
    def run(m: Any, x: Tensor, _: Any) -> Tensor:
        state = torch.randn_like(x)
        for t in range(LOOPS):
            state = m.body(state + x, t)
        return state

    return case(run, make())


@DEPTH.named("random steps without gradient, then with")
def _random_truncation(make: Make) -> Case:
    def run(m: Any, x: Tensor, _: Any) -> Tensor:
        without, with_gradient = torch.randint(1, 4, (2,)).tolist()
        for t in range(without + with_gradient):
            with torch.set_grad_enabled(t >= without):
                x = m.body(x, t)
        return x

    def loss(model: nn.Module, batch: Any) -> Tensor:
        torch.manual_seed(3)
        return lm(model, batch)

    return case(run, make(), loss=loss)


@DEPTH.named("learned initial state")
def _learned(make: Make) -> Case:
    def run(m: Any, x: Tensor, _: Any) -> Tensor:
        state = m.start.weight.expand(x.shape[0], x.shape[1], -1)
        for t in range(LOOPS):
            state = m.body(state + x, t)
        return state

    return case(run, make(), {"start": nn.Embedding(1, D)})
