"""Which learning rate each parameter of a loop's body was trained at.

Where every group has the same rate there is nothing to map. Otherwise names decide, where the
optimizer kept them. Without names an optimizer says how many parameters each group has, in their
order, and by the shapes of what it remembers of them (Adam's moments, a momentum) what shape each
is. Within a group parameters come in the order of ``model.named_parameters()``: so does every
optimizer that is built from it, in module order or split into decayed and undecayed weights as the
Hugging Face trainer does. The model's parameters are therefore some interleaving of the groups'.
Every interleaving whose shapes fit is considered, all at once: a parameter's rate is known if it is
the same in all of them, and else the checkpoint is refused rather than guessed at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from sdi.checkpoints import Checkpoint
from sdi.errors import CheckpointError
from sdi.fitting import canonical_name, some
from sdi.learning_rates import Group, Recorded, Shape, recorded_rates
from sdi.loop import Loop

MOST_STATES = 200_000  # of the search over interleavings
_REMEDY = (
    "build the optimizer from named parameters (AdamW([{'params': [(name, p), …], 'lr': …}, …])), "
    "so that it keeps names; or write learning_rates by name into training.json beside the "
    "checkpoint; or give the checkpoint a weight, which is then the rate of every parameter"
)

Counts = tuple[int, ...]


def parameter_rates(checkpoint: Path | str | Recorded, loop: Loop) -> dict[str, float]:
    """The learning rate of every parameter of the body, by its name in the loop.

    Args:
        checkpoint: a checkpoint's file or directory, or what it records.
        loop: model and body; the model's weights need not be the checkpoint's.

    Raises:
        CheckpointError: no rate is recorded, or it cannot be told whose each rate is.
    """
    recorded = checkpoint if isinstance(checkpoint, Recorded) else recorded_rates(checkpoint)
    if recorded is None:
        raise CheckpointError(
            f"{checkpoint} records no learning rate; {_REMEDY.rpartition('; ')[2]}"
        )
    wanted = {id(p): name for name, p in loop.parameters().items()}
    if len(recorded.rates) == 1:
        return dict.fromkeys(wanted.values(), next(iter(recorded.rates)))
    if recorded.by_name:
        found = _by_prefix(recorded, loop.model)
    elif all(group.names is not None for group in recorded.groups):
        found = _by_name(recorded, loop.model)
    else:
        found = _by_shape(recorded, loop.model, wanted)
    absent = [name for key, name in wanted.items() if key not in found]
    if absent:
        raise CheckpointError(
            f"{recorded.source} has learning rates that differ and none for {some(absent)}. Freeze "
            "what was not trained (requires_grad_(False)), or give the checkpoint a weight"
        )
    return {name: found[key] for key, name in wanted.items()}


def settle_rates(checkpoint: Checkpoint, loop: Loop) -> Checkpoint:
    """The checkpoint with a rate for each parameter, where these differ, and their mean as weight.

    The mean is over the body's parameters, weighted by their sizes: the η̄ of `sdi.Sketcher`, whose
    `rates` are what is returned in `.rates`. A weight that was given stays, for every parameter.

    Raises:
        CheckpointError: it cannot be told whose each rate is.
    """
    if checkpoint.recorded is None:
        return checkpoint
    rates = parameter_rates(checkpoint.recorded, loop)
    sizes = {name: p.numel() for name, p in loop.parameters().items()}
    mean = math.fsum(rates[name] * n for name, n in sizes.items()) / sum(sizes.values())
    if len(set(rates.values())) == 1:
        only = next(iter(rates.values()))
        source = f"{checkpoint.recorded.source}, the body's rate"
        return replace(checkpoint, weight=only, weight_source=source)
    source = f"{checkpoint.recorded.source}, mean over the body of {len(set(rates.values()))} rates"
    return replace(
        checkpoint, weight=mean, weight_source=source, rates=tuple(sorted(rates.items()))
    )


def _by_prefix(recorded: Recorded, model: nn.Module) -> dict[int, float]:
    """Rates by the longest name, of a parameter or of a module around it, that was given."""
    given = {canonical_name(name): rate for name, rate in recorded.by_name}
    unused = set(given)
    found: dict[int, float] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parts = canonical_name(name).split(".")
        around = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
        known = [prefix for prefix in around if prefix in given]
        unused -= set(known)
        rate = given[known[0]] if known else recorded.rest
        if rate is not None:
            found.setdefault(id(parameter), rate)
    if unused:
        raise CheckpointError(
            f"{recorded.source} gives learning rates for {some(sorted(unused))}, which the model "
            "does not have; expected names of its parameters or modules"
        )
    return found


def _by_name(recorded: Recorded, model: nn.Module) -> dict[int, float]:
    parameters = {
        canonical_name(name): p for name, p in model.named_parameters(remove_duplicate=False)
    }
    found: dict[int, float] = {}
    for group in recorded.groups:
        for name in group.names or ():
            parameter = parameters.get(canonical_name(name))
            if parameter is None:
                continue  # frozen or left out here; the body's own are checked for absence
            if found.setdefault(id(parameter), group.rate) != group.rate:
                raise CheckpointError(
                    f"{recorded.source} has {name} at two learning rates; {_REMEDY}"
                )
    return found


def _by_shape(recorded: Recorded, model: nn.Module, wanted: dict[int, str]) -> dict[int, float]:
    parameters = list(model.named_parameters())
    count = sum(len(group.shapes) for group in recorded.groups)
    if count != len(parameters):
        parameters = [(name, p) for name, p in parameters if p.requires_grad]
    if count != len(parameters):
        raise CheckpointError(
            f"{recorded.source} has {len(recorded.groups)} groups of {count} parameters at "
            f"different learning rates, without their names, and the model has "
            f"{len(list(model.parameters()))}, of which {len(parameters)} train: it cannot be told "
            f"whose each rate is. Either {_REMEDY}"
        )
    shapes = [tuple(p.shape) for _, p in parameters]
    possible = _possible_rates(shapes, recorded)
    if not all(possible):
        name = parameters[next(i for i, rates in enumerate(possible) if not rates)][0]
        raise CheckpointError(
            f"the groups of {recorded.source} are of another model: no order of them gives the "
            f"shapes of this one ({name}). Either {_REMEDY}"
        )
    open_ = [
        wanted[id(p)]
        for (_, p), rates in zip(parameters, possible, strict=True)
        if len(rates) > 1 and id(p) in wanted
    ]
    if open_:
        raise CheckpointError(
            f"{recorded.source} has {len(recorded.groups)} groups at different learning rates, "
            f"without their names, and it cannot be told whose is that of {some(open_)}. Either "
            f"{_REMEDY}"
        )
    return {
        id(p): next(iter(rates))
        for (_, p), rates in zip(parameters, possible, strict=True)
        if len(rates) == 1
    }


def _possible_rates(shapes: Sequence[Shape], recorded: Recorded) -> list[set[float]]:
    """For each parameter the rates that it has in some interleaving of the groups.

    Two passes over the counts of parameters taken so far from each group: those that can be
    reached from the start, and of these the ones from which the end can be reached.
    """
    groups = recorded.groups
    reached: list[set[Counts]] = [{(0,) * len(groups)}]
    for shape in shapes:
        reached.append({after for at in reached[-1] for _, after in _next(groups, at, shape)})
        if sum(map(len, reached)) > MOST_STATES:
            raise CheckpointError(
                f"{recorded.source} has {len(groups)} groups at different learning rates, without "
                f"their names, in more possible orders than can be gone through. Either {_REMEDY}"
            )
    end = tuple(len(group.shapes) for group in groups)
    alive: set[Counts] = {end} & reached[-1]
    possible: list[set[float]] = []
    for shape, before in zip(reversed(shapes), reversed(reached[:-1]), strict=True):
        steps = [(at, g) for at in before for g, b in _next(groups, at, shape) if b in alive]
        possible.append({groups[g].rate for _, g in steps})
        alive = {at for at, _ in steps}
    return possible[::-1]


def _next(groups: Sequence[Group], at: Counts, shape: Shape) -> list[tuple[int, Counts]]:
    """The groups that may hold the next parameter, and the counts after it."""
    return [
        (g, (*at[:g], at[g] + 1, *at[g + 1 :]))
        for g, group in enumerate(groups)
        if at[g] < len(group.shapes) and group.shapes[at[g]] in (None, shape)
    ]
