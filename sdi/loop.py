"""Which modules are the loop body."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from sdi.batchrows import Known
from sdi.errors import LoopError

Part = str | nn.Module
Body = Part | Sequence[Part] | Mapping[str, Part | Sequence[Part]]

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
        seeded_rows: bool = False,
    ) -> None:
        self.model = model
        self.tied = tied
        self.outside = outside
        self.full_graph = full_graph
        self.seeded_rows = seeded_rows
        self.layouts: Known = {}  # what the tensors of the first batch were taken for
        named = [
            (role, member)
            for role, item in _roles(body)
            for member in _expand(_resolve(model, item))
        ]
        self.members: tuple[nn.Module, ...] = tuple(member for _, member in named)
        self.roles: tuple[str, ...] = tuple(role for role, _ in named)
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
        asked = [name for name in ("outside", "full_graph", "seeded_rows") if getattr(self, name)]
        asked += [role for role in self.roles if role]
        digest = hashlib.sha256(repr((self.names, self.tied, *asked)).encode())
        for name, parameter in sorted(self.all_parameters().items()):
            digest.update(repr((name, tuple(parameter.shape), parameter.requires_grad)).encode())
        return digest.hexdigest()


def _roles(body: Body) -> list[tuple[str, Part]]:
    """Each part of the body with its role, "" where there are none."""
    if isinstance(body, Mapping):
        listed = {role: [b] if isinstance(b, Part) else list(b) for role, b in body.items()}
        return [(role, part) for role, parts in listed.items() for part in parts]
    parts = [body] if isinstance(body, Part) else list(body)
    split = [p.split("=", 1) if isinstance(p, str) and "=" in p else ["", p] for p in parts]
    found = [(str(role), part) for role, part in split]
    if len({bool(role) for role, _ in found}) > 1:
        raise LoopError(
            f"only some of the body has a role ({', '.join(str(p) for p in parts)}): give each "
            f"level of the cycle one, such as low=model.L and high=model.H"
        )
    return found


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
