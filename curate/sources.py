"""Where rows come from: files, directories and hub names, opened through `datasets`.

A `DataSpec` says what to open and how its columns are to be read. `open_source` opens it as one
`datasets.Dataset` (memory-mapped Arrow, so that memory does not grow with the rows) in the order of
the files, unsliced; a table's `source_row` is an index into exactly that dataset. Slices, samples
and exclusions are decided by row number only (`chosen_rows`), so that a held-out set and its
complement can be written down twice and never overlap.
"""

from __future__ import annotations

import difflib
import glob
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator

from curate.errors import DataError, UsageError

if TYPE_CHECKING:
    from datasets import Dataset

Role = Literal["train", "query", "eval"]

_FORMATS = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
}
_COMPRESSED = {".gz", ".bz2", ".xz", ".zst"}
_NEVER_A_NAME = ("/", ".", "~")  # how a path may begin, and a hub name never does


class Sample(BaseModel):
    """`count` rows drawn without replacement; the same rows for the same seed and row count."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    count: int = Field(gt=0)
    seed: int = Field(default=0, ge=0)


class Slice(BaseModel):
    """Rows by number: a slice such as "0:7000" or "-473:", a sample of it, or both."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: str | None = None
    sample: Sample | None = None

    @field_validator("rows")
    @classmethod
    def _is_slice(cls, value: str | None) -> str | None:
        if value is not None:
            parse_slice(value)
        return value


class Where(Slice):
    """A `Slice` of the source, less the rows of another `Slice` of the same source."""

    exclude: Slice | None = None


class DataSpec(BaseModel):
    """A dataset and how to read it.

    `path` is a hub name, a directory (a `save_to_disk` one too), a JSONL, Parquet or CSV file, a
    glob, or several of these. The content is one of: `text`; `prompt` and `response`; `messages`
    (a list of {role, content}); `input_ids` (token columns as they are, with `labels` and
    `attention_mask` where named or present). With none given the usual names are looked for.
    `source` is a column, or else a constant label for all rows.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str | tuple[str, ...]
    config: str | None = None
    split: str | None = None
    role: Role = "train"
    text: str | None = None
    prompt: str | None = None
    response: str | None = None
    separator: str = "\n"
    messages: str | None = None
    input_ids: str | None = None
    labels: str | None = None
    attention_mask: str | None = None
    id: str | None = None
    source: str | None = None
    columns: tuple[str, ...] = ()
    tokenizer: str | None = "bytes"
    mask_prompt: bool = False
    eos: bool = True
    max_tokens: int | None = Field(default=None, gt=1)
    limit: int | None = Field(default=None, gt=0)
    where: Where | None = None

    @property
    def paths(self) -> tuple[str, ...]:
        """`path` as a tuple, whichever way it was written."""
        return (self.path,) if isinstance(self.path, str) else self.path

    @classmethod
    def of(cls, value: str | dict[str, Any] | DataSpec, **defaults: Any) -> DataSpec:
        """A spec from a path, a mapping or a spec; `defaults` fill in what is not said."""
        if isinstance(value, DataSpec):
            return value
        given = {"path": value} if isinstance(value, str) else dict(value)
        return cls(**{**defaults, **given})


@dataclass(frozen=True)
class Source:
    """An opened `DataSpec`: the dataset, and for each path of the spec where its rows end."""

    dataset: Dataset
    ends: tuple[int, ...]
    labels: tuple[str, ...]

    def label(self, row: int) -> str:
        """The default source label of a row of the dataset: the name of the path it came from."""
        return self.labels[int(np.searchsorted(self.ends, row, side="right"))]


def source_dataset(spec: DataSpec) -> Dataset:
    """The whole dataset of `spec`, unsliced; a table's `source_row` counts its rows."""
    return open_source(spec).dataset


