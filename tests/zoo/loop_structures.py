"""Loop structures: which modules are called, in what order, how often, and with what gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.zoo.case import LOOPS, WIDTH, Case, Make, pick, tokens
from tests.zoo.looped import Looped, RunLoop, Structures, lm, plain, row_losses
from tests.zoo.parts import linear

D = WIDTH
LOOP = Structures()


def case(
    run: RunLoop, body: nn.Module, parts: dict[str, nn.Module] | None = None, **options: Any
) -> Case:
    """A case over random tokens of rows-first layout."""
    batch = {**tokens(), **options.pop("extra", {})}
    options.setdefault("loss", lm)
    return Case(Looped(run, body, **(parts or {})), batch, pick(batch), **options)


class Wrapped(nn.Module):
    """A body around the kind, with parts of its own."""

    def __init__(self, run: Any, inner: nn.Module, **parts: nn.Module) -> None:
        super().__init__()
        self.run, self.inner = run, inner
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Any, *rest: Any) -> Any:
        return self.run(self, x, *rest)


@LOOP.named("one module")
def _one(make: Make) -> Case:
    return case(plain, make())


@LOOP.named("a list of layers")
def _list(make: Make) -> Case:
    def run(m: Any, x: Tensor, _: Any) -> Tensor:
        for t in range(LOOPS):
            for layer in m.body:
                x = layer(x, t)
        return x

    return case(run, nn.ModuleList([make(), make()]))


@LOOP.named("a dictionary of layers, the last one not always")
def _dictionary(make: Make) -> Case:
    def run(m: Any, x: Tensor, _: Any) -> Tensor:
        for t in range(LOOPS):
            x = m.body["first"](x, t)
            if t != 1:
                x = m.body["second"](x, t)
        return x

    return case(run, nn.ModuleDict({"first": make(), "second": make()}))


@LOOP.named("an untied stack")
def _untied(make: Make) -> Case:
    def run(m: Any, x: Tensor, _: Any) -> Tensor:
        for t, layer in enumerate(m.body):
            x = layer(x, t)
        return x

    return case(run, nn.ModuleList([make() for _ in range(LOOPS)]), tied=False)


@LOOP.named("an untied stack, looped twice")
def _untied_looped(make: Make) -> Case:
    def run(m: Any, x: Tensor, _: Any) -> Tensor:
        for t in range(4):
            x = m.body[t % 2](x, t)
        return x

    return case(run, nn.ModuleList([make(), make()]), tied=False)


@LOOP.named("high and low cycles, nested")
def _nested(make: Make) -> Case:
    def run(m: Any, x: Tensor, _: Any) -> Tensor:
        high, low = x, torch.zeros_like(x)
        for _cycle in range(2):
            for t in range(2):
                low = m.body["low"](F.layer_norm(low + high + x, (D,)), t)
            high = m.body["high"](high + low, 0)
        return high

    return case(run, nn.ModuleDict({"low": make(), "high": make()}))


@LOOP.named("high and low cycles, the first without gradient")
def _nested_without(make: Make) -> Case:
    def run(m: Any, x: Tensor, _: Any) -> Tensor:
        high, low = x, torch.zeros_like(x)
        for cycle in range(2):
            with torch.set_grad_enabled(cycle == 1):
                for t in range(2):
                    low = m.body["low"](F.layer_norm(low + high + x, (D,)), t)
                high = m.body["high"](high + low, 0)
        return high

    return case(run, nn.ModuleDict({"low": make(), "high": make()}))


@LOOP.named("the module twice a step")
def _twice(make: Make) -> Case:
    return case(plain, Wrapped(lambda m, x, t: m.inner(m.inner(x, t), t), make()))


@LOOP.named("a block called twice per loop")
def _block_twice(make: Make) -> Case:
    def run(m: Any, x: Tensor, _: Any) -> Tensor:
        for t in range(2):
            x = m.body(m.between(m.body(x, t)), t)
        return x

    return case(run, make(), {"between": nn.LayerNorm(D)})


@LOOP.named("a norm shared twice a step")
def _shared_norm(make: Make) -> Case:
    body = Wrapped(
        lambda m, x, t: x + m.mix(m.norm(m.inner(m.norm(x), t))),
        make(),
        norm=nn.LayerNorm(D),
        mix=linear(),
    )
    return case(plain, body)


@LOOP.named("parameters used τ−1 times")
def _between(make: Make) -> Case:
    def run(m: Any, x: Tensor, _: Any) -> Tensor:
        for t in range(LOOPS):
            x = m.body["main"](x, t)
            if t < LOOPS - 1:
                x = m.body["gate"](x) * x
        return x

    return case(run, nn.ModuleDict({"main": make(), "gate": linear(1)}))


@LOOP.named("exit gate outside the loss")
def _exit_gate(make: Make) -> Case:
    def run(m: Any, x: Tensor, _: Any) -> Tensor:
        exits = []
        for t in range(LOOPS):
            x = m.body["main"](x, t)
            exits.append(m.body["gate"](x).sigmoid())
        m.exits = torch.stack(exits)
        return x

    return case(run, nn.ModuleDict({"main": make(), "gate": linear(1)}))


@LOOP.named("input injected at each step")
def _injected(make: Make) -> Case:
    def run(m: Any, x: Tensor, _: Any) -> Tensor:
        e = x
        for t in range(LOOPS):
            x = m.body(m.adapt(torch.cat([x, e], dim=-1)), t)
        return x

    return case(run, make(), {"adapt": linear(D, 2 * D)})


@LOOP.named("prelude and coda")
def _prelude(make: Make) -> Case:
    def run(m: Any, x: Tensor, _: Any) -> Tensor:
        return m.coda(plain(m, m.prelude(x, 0), None), 0)

    return case(run, make(), {"prelude": make(), "coda": make()})


@LOOP.named("prelude and coda as bins of their own")
def _bins(make: Make) -> Case:
    return replace(_prelude(make), options={"outside": True}, steps=LOOPS + 2)


@LOOP.named("one module of the body skipped on request")
def _skipped(make: Make) -> Case:
    body = Wrapped(lambda m, x, t: m.inner(m.a(x), t), make(), a=linear())
    return case(plain, body, options={"skip": "body.a"})


@LOOP.named(
    "an equilibrium, differentiated implicitly",
    expected="differentiated|differs from per-row autograd|do not add up",
)
def _equilibrium(make: Make) -> Case:
    def run(m: Any, x: Tensor, _: Any) -> Tensor:
        with torch.no_grad():
            state = x
            for t in range(4):
                state = 0.5 * torch.tanh(m.body(state + x, t))
        state = 0.5 * torch.tanh(m.body(state + x, 4))
        start = state.detach().requires_grad_()
        again = 0.5 * torch.tanh(m.body(start + x, 5))

        def solve(delta: Tensor) -> Tensor:
            found = delta
            for _ in range(4):
                found = torch.autograd.grad(again, start, found, retain_graph=True)[0] + delta
            return found

        if state.requires_grad:
            state.register_hook(solve)
        return state

    return case(run, make())


@LOOP.named("state in a tuple and a dictionary")
def _tuple(make: Make) -> Case:
    def step(m: Any, state: Any, t: int) -> Any:
        x = m.inner(state[0]["x"], t)
        return {"x": x}, [x, t]

    def run(m: Any, x: Tensor, _: Any) -> Tensor:
        state: Any = ({"x": x}, None)
        for t in range(LOOPS):
            state = m.body(state, t)
        return state[1][0]

    return case(run, Wrapped(step, make()))


@LOOP.named("keys and values of the first loop reused")
def _reused(make: Make) -> Case:
    def step(m: Any, x: Tensor, t: int, kept: Any) -> Any:
        kept = (m.k(x), m.v(x)) if kept is None else kept
        read = F.scaled_dot_product_attention(m.q(x), *kept, is_causal=True)
        return m.inner(x + read, t), kept

    def run(m: Any, x: Tensor, _: Any) -> Tensor:
        kept = None
        for t in range(LOOPS):
            x, kept = m.body(x, t, kept)
        return x

    return case(run, Wrapped(step, make(), q=linear(), k=linear(), v=linear()))


@LOOP.named("keys and values gathered over loops")
def _gathered_keys(make: Make) -> Case:
    def step(m: Any, x: Tensor, t: int, kept: list[Tensor]) -> Tensor:
        kept.append(m.k(x))
        keys = torch.cat(kept, dim=1)
        return m.inner(x + F.scaled_dot_product_attention(m.q(x), keys, keys), t)

    def run(m: Any, x: Tensor, _: Any) -> Tensor:
        kept: list[Tensor] = []
        for t in range(LOOPS):
            x = m.body(x, t, kept)
        return x

    return case(run, Wrapped(step, make(), q=linear(), k=linear()))


@LOOP.named("first steps under no_grad")
def _without(make: Make) -> Case:
    def run(m: Any, x: Tensor, _: Any) -> Tensor:
        for t in range(4):
            with torch.set_grad_enabled(t >= 2):
                x = m.body(x, t)
        return x

    return case(run, make())


@LOOP.named("detached between steps")
def _detached(make: Make) -> Case:
    def run(m: Any, x: Tensor, _: Any) -> Tensor:
        for t in range(4):
            x = m.body(x.detach() if t == 2 else x, t)
        return x

    return case(run, make())


@LOOP.named("gradient scaled between steps")
def _scaled(make: Make) -> Case:
    def run(m: Any, x: Tensor, _: Any) -> Tensor:
        for t in range(LOOPS):
            x = m.body(x, t)
            if x.requires_grad:
                x.register_hook(lambda g: 0.5 * g)
        return x

    # The hook is on the very output of the last layer, which sees the gradient after it.
    return case(run, Wrapped(lambda m, x, t: m.last(m.inner(x, t)), make(), last=linear()))


@LOOP.named("states summed in place")
def _summed(make: Make) -> Case:
    def run(m: Any, x: Tensor, _: Any) -> Tensor:
        total = torch.zeros_like(x)
        for t in range(LOOPS):
            x = m.body(x, t)
            total += x
        return total

    return case(run, make())


@LOOP.named("deep supervision")
def _supervised(make: Make) -> Case:
    def run(m: Any, x: Tensor, _: Any) -> Tensor:
        m.states = []
        for t in range(LOOPS):
            x = m.body(x, t)
            m.states.append(x)
        return x

    def loss(model: Any, batch: Any) -> Tensor:
        model(batch["input_ids"])
        each = [row_losses(model.head(x), batch["labels"]) for x in model.states]
        return torch.stack([w * v for w, v in zip((0.2, 0.3, 0.5), each, strict=True)]).sum(0)

    return case(run, make(), loss=loss)


@LOOP.named("carry detached between supervised segments")
def _segments(make: Make) -> Case:
    def run(m: Any, x: Tensor, rest: Any) -> Tensor:
        carry = rest.get("carry")
        m.carry = plain(m, x if carry is None else x + carry, None)
        return m.carry

    def loss(model: Any, batch: Any) -> Tensor:
        carry, each = None, []
        for _ in range(2):
            logits = model(batch["input_ids"], carry=carry)
            each.append(row_losses(logits, batch["labels"]))
            carry = model.carry.detach()
        return torch.stack(each).sum(0)

    return case(run, make(), loss=loss)


def _checkpointed(make: Make, *, reentrant: bool, inside: bool) -> Case:
    def again(m: Any, call: Any, x: Tensor, t: int) -> Tensor:
        if not m.again:
            return call(x, t)
        x = x if x.requires_grad or not reentrant else x.detach().requires_grad_()
        return checkpoint(call, x, t, use_reentrant=reentrant)

    def run(m: Any, x: Tensor, _: Any) -> Tensor:
        for t in range(LOOPS):
            x = m.body(x, t) if inside else again(m, m.body, x, t)
        return x

    inner = make()
    body = Wrapped(lambda m, x, t: again(m, m.inner, x, t), inner) if inside else inner

    def switched(model: Any, batch: Any, on: bool) -> Tensor:
        model.again = model.body.again = on
        return lm(model, batch)

    return case(
        run,
        body,
        loss=lambda m, b: switched(m, b, True),
        reference=lambda m, b: switched(m, b, False),
    )


@LOOP.named("checkpointing, non-reentrant, around the body")
def _around(make: Make) -> Case:
    return _checkpointed(make, reentrant=False, inside=False)


@LOOP.named("checkpointing, non-reentrant, in the body")
def _inside(make: Make) -> Case:
    return _checkpointed(make, reentrant=False, inside=True)


@LOOP.named("checkpointing, reentrant, around the body")
def _reentrant(make: Make) -> Case:
    return _checkpointed(make, reentrant=True, inside=False)


@LOOP.named("checkpointing, reentrant, in the body")
def _reentrant_inside(make: Make) -> Case:
    return _checkpointed(make, reentrant=True, inside=True)
