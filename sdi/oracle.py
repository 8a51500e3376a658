"""Per-row autograd: the slow definition of a step gradient, independent of capture.

Each row runs alone. Whenever the body is called, its parameters are replaced by fresh aliases that
belong to that step, so autograd's own gradient of the alias is φ_step. No rule is involved and, but
for a full graph where the loop asks for one, no torch function is intercepted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sdi.capture import Loss
from sdi.eager import eager
from sdi.fullgraph import full_graph
from sdi.loop import Loop
from sdi.recompute import plain_regions
from sdi.rowrandom import seeded_rows
from sdi.steps import StepCounter
from sdi.torchcalls import entered

Aliases = dict[int, dict[str, Tensor]]


def step_gradients(
    loop: Loop, row: Any, loss: Loss, names: list[str], identity: str = ""
) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Step gradients and the total gradient of one row.

    Args:
        loop: model and body.
        row: a batch of one.
        loss: (model, batch) → (1,).
        names: the parameters wanted.
        identity: the row's id, where the loop seeds its rows.

    Returns:
        A list with one dict (name → gradient) a step (before them that of the prelude and after
        them that of the coda, where the loop has these), and the total by plain autograd, from a
        forward pass of its own in which nothing is replaced.
    """
    parameters = loop.parameters()
    wanted = {name: parameters[name] for name in names}
    with eager(), torch.enable_grad():
        with _as_asked(loop, identity):  # the backward pass too: regions run again in it
            with _aliased(loop, wanted) as (aliases, counter):
                losses = loss(loop.model, row)
                counter.drop_unused(losses)
            flat = [(s, n, a) for s, by_name in aliases.items() for n, a in by_name.items()]
            found = _gradients(losses.sum(), [a for _, _, a in flat])
        with _as_asked(loop, identity):
            totals = _gradients(loss(loop.model, row).sum(), list(wanted.values()))
    bins = counter.count + 2 * loop.outside
    steps: list[dict[str, Tensor]] = [
        {n: torch.zeros_like(p) for n, p in wanted.items()} for _ in range(bins)
    ]
    for (step, name, _), gradient in zip(flat, found, strict=True):
        if gradient is not None and counter.bin(step) < bins:
            place = counter.bin(step)
            steps[place][name] = steps[place][name] + gradient
    zero = {n: torch.zeros_like(p) for n, p in wanted.items()}
    total = {n: zero[n] if g is None else g for n, g in zip(wanted, totals, strict=True)}
    return steps, total


def _gradients(value: Tensor, inputs: list[Any]) -> tuple[Tensor | None, ...]:
    found: tuple[Tensor | None, ...] = entered(torch.autograd.grad)(
        value, inputs, allow_unused=True
    )
    return found


@contextmanager
def _as_asked(loop: Loop, identity: str) -> Iterator[None]:
    """A forward pass on the graph, with what the loop asks for."""
    with (
        full_graph(loop.full_graph),
        seeded_rows([identity], loop.seeded_rows),
        plain_regions(),
    ):
        yield


@contextmanager
def _aliased(loop: Loop, wanted: dict[str, nn.Parameter]) -> Iterator[tuple[Aliases, StepCounter]]:
    """While active, a member's call sees the aliases of its step in place of its parameters."""
    names = {id(p): name for name, p in wanted.items()}
    places = [
        (module, key, p, names[id(p)])
        for part in ((loop.model,) if loop.outside else loop.members)
        for module in part.modules()
        for key, p in module._parameters.items()
        if p is not None and id(p) in names
    ]
    unique = {(id(m), key): (m, key, p, name) for m, key, p, name in places}.values()
    aliases: Aliases = {}
    counter = StepCounter(loop)
    depth = 0

    def swap_in(module: nn.Module, _args: Any) -> None:
        nonlocal depth
        counter.enter(module)
        depth += 1
        assert counter.current is not None
        place(counter.current)

    def place(step: int) -> None:
        if step not in aliases:
            aliases[step] = {n: p.detach().clone().requires_grad_() for n, p in wanted.items()}
        for owner, key, _, name in unique:
            owner._parameters[key] = aliases[step][name]  # type: ignore[assignment]

    def swap_out(_module: nn.Module, _args: Any, _output: Any) -> None:
        nonlocal depth
        counter.leave()
        depth -= 1
        if depth == 0 and loop.outside:
            place(-1 - counter.count)
        elif depth == 0:
            restore()

    def restore() -> None:
        for owner, key, parameter, _ in unique:
            owner._parameters[key] = parameter

    handles: list[Any] = []
    for member in loop.members:
        handles.append(member.register_forward_pre_hook(swap_in, prepend=True))
        handles.append(member.register_forward_hook(swap_out, always_call=True))
    if loop.outside:
        place(-1)
    handles.append(loop.model.register_forward_hook(lambda _m, _a, out: counter.called(out)))
    try:
        yield aliases, counter
    finally:
        restore()
        for handle in handles:
            handle.remove()
