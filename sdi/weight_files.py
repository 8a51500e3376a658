"""Find a checkpoint's weight files and read tensors from them; none of them gets to run code.

safetensors holds nothing but tensors; everything else is read with ``weights_only=True``, and the
metadata of a distributed checkpoint by a restricted unpickler (``sdi.distributed``). Names of part
files in an index are taken as plain names inside the checkpoint's directory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sdi.distributed import Leaf, distributed_files, distributed_tree, is_distributed, read_tree
from sdi.errors import CheckpointError
from sdi.pickled import PICKLED, read_pickled

SAFE = ".safetensors"
ADAPTER_CONFIG = "adapter_config.json"
# Where a trainer on FSDP puts the distributed checkpoint of its model.
SHARDED = "pytorch_model_fsdp_0"
# In this order: what Hugging Face itself prefers.
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WHOLE = ("model.safetensors", "pytorch_model.bin")
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
# What trainers write beside the weights.
_NOT_WEIGHTS = ("optimizer", "scheduler", "rng_state", "training_args", "scaler", "trainer_state")
CONTAINERS = ("model", "state_dict", "model_state_dict", "module")
OPTIMIZERS = (
    "optimizer",
    "optimizer_state_dict",
    "optimizer_state",
    "optimizer_states",
    "optim",
    "optimizers",
)
_SIDES = (*OPTIMIZERS, "lr_scheduler", "scheduler", "dataloader", "train_state", "rng_state")
_DEPTH = 4  # of wrappings around a state dict


class NoWeightsError(CheckpointError):
    """Nothing there is a checkpoint, or nothing says which of several files is meant."""


def weight_files(path: Path) -> list[Path]:
    """Return the files that hold a checkpoint's weights, sorted by name.

    An adapter's are its configuration and its tensors; a distributed checkpoint's are its metadata
    and the files that this names.

    Raises:
        NoWeightsError: none there, or several candidates.
        CheckpointError: a format that has to be converted first, or files that are absent.
    """
    if path.is_file():
        if path.suffix not in (SAFE, *PICKLED) or path.name.startswith(_NOT_WEIGHTS):
            raise NoWeightsError(f"{path} is not a checkpoint; expected .safetensors, .pt or .bin")
        return [path]
    if not path.is_dir():
        raise NoWeightsError(f"{path} does not exist; expected a checkpoint file or directory")
    adapter = (path / ADAPTER_CONFIG).is_file()
    for whole, index in zip(_WHOLE, _INDEXES, strict=True):
        for name in (whole, index):
            if (path / name).is_file() and adapter:
                raise CheckpointError(
                    f"{path} holds both a whole model ({name}) and an adapter ({ADAPTER_CONFIG}); "
                    "move one of them away"
                )
        if (path / whole).is_file():
            return [path / whole]
        if (path / index).is_file():
            return _indexed(path / index)
    if adapter:
        return _adapter_files(path)
    if (sharded := sharded_directory(path)) is not None:
        return distributed_files(sharded)
    _refuse_unconverted(path)
    return [_only_file(path)]


def sharded_directory(path: Path) -> Path | None:
    """The directory of the distributed checkpoint at `path`: itself, or FSDP's inside it.

    Raises:
        CheckpointError: there are several models.
    """
    if is_distributed(path):
        return path
    if not is_distributed(path / SHARDED):
        return None
    if is_distributed(path / "pytorch_model_fsdp_1"):
        raise CheckpointError(f"{path} holds several models; name one, such as {path / SHARDED}")
    return path / SHARDED


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return a checkpoint's tensors by name, on the CPU.

    Raises:
        CheckpointError: absent, damaged, or a pickle that holds more than tensors.
    """
    tensors: dict[str, Tensor] = {}
    files = weight_files(path)
    sharded = None if path.is_file() else sharded_directory(path)
    if sharded is not None and files[0].parent == sharded:
        tensors = _distributed(sharded)
    else:
        for file in files:
            if file.name != ADAPTER_CONFIG:
                tensors.update(_read_safe(file) if file.suffix == SAFE else _state(file))
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors; expected a model's state dict")
    return tensors


def unpickled_suffix(path: Path) -> str:
    """Return a path's name without a weight file's suffix (a directory's name may hold dots)."""
    return path.stem if path.suffix in (SAFE, *PICKLED) else path.name


