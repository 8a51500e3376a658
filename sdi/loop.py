"""Which modules are the loop body, and which call of them is which step.

Steps are calls of the body in the order of time. For one module a step is one call. For a list of
modules looped in Python (the list itself is never called) a step is one pass and begins when the
member that was called first is called again. In an untied model every member is a step of its own,
with weights of its own.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from sdi.errors import LoopError
from sdi.rowtags import leaves
from sdi.torchcalls import graph_nodes

Body = str | nn.Module | Sequence[str | nn.Module]

_WRAPPERS = ("module.", "_orig_mod.")


def canonical(name: str) -> str:
    """A parameter's name without the prefixes that DataParallel and torch.compile add."""
    parts = [part for part in name.split(".") if f"{part}." not in _WRAPPERS]
    return ".".join(parts) or name


class Loop:
    """A model and its loop body.

    Args:
        model: any `nn.Module`.
        body: a module of it, its dotted name, or several. An `nn.ModuleList` that is looped in
            Python stands for its members.
        tied: True where the same weights are used at every step; False for an ordinary stack of
            layers, where step t is the t-th member.
        skip: names or globs of parameters, or names of modules, of the body that are left out on
            request: frozen for attribution only, and listed in `coverage`.

    Raises:
        LoopError: if the body is not part of the model, is empty, or has nothing to train, or if
            `skip` names what the body does not have.
    """

    def __init__(
        self,
        model: nn.Module,
        body: Body,
        *,
        tied: bool = True,
        skip: str | Sequence[str] = (),
        outside: bool = False,
        full_graph: bool = False,
    ) -> None:
        self.model = model
        self.tied = tied
        self.outside = outside
        self.full_graph = full_graph
        listed = [body] if isinstance(body, str | nn.Module) else list(body)
        self.members: tuple[nn.Module, ...] = tuple(
            member for item in listed for member in _expand(_resolve(model, item))
        )
        if not self.members:
            raise LoopError("the loop body is empty: expected at least one module that is called")
        paths = {id(module): canonical(name) for name, module in model.named_modules()}
        self.names: tuple[str, ...] = tuple(paths[id(member)] for member in self.members)
        asked = [skip] if isinstance(skip, str) else skip
        self.skipped: frozenset[str] = _matching(asked, self.all_parameters())
        if not self.parameters():
            raise LoopError(
                f"no parameter of the body {', '.join(self.names)} requires a gradient: frozen "
                f"weights have no influence. Call requires_grad_() on those that train"
                + (", or skip fewer of them." if self.skipped else ".")
            )

    def all_parameters(self) -> dict[str, nn.Parameter]:
        """Canonical name → parameter of the body, frozen ones too; a shared one appears once.

        Of the whole model where prelude and coda are attributed.
        """
        parts = (self.model,) if self.outside else self.members
        inside = {id(p) for part in parts for p in part.parameters()}
        found: dict[int, tuple[str, nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if id(parameter) in inside and id(parameter) not in found:
                found[id(parameter)] = (canonical(name), parameter)
        return dict(found.values())

    def parameters(self) -> dict[str, nn.Parameter]:
        """Canonical name → parameter of the body that is attributed, each once.

        These are the ones that require a gradient and are not skipped.
        """
        every = self.all_parameters().items()
        return {name: p for name, p in every if p.requires_grad and name not in self.skipped}

    def coverage(self) -> dict[str, Any]:
        """Counts for the manifest: parameters attributed, of the body's and of the model's.

        `frozen` lists the body's parameters that require no gradient, `skipped` maps those that
        were left out on request to their share of the body's parameters.
        """
        every, trained = self.all_parameters(), self.parameters()
        total = sum(p.numel() for p in every.values())
        attributed = sum(p.numel() for p in trained.values())
        model = sum(p.numel() for p in self.model.parameters())
        return {
            "parameters": total,
            "attributed": attributed,
            "share": attributed / total,
            "model_parameters": model,
            "share_of_model": attributed / model,
            "frozen": sorted(set(every) - set(trained) - self.skipped),
            "skipped": {name: every[name].numel() / total for name in sorted(self.skipped)},
        }

    def fingerprint(self) -> str:
        """Hex digest of what the sketches assume of the model: names and shapes of the body."""
        asked = [name for name in ("outside", "full_graph") if getattr(self, name)]
        digest = hashlib.sha256(repr((self.names, self.tied, *asked)).encode())
        for name, parameter in sorted(self.all_parameters().items()):
            digest.update(repr((name, tuple(parameter.shape), parameter.requires_grad)).encode())
        return digest.hexdigest()


def _resolve(model: nn.Module, item: str | nn.Module) -> nn.Module:
    modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    if isinstance(item, nn.Module):
        if not any(item is module for module in modules.values()):
            raise LoopError(f"the body {type(item).__name__} is not a module of the model")
        return item
    by_canonical = {canonical(name): module for name, module in modules.items()}
    if item in by_canonical:
        return by_canonical[item]
    close = difflib.get_close_matches(item, [name for name in by_canonical if name], n=1)
    hint = f"; the nearest name is '{close[0]}'" if close else ""
    raise LoopError(f"the model has no module named '{item}'{hint}")


def _expand(module: nn.Module) -> list[nn.Module]:
    if isinstance(module, nn.ModuleList):
        return [part for child in module for part in _expand(child)]
    if isinstance(module, nn.ModuleDict):
        return [part for child in module.values() for part in _expand(child)]
    return [module]


def _matching(patterns: Iterable[str], known: Iterable[str]) -> frozenset[str]:
    """The known names that the patterns mean; each must mean at least one."""
    names, found = list(known), set[str]()
    for pattern in map(canonical, patterns):
        hits = [n for n in names if fnmatchcase(n, pattern) or n.startswith(f"{pattern}.")]
        if not hits:
            close = difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)
            hint = f"; the nearest is '{close[0]}'" if close else ""
            raise LoopError(f"skip: no parameter of the body matches '{pattern}'{hint}")
        found |= set(hits)
    return frozenset(found)


class StepCounter:
    """Numbers the steps of one forward pass from the calls of the body's members.

    Members that hold the very same parameters (a shared block wrapped by several layers) count as
    one. `current` is the zero-based step while a member runs, else None.
    """

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        same = [frozenset(map(id, member.parameters())) or id(member) for member in loop.members]
        self._index = {id(m): same.index(own) for m, own in zip(loop.members, same, strict=True)}
        self._stack: list[int | None] = []
        self._first: int | None = None
        self._calls: list[tuple[int, list[Any]]] = []
        self.current: int | None = None
        self.count = 0

    def called(self, output: Any) -> None:
        """A call of the whole model ended with this output."""
        if self.current is None and id(self._loop.model) not in self._index:
            makers = [t.grad_fn for t in leaves(output) if t.grad_fn is not None]
            self._calls.append((self.count, makers))

    def drop_unused(self, losses: Tensor) -> None:
        """Forget the steps of calls of the model after the last one that the losses depend on."""
        if len(self._calls) < 2 or not self._loop.tied:
            return
        nodes = graph_nodes(losses)
        live = [count for count, makers in self._calls if any(m in nodes for m in makers)]
        if live:
            self.count = live[-1]

    def state(self) -> tuple[Any, ...]:
        """What `restore` brings back: where a region that will run again begins."""
        return list(self._stack), self._first, self.current, self.count

    def restore(self, state: tuple[Any, ...]) -> None:
        """Go back to (or on from) a noted state."""
        stack, self._first, self.current, self.count = state
        self._stack = list(stack)

    def enter(self, module: nn.Module) -> None:
        """A member begins: settle which step this call belongs to."""
        self._stack.append(self.current)
        if self.current is not None:
            return
        member = self._index[id(module)]
        if not self._loop.tied:
            self.current = member
            self.count = max(self.count, member + 1)
            return
        if self._first is None:
            self._first = member
        if member == self._first:
            self.count += 1
        self.current = self.count - 1

    def leave(self) -> None:
        """A member ends."""
        self.current = self._stack.pop()


@contextmanager
def counting(loop: Loop, steps: StepCounter, paused: Callable[[], bool]) -> Iterator[None]:
    """Hooks that number the steps of a forward pass; while `paused` calls do not count."""

    def enter(module: nn.Module, _args: Any) -> None:
        if not paused():
            steps.enter(module)

    def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
        if not paused():
            steps.leave()

    def ended(_module: nn.Module, _args: Any, output: Any) -> None:
        if not paused():
            steps.called(output)

    handles: list[Any] = []
    for member in loop.members:
        handles.append(member.register_forward_pre_hook(enter, prepend=True))
        handles.append(member.register_forward_hook(leave, always_call=True))
    handles.append(loop.model.register_forward_hook(ended))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class LoopCandidate:
    """A module that one forward pass calls more than once.

    Attributes:
        name: dotted name.
        kind: class name.
        calls: how often it was called.
        parameters: how many parameters it holds.
    """

    name: str
    kind: str
    calls: int
    parameters: int


def find_loops(
    model: nn.Module,
    batch: Any,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> list[LoopCandidate]:
    """Modules with parameters that one forward pass calls more than once, outermost first.

    Args:
        model: any module; it is run once under no_grad, in its present mode.
        batch: a mapping (passed as keyword arguments), a tuple (positional) or one tensor.
        forward: how to run the model on the batch, where the above does not fit.

    Modules whose parent is called as often, and which are therefore part of the same body, are
    left out.
    """
    names = {id(module): canonical(name) for name, module in model.named_modules()}
    calls: dict[int, int] = {}
    kept = {id(module): module for module in model.modules()}

    def count(module: nn.Module, _args: Any) -> None:
        calls[id(module)] = calls.get(id(module), 0) + 1

    handles = [module.register_forward_pre_hook(count) for module in kept.values()]
    try:
        with torch.no_grad():
            _run(model, batch, forward)
    finally:
        for handle in handles:
            handle.remove()
    found: list[LoopCandidate] = []
    repeated = {names[k]: n for k, n in calls.items() if n > 1}
    for identity, number in calls.items():
        size = sum(p.numel() for p in kept[identity].parameters())
        name = names[identity]
        parents = [".".join(name.split(".")[:i]) for i in range(1, name.count(".") + 1)]
        if number > 1 and size and not any(repeated.get(p) == number for p in parents):
            found.append(LoopCandidate(name, type(kept[identity]).__name__, number, size))
    return sorted(found, key=lambda c: -c.parameters * c.calls)


def _run(model: nn.Module, batch: Any, forward: Callable[[nn.Module, Any], Any] | None) -> Any:
    if forward is not None:
        return forward(model, batch)
    if isinstance(batch, dict):
        return model(**{k: v for k, v in batch.items() if k != "labels"})
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)
