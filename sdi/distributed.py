"""Read distributed checkpoints (``torch.distributed.checkpoint``, FSDP) without running code.

Such a directory holds ``.metadata``, a pickle that says which bytes of which file hold which chunk
of which tensor, and the files themselves, where each chunk is a ``torch.save`` of its own. The
pickle is read with an explicit list of names: for the classes that describe a checkpoint it gets
inert stand-ins, which keep what they are given and do nothing, and any other name is refused.
torch's own classes are never called, so neither is torch.distributed imported. Chunks are read with
``weights_only=True``. Everything the metadata claims is checked before a tensor is allocated.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdi.errors import CheckpointError
from sdi.pickled import read_stream

METADATA = ".metadata"
_NAMES = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
    # Where torch 2.0 to 2.2 kept two of them.
    "torch.distributed._shard.sharded_tensor.metadata": ("TensorProperties", "MEM_FORMAT_ENCODING"),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    # The directory that was saved to, which is not looked at.
    "pathlib": ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"),
    "pathlib._local": ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"),
}
_MOST_CELLS = 1 << 26  # of the grid on which chunks are told apart

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """A run of bytes that one ``torch.save`` wrote, and the chunk of a tensor that it holds."""

    file: str
    offset: int
    length: int
    start: Shape = ()
    size: Shape = ()


@dataclass(frozen=True)
class Leaf:
    """An entry that has not been read yet: a tensor of `shape`, or another object (None)."""

    directory: Path
    name: str
    shape: Shape | None
    dtype: torch.dtype | None
    pieces: tuple[Piece, ...]

    def read(self) -> Any:
        """The tensor, put together from its chunks, or the object.

        Raises:
            CheckpointError: damaged, or needing code to be run.
        """
        if self.shape is None or self.dtype is None:
            return self._load(self.pieces[0])
        whole = torch.empty(self.shape, dtype=self.dtype)
        for piece in self.pieces:
            chunk = self._load(piece)
            if not isinstance(chunk, Tensor) or tuple(chunk.shape) != piece.size:
                raise _damaged(self.directory, f"{self.name} has a chunk of another shape")
            place = tuple(slice(a, a + n) for a, n in zip(piece.start, piece.size, strict=True))
            whole[place] = chunk
        return whole

    def _load(self, piece: Piece) -> Any:
        with (self.directory / piece.file).open("rb") as stream:
            stream.seek(piece.offset)
            held = stream.read(piece.length)
        if len(held) != piece.length:
            raise _damaged(self.directory, f"{piece.file} ends inside {self.name}")
        return read_stream(io.BytesIO(held), f"{self.name} in {self.directory / piece.file}")


def is_distributed(path: Path) -> bool:
    """True for a directory that ``torch.distributed.checkpoint`` wrote."""
    return path.is_dir() and (path / METADATA).is_file()


def distributed_files(directory: Path) -> list[Path]:
    """The metadata and every file that it names.

    Raises:
        CheckpointError: unreadable, refused, or naming files that are absent.
    """
    names = {p.file for leaf in _leaves(directory).values() for p in leaf.pieces}
    return [directory / METADATA, *(directory / name for name in sorted(names))]


def distributed_tree(directory: Path) -> dict[str, Any]:
    """The saved state dict as nested dicts whose leaves are not read yet.

    Raises:
        CheckpointError: unreadable, refused, or naming files that are absent.
    """
    tree: dict[str, Any] = {}
    for path, leaf in _leaves(directory).items():
        at = tree
        for key in path[:-1]:
            at = at.setdefault(key, {})
            if not isinstance(at, dict):
                raise _damaged(directory, f"{leaf.name} lies inside another entry")
        if path[-1] in at:
            raise _damaged(directory, f"two entries are named {leaf.name}")
        at[path[-1]] = leaf
    return tree


class _Inert:
    """Stands in for a class named in the metadata."""

    given: tuple[Any, ...] = ()
    state: Any = None

    def __new__(cls, *given: Any) -> _Inert:
        made = super().__new__(cls)
        made.given = given
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def get(self, key: str) -> Any:
        """One of its attributes, or None."""
        return self.state.get(key) if isinstance(self.state, dict) else None


class _Index(_Inert):
    """MetadataIndex: which chunk of which entry."""


class _Tensors(_Inert):
    """TensorStorageMetadata: shape, dtype and chunks."""


_OWN = {"MetadataIndex": _Index, "TensorStorageMetadata": _Tensors}


def _member(*given: Any) -> _Inert:
    """Stands in for `getattr`, by which Python 3.11.0 to 3.11.3 pickle members of enumerations."""
    if len(given) == 2 and given[0] is _Inert and isinstance(given[1], str):
        return _Inert(given[1])
    raise pickle.UnpicklingError("it names builtins.getattr")


class _Restricted(pickle.Unpickler):
    """Knows the names that describe a checkpoint, and no other."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch", "Size"):
            return tuple
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        if (module, name) == ("builtins", "getattr"):
            return _member
        if name in _NAMES.get(module, ()):
            return _OWN.get(name, _Inert)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _metadata(directory: Path) -> _Inert:
    try:
        with (directory / METADATA).open("rb") as stream:
            held = _Restricted(stream).load()
    except Exception as error:  # a damaged pickle raises whatever it likes
        raise CheckpointError(
            f"{directory / METADATA} is not plain metadata of a distributed checkpoint ({error}); "
            "anything else in it is refused, since reading it could run code. Where you trust it, "
            f"convert it: python -m torch.distributed.checkpoint.format_utils dcp_to_torch "
            f"{directory} model.pt"
        ) from error
    if not isinstance(held, _Inert):
        raise _damaged(directory, f"the metadata is a {type(held).__name__}")
    return held


