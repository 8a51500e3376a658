"""Find the learning rate that a checkpoint was saved at, which weighs it in TracIn.

Looked for in this order, the first that says wins: ``optimizer.pt`` (or ``.bin``) in the
checkpoint's directory, ``trainer_state.json`` there, an ``optimizer`` inside a ``.pt`` file
itself, and ``training.json`` with ``learning_rate`` (beside a file ``x.pt`` also
``x.training.json``, which goes before a ``training.json`` that the whole directory shares).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sdi.errors import CheckpointError
from sdi.weight_files import PICKLED, read_pickled, weight_files

Found = tuple[float | None, str]
_OPTIMIZERS = ("optimizer.pt", "optimizer.bin")
_INSIDE = ("optimizer", "optimizer_state_dict", "optimizer_state", "optim")


def learning_rate(path: Path | str) -> Found:
    """Return a checkpoint's learning rate and where it was found, or None and ``absent``.

    Where parameter groups differ, the rate is their mean.

    Args:
        path: a checkpoint's file or directory.

    Raises:
        CheckpointError: a file that should say is damaged, or says something impossible.
    """
    path = Path(path)
    for rate, source in _candidates(path):
        if not math.isfinite(rate) or rate < 0:
            raise CheckpointError(
                f"{source} of {path} gives learning rate {rate}; expected a finite number, 0 or "
                "larger. Give this checkpoint a weight"
            )
        return rate, source
    return None, "absent"


def _candidates(path: Path) -> Iterator[tuple[float, str]]:
    """Yield the rates that are found, in the order that the module's text gives."""
    directory = path if path.is_dir() else path.parent
    belongs = path.is_dir() or path.name.startswith(("model.", "pytorch_model."))
    if belongs:
        yield from _from_optimizer_file(directory)
        yield from _from_trainer_state(directory / "trainer_state.json")
    for file in weight_files(path):
        if file.suffix in PICKLED:
            yield from _from_inside(file)
    if path.is_file():
        yield from _from_training(directory / f"{path.stem}.training.json")
    yield from _from_training(directory / "training.json")


def _from_optimizer_file(directory: Path) -> Iterator[tuple[float, str]]:
    for name in _OPTIMIZERS:
        if (directory / name).is_file():
            yield from _from_groups(read_pickled(directory / name), name)


def _from_inside(path: Path) -> Iterator[tuple[float, str]]:
    held = read_pickled(path)
    if not isinstance(held, Mapping):
        return
    for key in _INSIDE:
        yield from _from_groups(held.get(key), f"'{key}' inside {path.name}")


def _from_groups(state: Any, source: str) -> Iterator[tuple[float, str]]:
    """Read an optimizer's state dict, or a list of them."""
    states = state if isinstance(state, (list, tuple)) else [state]
    groups = [
        group
        for one in states
        if isinstance(one, Mapping)
        for group in one.get("param_groups", ())
        if isinstance(group, Mapping) and "lr" in group
    ]
    rates = [_number(group["lr"], source) for group in groups]
    if not rates:
        return
    if len(set(rates)) > 1:
        source = f"{source}, mean of {len(rates)} parameter groups"
    yield math.fsum(rates) / len(rates), source


def _from_trainer_state(path: Path) -> Iterator[tuple[float, str]]:
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
        yield _number(logged[-1], path.name), path.name


def _from_training(path: Path) -> Iterator[tuple[float, str]]:
    if path.is_file() and "learning_rate" in (state := _json(path)):
        yield _number(state["learning_rate"], path.name), path.name


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
