"""Read tensors from checkpoint files, none of which gets to run code.

safetensors holds nothing but tensors; everything else is read with ``weights_only=True``. Names
of part files in an index are taken as plain names inside the checkpoint's directory.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdi.errors import CheckpointError

SAFE = ".safetensors"
PICKLED = (".pt", ".pth", ".bin", ".ckpt")
# In this order: what Hugging Face itself prefers.
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WHOLE = ("model.safetensors", "pytorch_model.bin")
# What trainers write beside the weights.
_NOT_WEIGHTS = ("optimizer", "scheduler", "rng_state", "training_args", "scaler", "trainer_state")
_CONTAINERS = ("model", "state_dict", "model_state_dict", "module")


def weight_files(path: Path) -> list[Path]:
    """Return the files that hold a checkpoint's weights, sorted by name.

    Raises:
        CheckpointError: none there, several candidates, or an index that names absent files.
    """
    if path.is_file():
        if path.suffix not in (SAFE, *PICKLED) or path.name.startswith(_NOT_WEIGHTS):
            raise CheckpointError(f"{path} is not a checkpoint; expected .safetensors, .pt or .bin")
        return [path]
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist; expected a checkpoint file or directory")
    for whole, index in zip(_WHOLE, _INDEXES, strict=True):
        if (path / whole).is_file():
            return [path / whole]
        if (path / index).is_file():
            return _indexed(path / index)
    return [_only_file(path)]


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return a checkpoint's tensors by name, on the CPU.

    Raises:
        CheckpointError: absent, damaged, or a pickle that holds more than tensors.
    """
    tensors: dict[str, Tensor] = {}
    for file in weight_files(path):
        tensors.update(_read_safe(file) if file.suffix == SAFE else _state(file))
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors; expected a model's state dict")
    return tensors


def read_pickled(path: Path) -> Any:
    """Return what a ``torch.save`` file holds, mapped where the format allows it.

    Raises:
        CheckpointError: absent, damaged, or needing code to be run.
    """
    try:
        return _load(path)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()
        raise CheckpointError(
            f"{path} cannot be read as plain tensors ({reason[0] if reason else type(error)}); "
            "expected a state dict saved by torch.save. Objects other than tensors are refused, "
            "since reading them would run code: save the weights as safetensors"
        ) from error


def unpickled_suffix(path: Path) -> str:
    """Return a path's name without a weight file's suffix (a directory's name may hold dots)."""
    return path.stem if path.suffix in (SAFE, *PICKLED) else path.name


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:
        # Files from before torch 1.6 cannot be mapped.
        return torch.load(path, map_location="cpu", weights_only=True)


def _read_safe(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise CheckpointError(
            f"{path} needs the safetensors package; install it with: pip install safetensors"
        ) from error
    try:
        return dict(load_file(path, device="cpu"))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({error}); save or copy it again"
        ) from error


def _state(path: Path) -> dict[str, Tensor]:
    """Return the state dict in a pickled file, itself or under one of the usual keys."""
    held = read_pickled(path)
    for key in _CONTAINERS:
        if isinstance(held, Mapping) and isinstance(held.get(key), Mapping):
            held = held[key]
            break
    if not isinstance(held, Mapping):
        raise CheckpointError(f"{path} holds a {type(held).__name__}; expected a state dict")
    other = [str(name) for name, value in held.items() if not isinstance(value, Tensor)]
    other = [name for name in other if not name.endswith("_extra_state")]
    if other:
        raise CheckpointError(
            f"{path} holds entries that are no tensors ({', '.join(other[:5])}); expected a state "
            f"dict, alone or under one of {', '.join(_CONTAINERS)}"
        )
    return {str(name): value for name, value in held.items() if isinstance(value, Tensor)}


def _indexed(index: Path) -> list[Path]:
    try:
        parts = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} is not an index of weight files ({error!r})") from error
    outside = [part for part in parts if not isinstance(part, str) or Path(part).name != part]
    if outside:
        raise CheckpointError(f"{index} names files outside its directory: {outside[0]!r}")
    absent = [part for part in parts if not (index.parent / part).is_file()]
    if absent or not parts:
        raise CheckpointError(f"{index} names files that are absent: {', '.join(absent) or 'none'}")
    return [index.parent / part for part in parts]


def _only_file(directory: Path) -> Path:
    """Return the one weight file of a directory that keeps to no convention."""
    for suffixes in ((SAFE,), PICKLED):
        files = sorted(
            file
            for file in directory.iterdir()
            if file.is_file() and file.suffix in suffixes and not file.name.startswith(_NOT_WEIGHTS)
        )
        if len(files) == 1:
            return files[0]
        if files:
            raise CheckpointError(
                f"{directory} holds {len(files)} weight files ({files[0].name}, {files[1].name}…); "
                "expected one, or model.safetensors. Name the file"
            )
    raise CheckpointError(
        f"{directory} holds no weights; expected model.safetensors, its index, or one .pt file"
    )