def _leaves(directory: Path) -> dict[tuple[str, ...], Leaf]:
    """Every entry by the keys that lead to it in the saved state dict."""
    metadata = _metadata(directory)
    entries, stored = metadata.get("state_dict_metadata"), metadata.get("storage_data")
    if not isinstance(entries, dict) or not isinstance(stored, dict):
        raise _damaged(directory, "the metadata lists no entries")
    pieces: dict[str, dict[Shape | None, _Inert]] = {}
    for index, info in stored.items():
        if not isinstance(index, _Index) or not isinstance(info, _Inert):
            raise _damaged(directory, "the metadata's list of storage is of another kind")
        pieces.setdefault(str(index.get("fqn")), {})[_shape(index.get("offset"), directory)] = info
    paths = metadata.get("planner_data")
    found = {}
    for name, entry in entries.items():
        path = paths.get(name) if isinstance(paths, dict) else None
        keys = tuple(str(key) for key in path) if isinstance(path, tuple) and path else (str(name),)
        found[keys] = _leaf(directory, str(name), entry, pieces.get(str(name), {}))
    return found


def _leaf(directory: Path, name: str, entry: Any, stored: dict[Shape | None, _Inert]) -> Leaf:
    if not isinstance(entry, _Tensors):
        if not stored:
            raise _damaged(directory, f"{name} is stored nowhere")
        return Leaf(directory, name, None, None, (_piece(directory, name, stored.popitem()[1]),))
    shape = _shape(entry.get("size"), directory)
    properties, chunks = entry.get("properties"), entry.get("chunks")
    dtype = _dtype(properties)
    if shape is None or dtype is None or not isinstance(chunks, list):
        raise _damaged(directory, f"{name} has no shape, dtype or chunks")
    parts = []
    for chunk in chunks:
        if not isinstance(chunk, _Inert):
            raise _damaged(directory, f"{name} has chunks of {type(chunk).__name__}")
        start, size = (_shape(chunk.get(key), directory) for key in ("offsets", "sizes"))
        info = stored.get(start)
        if start is None or size is None or info is None:
            raise _damaged(directory, f"a chunk of {name} is stored nowhere")
        parts.append(_piece(directory, name, info, start, size))
    _check_cover(directory, name, shape, dtype, parts)
    return Leaf(directory, name, shape, dtype, tuple(parts))


