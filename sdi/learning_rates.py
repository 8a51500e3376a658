"""Find the learning rates that a checkpoint was saved at, which weigh it in TracIn.

Looked for in this order, the first that says wins: ``learning_rates`` in ``training.json``, which
gives them by name; ``optimizer.pt`` (or ``.bin``, or FSDP's ``optimizer_0``) in the checkpoint's
directory; ``trainer_state.json`` there; an ``optimizer`` inside the checkpoint itself, be it a
``.pt`` file or a distributed checkpoint; and ``learning_rate`` in ``training.json`` (beside a file
``x.pt`` also ``x.training.json``, which goes before one that the whole directory shares).

    {"learning_rate": 1e-3, "learning_rates": {"head": 1e-4, "body.norm.weight": 0.0}}

gives parameters by their names or the modules they are in, the longest name first, and 1e-3 to the
rest. Which parameter is in which group of an optimizer is for ``sdi.parameter_rates`` to say.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sdi.distributed import Leaf, distributed_tree, is_distributed, read_tree
from sdi.errors import CheckpointError
from sdi.pickled import PICKLED, read_pickled
from sdi.weight_files import CONTAINERS, OPTIMIZERS, sharded_directory, weight_files

Found = tuple[float | None, str]
Shape = tuple[int, ...]
_FILES = ("optimizer.pt", "optimizer.bin")
_DIRECTORY = "optimizer_0"  # accelerate's, beside pytorch_model_fsdp_0
# What optimizers keep of a parameter in the parameter's own shape.
_ALIKE = ("exp_avg", "exp_avg_sq", "momentum_buffer", "square_avg", "sum", "exp_inf", "ax")


@dataclass(frozen=True)
class Group:
    """One parameter group.

    Attributes:
        rate: its learning rate.
        names: of its parameters, where the optimizer kept them.
        shapes: of its parameters, in their order; None where the optimizer has no state of one.
    """

    rate: float
    names: tuple[str, ...] | None = None
    shapes: tuple[Shape | None, ...] = ()

    @property
    def size(self) -> int | None:
        """How many numbers it trains, where the optimizer's state says."""
        known = [math.prod(shape) for shape in self.shapes if shape is not None]
        return sum(known) if known and len(known) == len(self.shapes) else None


@dataclass(frozen=True)
class Recorded:
    """The learning rates that a checkpoint records: by group, or by name and for the `rest`."""

    groups: tuple[Group, ...]
    source: str
    by_name: tuple[tuple[str, float], ...] = ()
    rest: float | None = None

    @property
    def rates(self) -> set[float]:
        """Every rate that occurs."""
        rest = () if self.rest is None else (self.rest,)
        return {g.rate for g in self.groups} | {rate for _, rate in self.by_name} | set(rest)

    @property
    def mean(self) -> float:
        """Their mean, by size where sizes are known; what a checkpoint weighs without a model."""
        if not self.groups:
            return math.fsum(self.rates) / len(self.rates)
        sizes = [group.size for group in self.groups]
        weights = [1] * len(sizes) if None in sizes else [size or 0 for size in sizes]
        total = math.fsum(g.rate * n for g, n in zip(self.groups, weights, strict=True))
        return total / sum(weights)


def learning_rate(path: Path | str) -> Found:
    """Return a checkpoint's learning rate and where it was found, or None and ``absent``.

    Where parameter groups differ, the rate is their mean, by size where the optimizer's state
    tells it; `sdi.parameter_rates` has the rate of each parameter.

    Args:
        path: a checkpoint's file or directory.

    Raises:
        CheckpointError: a file that should say is damaged, or says something impossible.
    """
    return summary(recorded_rates(path))


def summary(recorded: Recorded | None) -> Found:
    """One rate for all that is recorded, and its source in words."""
    if recorded is None:
        return None, "absent"
    if len(recorded.rates) == 1:
        return next(iter(recorded.rates)), recorded.source
    if not recorded.groups:
        return recorded.mean, f"{recorded.source}, mean of {len(recorded.rates)} learning rates"
    return recorded.mean, f"{recorded.source}, mean of {len(recorded.groups)} parameter groups"


def recorded_rates(path: Path | str) -> Recorded | None:
    """Return the learning rates that a checkpoint records, or None.

    Raises:
        CheckpointError: a file that should say is damaged, or says something impossible.
    """
    path = Path(path)
    for recorded in _candidates(path):
        for rate in sorted(recorded.rates):
            if not math.isfinite(rate) or rate < 0:
                raise CheckpointError(
                    f"{recorded.source} of {path} gives learning rate {rate}; expected a finite "
                    "number, 0 or larger. Give this checkpoint a weight"
                )
        return recorded
    return None


def _candidates(path: Path) -> Iterator[Recorded]:
    """Yield what is found, in the order that the module's text gives."""
    directory = path if path.is_dir() else path.parent
    belongs = path.is_dir() or path.name.startswith(("model.", "pytorch_model.", "adapter_model."))
    beside = [directory / f"{path.stem}.training.json"] if path.is_file() else []
    for file in (*beside, directory / "training.json"):
        yield from _by_name(file)
    if belongs:
        yield from _from_optimizer_file(directory)
        yield from _from_trainer_state(directory / "trainer_state.json")
    yield from _from_inside(path)
    for file in (*beside, directory / "training.json"):
        yield from _from_training(file)


def _from_optimizer_file(directory: Path) -> Iterator[Recorded]:
    for name in _FILES:
        if (directory / name).is_file():
            yield from _from_states(read_pickled(directory / name), name)
    if is_distributed(directory / _DIRECTORY):
        yield from _from_tree(distributed_tree(directory / _DIRECTORY), _DIRECTORY)