def open_source(spec: DataSpec) -> Source:
    """Open every path of `spec`, in order. Raises DataError for what is missing, empty or broken,
    UsageError for a split that does not exist or is not said.
    """
    import datasets

    if not spec.paths:
        raise UsageError("the data's path is an empty list; name a file, a directory or a dataset")
    parts = [_open_path(path, spec) for path in spec.paths]
    try:
        whole = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    except (ValueError, TypeError) as cause:
        raise DataError(
            f"{', '.join(spec.paths)} do not have the same columns ({_first_line(cause)}); "
            "give them as separate sets, or make their columns agree"
        ) from cause
    if len(whole) == 0:
        raise DataError(f"{', '.join(spec.paths)} holds no rows")
    ends = tuple(int(end) for end in np.cumsum([len(part) for part in parts]))
    return Source(whole, ends, tuple(_label(path) for path in spec.paths))


def _label(path: str) -> str:
    """A short name for rows of `path`: its last part that is no glob, without suffixes."""
    parts = [part for part in Path(path).parts if not glob.has_magic(part) and part != "/"]
    name = parts[-1] if parts else "data"
    return name.split(".")[0] or name


def _open_path(path: str, spec: DataSpec) -> Dataset:
    local = Path(path).expanduser()
    if glob.has_magic(path) and not local.exists():
        files = sorted(glob.glob(str(local), recursive=True))  # noqa: PTH207 (absolute patterns too)
        if not files:
            raise DataError(f"no file matches {path!r}")
        return _open_files(files, path, spec)
    if local.is_dir():
        return _open_directory(local, spec)
    if local.is_file():
        return _open_files([str(local)], path, spec)
    if path.startswith(_NEVER_A_NAME) or _suffix(path) in _FORMATS or path.count("/") > 1:
        raise DataError(f"there is no file or directory {path!r}{_nearest_file(local)}")
    return _open_hub(path, spec)


def _open_files(files: Sequence[str], path: str, spec: DataSpec) -> Dataset:
    formats = {_FORMATS.get(_suffix(file), "") for file in files}
    if len(formats) != 1 or formats == {""}:
        raise DataError(
            f"{path!r} is not one kind of file that can be read "
            f"(suffixes seen: {', '.join(sorted({Path(file).suffix for file in files}))}; "
            f"read: {', '.join(_FORMATS)}, also compressed)"
        )
    if spec.split not in (None, "train"):
        raise UsageError(f"{path!r} is a file and has no split {spec.split!r}; leave `split` out")
    for file in files:
        _refuse_blank(file)
    options: dict[str, Any] = {"sep": "\t"} if {*map(_suffix, files)} == {".tsv"} else {}
    return _loaded(path, formats.pop(), data_files=list(files), split="train", **options)


def _open_directory(directory: Path, spec: DataSpec) -> Dataset:
    saved = {"dataset_dict.json", "state.json"} & {entry.name for entry in directory.iterdir()}
    if not saved:
        if not any(entry.is_file() for entry in directory.rglob("*")):
            raise DataError(f"the directory {str(directory)!r} is empty")
        found = _loaded(str(directory), str(directory), name=spec.config)
        return _one_split(found, directory, spec)
    import datasets

    try:
        return _one_split(datasets.load_from_disk(str(directory)), directory, spec)
    except (OSError, ValueError, KeyError) as cause:
        raise DataError(
            f"{str(directory)!r} looks like the output of save_to_disk, but cannot be read: "
            f"{_first_line(cause)}"
        ) from cause


def _open_hub(name: str, spec: DataSpec) -> Dataset:
    return _one_split(_loaded(name, name, name=spec.config, split=spec.split), name, spec)


def _one_split(found: Any, path: str | Path, spec: DataSpec) -> Dataset:
    """The dataset itself, or the split that the spec names or its role makes plain."""
    import datasets

    if isinstance(found, datasets.Dataset):
        return found
    splits = list(found)
    wanted = spec.split
    if wanted is None:
        wanted = splits[0] if len(splits) == 1 else "train" if spec.role == "train" else None
    if wanted in splits:
        return found[wanted]
    raise UsageError(
        f"{str(path)!r} has the splits {', '.join(map(str, splits))}; "
        + (f"there is no {wanted!r}" if wanted else "say which one with `split`")
    )