def _piece(directory: Path, name: str, info: _Inert, start: Shape = (), size: Shape = ()) -> Piece:
    file, offset, length = (info.get(key) for key in ("relative_path", "offset", "length"))
    if not isinstance(file, str) or Path(file).name != file:
        raise _damaged(directory, f"{name} is stored outside of the directory, in {file!r}")
    if info.get("transform_descriptors"):
        raise CheckpointError(
            f"{directory}: {name} was written through {info.get('transform_descriptors')}; save "
            "without stream extensions"
        )
    if not isinstance(offset, int) or not isinstance(length, int) or offset < 0 or length < 0:
        raise _damaged(directory, f"{name} is stored at bytes {offset!r}, {length!r} long")
    if not (directory / file).is_file():
        raise CheckpointError(
            f"{directory} is not whole: {file}, which holds {name}, is absent. Copy the files of "
            "every rank into one directory"
        )
    path = directory / file
    if path.is_file() and offset + length > path.stat().st_size:
        raise _damaged(directory, f"{name} is said to reach beyond the end of {file}")
    return Piece(file, offset, length, start, size)


def _check_cover(
    directory: Path, name: str, shape: Shape, dtype: torch.dtype, parts: list[Piece]
) -> None:
    """Refuse chunks that leave out a part of the tensor, overlap, or lack the bytes."""
    for part in parts:
        inside = len(part.start) == len(part.size) == len(shape) and all(
            a + n <= end for a, n, end in zip(part.start, part.size, shape, strict=True)
        )
        if not inside or part.length < math.prod(part.size) * dtype.itemsize:
            raise _damaged(directory, f"a chunk of {name} does not fit into it")
    if sum(math.prod(part.size) for part in parts) != math.prod(shape):
        raise _damaged(directory, f"the chunks of {name} are not the whole of it")
    if len(parts) > 1 and _overlap([part for part in parts if 0 not in part.size], len(shape)):
        raise _damaged(directory, f"two chunks of {name} overlap")


def _overlap(parts: list[Piece], rank: int) -> bool:
    """True where two chunks share an element; told on the grid of all their edges."""
    edges = [
        {edge: n for n, edge in enumerate(sorted({e for part in parts for e in _ends(part, axis)}))}
        for axis in range(rank)
    ]
    if math.prod(map(len, edges)) > _MOST_CELLS:
        return True  # no writer cuts a tensor like this
    taken = torch.zeros([len(places) - 1 for places in edges], dtype=torch.bool)
    for part in parts:
        ends = (_ends(part, axis) for axis in range(rank))
        cells = taken[tuple(slice(edges[i][a], edges[i][b]) for i, (a, b) in enumerate(ends))]
        if bool(cells.any()):
            return True
        cells.fill_(True)
    return False


def _ends(part: Piece, axis: int) -> tuple[int, int]:
    return part.start[axis], part.start[axis] + part.size[axis]


def _dtype(properties: Any) -> torch.dtype | None:
    """The dtype of tensor properties, whose state was a dict before it was a tuple."""
    state = properties.state if isinstance(properties, _Inert) else None
    first = state.get("dtype") if isinstance(state, dict) else (state or (None,))[0]
    return first if isinstance(first, torch.dtype) else None


def _shape(value: Any, directory: Path) -> Shape | None:
    if value is None:
        return None
    if not isinstance(value, tuple) or any(type(n) is not int or n < 0 for n in value):
        raise _damaged(directory, f"{value!r} is no shape")
    return value


def _damaged(directory: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{directory} is a damaged distributed checkpoint: {what}. Save it again"
    )


def read_tree(tree: Any) -> Any:
    """A tree of leaves with every leaf read."""
    if isinstance(tree, Leaf):
        return tree.read()
    return {k: read_tree(v) for k, v in tree.items()} if isinstance(tree, Mapping) else tree
