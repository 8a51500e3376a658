"""Fit stored tensors to a model: the same names on both sides, nothing missing, nothing too much.

Names are compared in canonical form. A prefix that all stored names share, or that they lack since
the model is wrapped in another one, is settled; so are tied parameters, of which one name is
enough. Where names still differ and the model is one of transformers', its own conversion is tried
(experts that are fused now and were stored one by one, renamed layers): the tensors that were read
are handed to it, no file. What then does not fit is refused, all of it listed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sdi.errors import CheckpointError

_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
_LONGEST = 3  # of prefixes that are stripped, in parts

Tensors = dict[str, Tensor]


def canonical_name(name: str) -> str:
    """Return a parameter's name without what wrappers add to it.

    ``module.`` (data parallel) is stripped at the front only, since a model may have a submodule
    of that name; ``_orig_mod.`` (torch.compile) and its like wherever they stand.
    """
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


def targets_of(model: nn.Module) -> Tensors:
    """The model's own parameters and persistent buffers by canonical name."""
    state = canonical(model.state_dict(keep_vars=True), "the model")
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def canonical(state: Mapping[str, Tensor], owner: str) -> Tensors:
    """A state by canonical names.

    Raises:
        CheckpointError: two names are the same one.
    """
    names: Tensors = {}
    for name, value in state.items():
        short = canonical_name(name)
        if short in names:
            raise CheckpointError(
                f"{owner} has two tensors named {short} once wrappers are removed"
            )
        names[short] = value
    return names


def fit(
    model: nn.Module, stored: Mapping[str, Tensor], targets: Mapping[str, Tensor], owner: str
) -> Tensors:
    """The stored tensors by the names of the targets, every target covered.

    Args:
        model: whose targets they are; asked for prefixes, leftovers and conversions.
        stored: what was read.
        targets: what is to be filled, by canonical name.
        owner: the checkpoint, for errors.

    Raises:
        CheckpointError: missing, unexpected, misshapen or wrongly tied tensors, all listed.
    """
    named = canonical(stored, owner)
    if (inside := _only_child(model, named, targets)) is not None:
        prefix, child = inside
        below = {name.removeprefix(prefix): value for name, value in targets.items()}
        return {f"{prefix}{n}": v for n, v in fit(child, named, below, owner).items()}
    named = _drop_ignored(model, _fit_prefix(model, named, targets), targets)
    found = problems(targets, named)
    if found and (converted := _converted(model, named)) is not None:
        again = problems(targets, converted)
        named, found = (converted, again) if not again else (named, found)
    if found:
        raise CheckpointError(
            f"{owner} is not a checkpoint of this {type(model).__name__}: {'; '.join(found)}. "
            f"Give the model this checkpoint was saved from, with the same settings{_hint(found)}"
        )
    return named


def problems(targets: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> list[str]:
    """Return what does not fit, a clause for each kind."""
    present = {id(targets[name]): name for name in stored if name in targets}
    missing = [n for n, value in targets.items() if n not in stored and id(value) not in present]
    unexpected = [name for name in stored if name not in targets]
    misshapen = [
        f"{name} is {tuple(value.shape)}, expected {tuple(targets[name].shape)}"
        for name, value in stored.items()
        if name in targets and value.shape != targets[name].shape
    ]
    clauses = {"missing": missing, "unexpected": unexpected, "shape": misshapen}
    if not misshapen:
        clauses["tied in the model but different here"] = [
            f"{name} and {twin}"
            for name in stored
            if name in targets and (twin := present[id(targets[name])]) != name
            if not torch.equal(stored[name], stored[twin])
        ]
    return [f"{kind}: {some(names)}" for kind, names in clauses.items() if names]


def some(names: Sequence[str], limit: int = 8) -> str:
    """The first of these names, and how many there are where that is not all."""
    more = f" and {len(names) - limit} more ({len(names)} in all)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _only_child(
    model: nn.Module, stored: Tensors, targets: Mapping[str, Tensor]
) -> tuple[str, nn.Module] | None:
    """The one module that holds all of the targets, where the stored names lack its prefix."""
    first = {name.partition(".")[0] for name in targets}
    prefix = f"{next(iter(first), '')}."
    child = getattr(model, prefix[:-1], None)
    if len(first) != 1 or not isinstance(child, nn.Module):
        return None
    return None if any(name.startswith(prefix) for name in stored) else (prefix, child)


def _fit_prefix(model: nn.Module, stored: Tensors, targets: Mapping[str, Tensor]) -> Tensors:
    """Add the base model's prefix to names saved without it, or take off one that all share."""
    if not stored or any(name in targets for name in stored):
        return stored
    prefix = getattr(model, "base_model_prefix", None)
    if isinstance(prefix, str) and prefix:
        added = {f"{prefix}.{name}": value for name, value in stored.items()}
        if any(name in targets for name in added):
            return added
    first = next(iter(stored)).split(".")
    for count in range(1, min(_LONGEST, len(first) - 1) + 1):
        shared = ".".join(first[:count]) + "."
        if not all(name.startswith(shared) for name in stored):
            break
        stripped = {name.removeprefix(shared): value for name, value in stored.items()}
        if any(name in targets for name in stripped):
            return stripped
    return stored


def _drop_ignored(model: nn.Module, stored: Tensors, targets: Mapping[str, Tensor]) -> Tensors:
    """Leave out what the model's own class declares to be leftovers of older versions."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return {
        name: value
        for name, value in stored.items()
        if name in targets or not _matches(patterns, name)
    }


def _matches(patterns: Iterable[str], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _converted(model: nn.Module, stored: Tensors) -> Tensors | None:
    """What transformers makes of these tensors for a model of its own; None where it is not one."""
    inner = model
    while isinstance(
        part := getattr(inner, "_orig_mod", getattr(inner, "module", None)), nn.Module
    ):
        inner = part
    if not any(kind.__module__.startswith("transformers.") for kind in type(inner).__mro__):
        return None
    load: Any = getattr(type(inner), "from_pretrained", None)
    if load is None:
        return None
    try:
        with _quiet():
            made, report = load(
                None, config=inner.config, state_dict=dict(stored), output_loading_info=True
            )
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError):
        return None  # whatever it could not convert stands in our own list of names
    if any(report.get(key) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        return None
    state = canonical(made.state_dict(), "the model")
    # What its report leaves out where it is missing counts as missing here, unless it is tied.
    ignored = getattr(inner, "_keys_to_ignore_on_load_missing", None) or ()
    return {n: v for n, v in state.items() if n in stored or not _matches(ignored, n)}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress and load report off the terminal: what is wrong we say."""
    import transformers

    logging: Any = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _hint(found: Sequence[str]) -> str:
    """What to do about experts that one side has fused and the other one by one."""
    if not any(re.search(r"experts\.\d+\.", clause) for clause in found):
        return ""
    return (
        ". It has its experts one by one; build the model with the transformers class that the "
        "checkpoint names, whose conversion is used, or save the checkpoint with fused experts"
    )