def _from_inside(path: Path) -> Iterator[Recorded]:
    sharded = None if path.is_file() else sharded_directory(path)
    if sharded is not None:
        # FSDP keeps the optimizer of path/pytorch_model_fsdp_0 in path/optimizer_0.
        if sharded == path and is_distributed(path.parent / _DIRECTORY):
            yield from _from_tree(distributed_tree(path.parent / _DIRECTORY), _DIRECTORY)
        yield from _from_tree(distributed_tree(sharded), sharded.name)
        return
    for file in weight_files(path):
        if file.suffix in PICKLED and isinstance(held := read_pickled(file), Mapping):
            yield from _from_tree(held, file.name)


def _from_tree(tree: Mapping[str, Any], where: str, depth: int = 3) -> Iterator[Recorded]:
    """Look for an optimizer's state in what a checkpoint holds, inside wrappings too."""
    for key in OPTIMIZERS:
        if key in tree:
            yield from _from_states(tree[key], f"'{key}' inside {where}")
    for key, inner in tree.items():
        if depth and isinstance(inner, Mapping) and key not in (*OPTIMIZERS, *CONTAINERS):
            yield from _from_tree(inner, where, depth - 1)


def _from_states(state: Any, source: str) -> Iterator[Recorded]:
    """Read an optimizer's state dict, or a list of them."""
    state = read_tree(state) if isinstance(state, Leaf) else state
    if isinstance(state, Mapping) and state and all(str(key).isdigit() for key in state):
        state = list(state.values())  # a distributed checkpoint has a list's items by number
    states = state if isinstance(state, (list, tuple)) else [state]
    groups = tuple(g for one in states if isinstance(one, Mapping) for g in _groups(one, source))
    filled = tuple(group for group in groups if group.shapes)  # an empty one trains nothing
    if groups:
        yield Recorded(filled or groups, source)


def _groups(state: Mapping[str, Any], source: str) -> Iterator[Group]:
    listed = state.get("param_groups", ())
    items = listed.values() if isinstance(listed, Mapping) else listed
    kept = state.get("state")
    for item in items if isinstance(listed, (Mapping, list, tuple)) else ():
        group = _needed(item) if isinstance(item, Mapping) else {}
        if "lr" not in group:
            continue
        params = group.get("params") or ()
        params = params if isinstance(params, (list, tuple)) else ()
        names = group.get("param_names") or params
        named = len(names) == len(params) and all(isinstance(name, str) for name in names)
        yield Group(
            _number(group["lr"], source),
            tuple(names) if named and names else None,
            tuple(_shape_of(kept, param) for param in params),
        )
    yield from _flattened(state, source)


def _needed(group: Mapping[str, Any]) -> dict[str, Any]:
    return {k: read_tree(group[k]) for k in ("lr", "params", "param_names") if k in group}


def _flattened(state: Mapping[str, Any], source: str) -> Iterator[Group]:
    """Groups of a flattened state, where ``param_groups.NAME.lr`` is the rate of one parameter."""
    for key, value in state.items():
        if isinstance(key, str) and key.startswith("param_groups.") and key.endswith(".lr"):
            name = key.removeprefix("param_groups.").removesuffix(".lr")
            shape = _alike({kept: state.get(f"state.{name}.{kept}") for kept in _ALIKE})
            yield Group(_number(read_tree(value), source), (name,), (shape,))


def _shape_of(kept: Any, param: Any) -> Shape | None:
    """The shape of a parameter, from what the optimizer remembers of it."""
    if not isinstance(kept, Mapping):
        return None
    own = kept.get(param, kept.get(str(param)))
    return _alike(own) if isinstance(own, Mapping) else None


def _alike(own: Mapping[str, Any]) -> Shape | None:
    shapes = (getattr(own.get(key), "shape", None) for key in _ALIKE)
    return next((tuple(shape) for shape in shapes if shape is not None), None)


def _from_trainer_state(path: Path) -> Iterator[Recorded]:
    """Read the last rate that the Hugging Face trainer logged up to the checkpoint's step."""
    if not path.is_file():
        return
    state = _json(path)
    until = state.get("global_step", math.inf)
    history = state.get("log_history")
    logged = [
        entry["learning_rate"]
        for entry in (history if isinstance(history, list) else [])
        if isinstance(entry, Mapping) and "learning_rate" in entry and entry.get("step", 0) <= until
    ]
    if logged:
        yield _one(logged[-1], path)


def _from_training(path: Path) -> Iterator[Recorded]:
    if path.is_file() and "learning_rate" in (state := _json(path)):
        yield _one(state["learning_rate"], path)


def _by_name(path: Path) -> Iterator[Recorded]:
    if not path.is_file() or "learning_rates" not in (state := _json(path)):
        return
    named, rest = state["learning_rates"], state.get("learning_rate")
    if not isinstance(named, Mapping) or not named:
        raise CheckpointError(
            f"{path} gives learning_rates as {named!r}; expected names and their rates"
        )
    rates = tuple((str(name), _number(rate, path.name)) for name, rate in named.items())
    yield Recorded((), path.name, rates, None if rest is None else _number(rest, path.name))


def _one(rate: Any, path: Path) -> Recorded:
    return Recorded((Group(_number(rate, path.name)),), path.name)


def _json(path: Path) -> Mapping[str, Any]:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); mend or remove it") from error
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path} holds a {type(state).__name__}; expected an object")
    return state


def _number(value: Any, source: str) -> float:
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise CheckpointError(f"{source} gives learning rate {value!r}; expected a number")
    return float(value)
