"""Which modules of a model could be its loop body, as names that `--body` takes.

`sdi.find_loops` lists every module that is called more than once. Here those that belong to the
same loop are put together (the layers of a list that is looped in Python, with the norm and the
gate that follow them each time), and it is decided whether one of what remains is meant beyond
doubt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, takewhile
from typing import Any

import torch
from torch import nn

import sdi
from sdi.eager import eager
from sdi.loop import canonical

#: What has less than this share of the first candidate's parameters raises no doubt about it.
SMALL = 0.1


@dataclass(frozen=True)
class Candidate:
    """A body that could be meant.

    Attributes:
        names: dotted names, one or several.
        kind: class name of the first.
        calls: how often each was called.
        parameters: how many parameters they hold.
    """

    names: tuple[str, ...]
    kind: str
    calls: int
    parameters: int

    @property
    def options(self) -> str:
        """As it is written on the command line."""
        return " ".join(f"--body {name}" for name in self.names)


def looped(model: nn.Module, batch: Any, loss: Callable[[nn.Module, Any], Any]) -> list[Candidate]:
    """Bodies that one pass of the loss calls more than once, the largest first."""
    twins = shared(model)
    with eager():  # compiled code runs no hooks
        found = sdi.find_loops(model, batch, forward=loss)
        calls = _calls(model, batch, loss, {n: names[0] for names in twins for n in names})
    whole = next((loop.calls for loop in found if not loop.name), 1)  # how often the model runs
    single = [
        Candidate((loop.name,), loop.kind, loop.calls, loop.parameters)
        for loop in found
        if loop.name and loop.calls > whole
    ]
    modules = {canonical(key): module for key, module in model.named_modules()}
    for names in twins:
        size = sum(parameter.numel() for parameter in modules[names[0]].parameters())
        kind, count = type(modules[names[0]]).__name__, calls.count(names[0])
        if count > whole and names[0] not in {c.names[0] for c in single}:
            single.append(Candidate(names, kind, count, size))
    outer = [c for c in single if not _part_of_another(c, single)]
    together: dict[tuple[str, int], list[Candidate]] = {}
    for candidate in outer:
        together.setdefault((_holder(modules, candidate), candidate.calls), []).append(candidate)
    joined = [made for group in together.values() for made in _joined(modules, group, calls)]
    return sorted(joined, key=lambda c: -c.parameters * c.calls)


def shared(model: nn.Module) -> list[tuple[str, ...]]:
    """Names of modules of one class that have all their parameters in common.

    Each may be called once only: it is the weights that are used again. Modules inside of such ones
    are left out.
    """
    alike: dict[tuple[Any, ...], list[str]] = {}
    for name, module in model.named_modules():
        key = (type(module), *(id(parameter) for parameter in module.parameters()))
        known = alike.setdefault(key, [])
        if name and len(key) > 1 and not any(_below(canonical(name), n) for n in known):
            known.append(canonical(name))  # a module around just this one is no twin of it
    groups = [tuple(names) for names in alike.values() if len(names) > 1]
    inside = {name for names in groups for name in names}
    return [names for names in groups if not any(_below(names[0], name) for name in inside)]


def stacks(model: nn.Module) -> list[Candidate]:
    """Lists of two or more layers, none inside another: bodies of untied models.

    Those much smaller than the largest (a list of heads, say) are left out.
    """
    found: list[Candidate] = []
    for name, module in model.named_modules():
        layers = list(module.children()) if isinstance(module, nn.ModuleList) else []
        size = sum(parameter.numel() for parameter in module.parameters())
        inside = any(_below(canonical(name), c.names[0]) for c in found)
        if len(layers) > 1 and size and not inside:
            found.append(Candidate((canonical(name),), type(layers[0]).__name__, 1, size))
    found.sort(key=lambda c: -c.parameters)
    return [c for c in found if c.parameters >= SMALL * found[0].parameters]


def rivals(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that could be meant as well as the first, the first among them."""
    if not candidates:
        return []
    return [c for c in candidates if c.parameters >= SMALL * candidates[0].parameters]


def _below(name: str, other: str) -> bool:
    return name.startswith(f"{other}.")


def _part_of_another(candidate: Candidate, every: Iterable[Candidate]) -> bool:
    """Whether it is a small part of another: a norm used twice in a body, a gate.

    A part with most of the parameters stays: of a loop in a loop either may be meant.
    """
    around = [c for c in every if _below(candidate.names[0], c.names[0])]
    return any(candidate.parameters < c.parameters / 2 for c in around)


def _calls(
    model: nn.Module, batch: Any, loss: Callable[[nn.Module, Any], Any], labels: dict[str, str]
) -> list[str]:
    """Names of the modules in the order of their calls; some go by the label given for them."""
    seen: list[str] = []
    handles = []
    for name, module in model.named_modules():
        label = labels.get(canonical(name), canonical(name))
        handles.append(module.register_forward_pre_hook(lambda _m, _a, at=label: seen.append(at)))
    try:
        with torch.no_grad():
            loss(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _holder(modules: dict[str, nn.Module], candidate: Candidate) -> str:
    """The module that a candidate belongs to; lists are seen through."""
    paths = [name.split(".")[:-1] for name in candidate.names]
    parent = list(takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False)))
    name = ".".join(parts[0] for parts in parent)
    while name and isinstance(modules.get(name), nn.ModuleList | nn.ModuleDict):
        name = name.rpartition(".")[0]
    return name


def _joined(
    modules: dict[str, nn.Module], group: list[Candidate], calls: Sequence[str]
) -> list[Candidate]:
    """Those that are called in turn with the largest become one candidate, and so on."""
    left = sorted(group, key=lambda c: -c.parameters)
    found = []
    while left:
        first = left[0]
        members = [c for c in left if c is first or _in_turn(first, c, calls)]
        left = [c for c in left if c not in members]
        members.sort(key=lambda c: calls.index(c.names[0]))
        names = _as_lists(modules, [name for c in members for name in c.names])
        size = sum(c.parameters for c in members)
        found.append(replace(first, names=names, parameters=size))
    return found


def _in_turn(one: Candidate, other: Candidate, calls: Sequence[str]) -> bool:
    """Whether they alternate from the first call to the last."""
    pair = {one.names[0], other.names[0]}
    seen = [name for name in calls if name in pair]
    return all(before != after for before, after in pairwise(seen))


def _as_lists(modules: dict[str, nn.Module], names: Sequence[str]) -> tuple[str, ...]:
    """The names, with the list's own name where all of a list's members are there."""
    short: dict[str, None] = {}
    for name in names:
        parent = name.rpartition(".")[0]
        owner = modules.get(parent)
        layers = list(owner.named_children()) if isinstance(owner, nn.ModuleList) else []
        whole = len(layers) > 1 and all(f"{parent}.{key}" in names for key, _ in layers)
        short[parent if whole else name] = None
    return tuple(short)