def _loaded(path: str, builder: str, **options: Any) -> Any:
    """`datasets.load_dataset`, silent, with every failure one line that names `path`."""
    import datasets

    with _quiet():
        try:
            return datasets.load_dataset(builder, **options)
        except Exception as cause:  # builders raise whatever their parsers do
            if isinstance(cause, ValueError) and "no data" in str(cause):
                raise DataError(f"{path!r} holds no rows") from cause
            raise DataError(f"{path!r} cannot be read: {_first_line(_root(cause))}") from cause


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no log lines of `datasets`: standard error is the caller's."""
    import datasets
    from datasets.utils import logging

    shown, verbosity = not datasets.are_progress_bars_disabled(), logging.get_verbosity()
    datasets.disable_progress_bars()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            datasets.enable_progress_bars()


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _suffix(path: str) -> str:
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    while suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _refuse_blank(file: str) -> None:
    """Parsers fail on a file without content in ways that do not say so."""
    with Path(file).open("rb") as stream:
        while chunk := stream.read(1 << 16):
            if chunk.strip():
                return
    raise DataError(f"{file!r} is empty; expected one example a line or row")


def _nearest_file(path: Path) -> str:
    if not path.parent.is_dir():
        return f" (nor the directory {str(path.parent)!r})"
    names = [entry.name for entry in path.parent.iterdir()]
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    return f"; did you mean {str(path.parent / near[0])!r}?" if near else ""


def require_column(column: str, key: str, names: Sequence[str], paths: Sequence[str]) -> str:
    """`column` if the dataset has it, or a DataError with the nearest that it does have."""
    if column in names:
        return column
    near = difflib.get_close_matches(column, names, n=1, cutoff=0.0)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise DataError(
        f"{', '.join(paths)} has no column {column!r} (named by `{key}`){hint} "
        f"(it has {', '.join(names)})"
    )


def parse_slice(text: str) -> slice:
    """The Python slice that "a:b" or "a:b:c" writes. Raises ValueError; a step must be positive."""
    parts = text.strip().split(":")
    try:
        numbers = [int(part) if part.strip() else None for part in parts]
    except ValueError:
        numbers = []
    if len(numbers) not in (2, 3) or (len(numbers) == 3 and (numbers[2] or 1) < 1):
        raise ValueError(f"{text!r} is not a slice of rows such as '0:7000', '-473:' or '::2'")
    return slice(*numbers)


def chosen_rows(spec: DataSpec, total: int) -> NDArray[np.int64]:
    """The source rows that `spec` takes of `total`, ascending: where, less exclude, then limit."""
    rows = np.arange(total, dtype=np.int64)
    if spec.where is not None:
        rows = _sliced(spec.where, total)
        if spec.where.exclude is not None:
            rows = np.setdiff1d(rows, _sliced(spec.where.exclude, total))
    if len(rows) == 0:
        raise DataError(f"`where` leaves none of the {total} rows of {', '.join(spec.paths)}")
    return rows[: spec.limit]


def _sliced(part: Slice, total: int) -> NDArray[np.int64]:
    rows = np.arange(total, dtype=np.int64)[parse_slice(part.rows) if part.rows else slice(None)]
    if part.sample is None:
        return rows
    if part.sample.count > len(rows):
        raise DataError(f"`sample` asks for {part.sample.count} rows of {len(rows)}")
    order = np.argsort(_mixed(rows, part.sample.seed), kind="stable")
    return np.sort(rows[order[: part.sample.count]])


def _mixed(rows: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """SplitMix64 of (seed, row): keys that stay the same whatever numpy's generators become."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    value = (rows.astype(np.uint64) + np.uint64(seed % 2**32) * np.uint64(1 << 32)) * golden
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