def unwrap(held: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """The model's state inside wrappings such as ``{"model": …}`` or ``{"app": {"model": …}}``.

    Raises:
        CheckpointError: several wrapped states lie side by side.
    """
    level: list[tuple[str, Mapping[str, Any]]] = [("", held)]
    for _ in range(_DEPTH):
        found = [one for where, state in level for one in _contained(where, state)]
        if found:
            # Below the top, other states that hold tensors may be the model that is meant.
            inside = {where.rpartition(".")[0] for where, _ in found}
            others = {where.rstrip("."): s for where, s in level if where.rstrip(".") not in inside}
            several = [*(w for w, _ in found), *(w for w, s in others.items() if _tensors(s))]
            if len(several) > 1:
                raise CheckpointError(
                    f"{path} holds several models ({', '.join(several)}); save the state of one"
                )
            return found[0][1]
        level = [
            (f"{where}{key}.", value)
            for where, state in level
            for key, value in state.items()
            if isinstance(value, Mapping) and key not in _SIDES
        ]
    return held


def _tensors(state: Any) -> bool:
    """True where there are tensors in a state, however deep."""
    if isinstance(state, Mapping):
        return any(_tensors(value) for value in state.values())
    return isinstance(state, Tensor) or (isinstance(state, Leaf) and state.shape is not None)


def _contained(where: str, state: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """What the first of the usual keys holds, where it is a mapping."""
    for key in CONTAINERS:
        if isinstance(inner := state.get(key), Mapping):
            yield f"{where}{key}", inner
            return


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
    """Return the state dict in a pickled file, itself or inside one of the usual wrappings."""
    held = read_pickled(path)
    if isinstance(held, Mapping):
        held = unwrap(held, path)
    if not isinstance(held, Mapping):
        raise CheckpointError(f"{path} holds a {type(held).__name__}; expected a state dict")
    _refuse_others(held, path)
    return {str(name): value for name, value in held.items() if isinstance(value, Tensor)}


def _refuse_others(held: Mapping[str, Any], path: Path) -> None:
    other = [str(name) for name, value in held.items() if not isinstance(value, Tensor)]
    other = [name for name in other if not name.endswith("_extra_state")]
    if other:
        raise CheckpointError(
            f"{path} holds entries that are no tensors ({', '.join(other[:5])}); expected a state "
            f"dict, alone or under one of {', '.join(CONTAINERS)}"
        )


def _distributed(directory: Path) -> dict[str, Tensor]:
    """The tensors of a distributed checkpoint's model; what is beside it is not read.

    Without a wrapping the model's tensors stand among other states (torchtitan saves so): objects
    and the optimizer's state are left out then, and loading says what is too much or too little.
    """
    tree = distributed_tree(directory)
    # A dict that was saved as one object is a wrapping like any other.
    opened = {k: read_tree(v) if k in CONTAINERS else v for k, v in tree.items()}
    state = unwrap(opened, directory)
    wrapped = state is not opened
    inside = {k: v for k, v in state.items() if wrapped or k not in _SIDES}
    flat = dict(_flat(inside))
    if wrapped:
        odd = {name: leaf for name, leaf in flat.items() if _is_object(leaf)}
        _refuse_others(odd, directory)
    return {n: read_tree(v) for n, v in flat.items() if isinstance(v, Tensor) or not _is_object(v)}


def _is_object(value: Any) -> bool:
    return value.shape is None if isinstance(value, Leaf) else not isinstance(value, Tensor)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _adapter_files(path: Path) -> list[Path]:
    for name in _ADAPTERS:
        if (path / name).is_file():
            return [path / ADAPTER_CONFIG, path / name]
    raise CheckpointError(f"{path} has {ADAPTER_CONFIG} but no {_ADAPTERS[0]}; save it again")


def _refuse_unconverted(path: Path) -> None:
    """Recognise what has to be converted first, and say how."""
    names = [file.name for file in path.iterdir()]
    inside = [file.name for file in path.glob("global_step*/*")]
    zero = re.compile(r"mp_rank_\d+_model_states\.pt|.*_optim_states\.pt")
    if "zero_to_fp32.py" in names or any(zero.fullmatch(name) for name in (*names, *inside)):
        root = path.parent if re.match(r"global_step\d+", path.name) else path
        raise CheckpointError(
            f"{path} is a DeepSpeed checkpoint, whose weights are spread over its ranks; convert "
            f"it first: python {root}/zero_to_fp32.py {root} {root}/pytorch_model.bin (or "
            "deepspeed.utils.zero_to_fp32.convert_zero_checkpoint_to_fp32_state_dict), or train "
            "with stage3_gather_16bit_weights_on_model_save"
        )
    if any(re.match(r"shard-\d+-model-\d+", name) for name in names):
        raise CheckpointError(
            f"{path} holds safetensors files of single ranks; put them together first with "
            "torch.distributed.checkpoint._consolidate_hf_safetensors."
            f"consolidate_safetensors_files({str(path)!r}, OUTPUT)"
        )


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
            raise NoWeightsError(
                f"{directory} holds {len(files)} weight files ({files[0].name}, {files[1].name}…); "
                "expected one, or model.safetensors. Name the file"
            )
    raise NoWeightsError(
        f"{directory} holds no weights; expected model.safetensors, its index, or one .pt file"
    )
