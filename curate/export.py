"""A selection as a dataset directory that `datasets.load_dataset` reads, with its provenance.

The new columns go onto the whole dataset, which is then narrowed to the kept rows: in the other
order `datasets` copies every column (5× slower, measured). The original columns keep their
`datasets` features, since the rows are written by `datasets` itself. The directory is made under a
temporary name beside its place and renamed when whole.
"""

from __future__ import annotations

import difflib
import os
import shutil
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from curate.errors import CurateError, UsageError

if TYPE_CHECKING:
    from datasets import Dataset

    from curate.manifest import Manifest, SelectionEntry
    from curate.rundir import RunDirectory

SHARD_BYTES = 500 << 20
MARK = "provenance/decisions.parquet"  # what a directory that we wrote has
MEANINGS = {
    "weight": "weight for training; mean one over the rows here",
    "sdi_row": "the row's number in the run",
    "sdi_id": "the row's id in the run",
    "sdi_score": "the score the row was chosen by",
    "sdi_score_se": "its standard error, where it is known",
    "sdi_rank": "its rank among all rows, 1 is best",
    "sdi_total": "influence over all loop steps (TracIn)",
    "sdi_early": "influence through the early loop steps",
    "sdi_late": "influence through the late loop steps",
    "sdi_contrast": "late less early",
    "sdi_peak": "the loop step with the largest influence",
    "sdi_centre": "centre of mass of the influence over the steps",
    "sdi_energy": "sum of the absolute influence over the steps",
}


def annotated(
    source: Dataset, decisions: pl.DataFrame, columns: Sequence[str] | None = None
) -> Dataset:
    """The kept rows of `source` in the order of `row`, with the columns of `MEANINGS`.

    `decisions` needs source_row, row, kept, weight; its columns id, score, score_se, rank, total,
    early, late, contrast, peak, centre, energy become `sdi_...` where present. `columns` are those
    of `source` to keep (all by default).

    Raises:
        UsageError: a column is not there, or has the name of one to be added.
    """
    chosen = _chosen(source, columns)
    kept = decisions.filter(pl.col("kept")).sort("row")
    added = {
        name: kept[name if name == "weight" else name.removeprefix("sdi_")]
        for name in MEANINGS
        if name.removeprefix("sdi_") in kept.columns
    }
    clash = sorted(set(added) & set(chosen))
    if clash:
        raise UsageError(
            f"the source already has {', '.join(clash)}, which the export adds; leave such columns "
            "out with --columns, or rename them in the source"
        )
    rows = kept["source_row"].to_numpy().astype(np.int64)
    whole = source.select_columns(chosen)
    for name, values in added.items():
        whole = _with_column(whole, name, values, rows)
    return whole.select(rows)


def _chosen(source: Dataset, columns: Sequence[str] | None) -> list[str]:
    for name in columns or ():
        if name not in source.column_names:
            near = difflib.get_close_matches(name, source.column_names, n=1, cutoff=0.0)
            raise UsageError(
                f"the source has no column {name!r}; did you mean {near[0]!r}? "
                f"(it has {', '.join(source.column_names)})"
            )
    return list(source.column_names if columns is None else columns)


def _with_column(
    whole: Dataset, name: str, values: pl.Series, rows: np.ndarray[Any, np.dtype[np.int64]]
) -> Dataset:
    """`whole` with a column that holds `values` at `rows` and nothing elsewhere."""
    import datasets

    kind = {pl.String: "string", pl.Boolean: "bool"}.get(
        type(values.dtype), "int64" if values.dtype.is_integer() else "float64"
    )
    position = pl.DataFrame({"at": rows, "value": values})
    spread = pl.DataFrame({"at": range(len(whole))}).join(
        position, on="at", how="left", maintain_order="left"
    )
    column = spread["value"].to_arrow()
    if kind == "string":
        column = column.cast("string")
    feature = datasets.Value(kind)
    return whole.add_column(name, column.cast(feature.pa_type), feature=feature)


def write_dataset(data: Dataset, directory: Path) -> list[str]:
    """Write `data` as data/train-*.parquet under `directory`; returns the files' names."""
    folder = directory / "data"
    folder.mkdir(parents=True)
    count = max(1, -(-int(data.data.nbytes) // SHARD_BYTES))
    names = []
    for number in range(count):
        name = f"train-{number:05d}-of-{count:05d}.parquet"
        shard = data.shard(count, number, contiguous=True) if count > 1 else data
        shard.to_parquet(str(folder / name))
        names.append(f"data/{name}")
    return names


def export(
    run: RunDirectory,
    selection: str,
    directory: str | Path,
    overwrite: bool = False,
    columns: Sequence[str] | None = None,
) -> Path:
    """Write a selection of a run as a dataset directory and return its path.

    It holds README.md (a card that says how rows were chosen and which files are the data),
    data/train-*.parquet, and provenance/ with the decisions of every row, kept or dropped.

    Raises:
        UsageError: columns that are not there or that clash.
        CurateError: the directory has something in it, and not `overwrite`; or is no export.
    """
    from curate.sources import DataSpec, source_dataset

    target = Path(directory)
    _may_write(target, overwrite)
    entry = run.selection_entry(selection)
    decisions = _joined(run, entry, selection)
    spec = DataSpec(**run.manifest.sets[entry.train_set].source)
    data = annotated(_quietly(source_dataset, spec), decisions, columns)
    fresh = target.with_name(f".{target.name}.partial-{os.getpid()}")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        fresh.mkdir(parents=True)
        _quietly(write_dataset, data, fresh)
        left_out = _provenance(run, entry, decisions, fresh / "provenance")
        source = ", ".join(Path(path).name for path in spec.paths)
        text = card(run.manifest, entry, decisions, data, selection, target.name, source, left_out)
        (fresh / "README.md").write_text(text)
        _replace(fresh, target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return target


def _joined(run: RunDirectory, entry: SelectionEntry, name: str) -> pl.DataFrame:
    """Every row's decision, its influence, and where it is in the source."""
    decisions = run.selection(name).collect()
    examples = run.examples(entry.train_set).select("row", "source_row").collect()
    joined = decisions.join(examples, on="row", how="left", maintain_order="left")
    if entry.query is None:
        return joined
    influence = run.influence(entry.query).collect()
    ours = [c for c in influence.columns if c == "row" or c not in joined.columns]
    return joined.join(influence.select(ours), on="row", how="left", maintain_order="left")


def _may_write(target: Path, overwrite: bool) -> None:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise CurateError(f"{target} is there already; --overwrite replaces it")
    if not (target / MARK).is_file():
        raise CurateError(f"{target} was not written by an export; choose another directory")


def _replace(fresh: Path, target: Path) -> None:
    """Put `fresh` in the place of `target`; what was there goes last."""
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _provenance(
    run: RunDirectory, entry: SelectionEntry, decisions: pl.DataFrame, folder: Path
) -> int:
    """Copy what explains the selection; returns how many rows never became examples."""
    folder.mkdir()
    decisions.write_parquet(folder / "decisions.parquet")
    (folder / "manifest.json").write_bytes(run.manifest.text().encode())
    if (run.path / "recipe.yaml").is_file():
        shutil.copyfile(run.path / "recipe.yaml", folder / "recipe.yaml")
    for file in run.manifest.sets[entry.train_set].arrays:
        if Path(file.path).name == "dropped.parquet":
            shutil.copyfile(run.path / file.path, folder / "dropped.parquet")
            return pl.read_parquet(folder / "dropped.parquet").height
    return 0


def _quietly(call: Any, *arguments: Any) -> Any:
    """`call` without the progress bars of `datasets`: standard error is the caller's."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return call(*arguments)
    finally:
        if shown:
            datasets.enable_progress_bars()


def card(
    manifest: Manifest,
    entry: SelectionEntry,
    decisions: pl.DataFrame,
    data: Dataset,
    selection: str,
    load: str,
    source: str,
    left_out: int = 0,
) -> str:
    """The README of an exported dataset: front matter for `datasets`, then what was done."""
    import jinja2
    import yaml

    added = [(name, text) for name, text in MEANINGS.items() if name in data.column_names]
    front = {
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": "train", "path": "data/train-*.parquet"}],
            }
        ],
        "tags": ["data-curation", "influence"],
    }
    template = files("curate").joinpath("templates/card.md.j2").read_text()
    page: str = jinja2.Template(
        template, undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    ).render(
        front=yaml.safe_dump(front, sort_keys=False),
        title=f"{source}, selection {selection}",
        kept=len(data),
        rows=decisions.height,
        source=source,
        query=entry.query or "none",
        load=load,
        columns=[name for name in data.column_names if name not in MEANINGS],
        added=added,
        rules=_rules(entry),
        sources=_by_source(decisions).to_dicts(),
        reasons=decisions.group_by("rule").len("rows").sort("rows", descending=True).to_dicts(),
        left_out=left_out,
        recipe=manifest.recipe_hash is not None,
    )
    return page


def _rules(entry: SelectionEntry) -> list[tuple[str, Any]]:
    """The settings that were given, by step, as the card lists them."""
    return [
        (f"{step}: {name}", str(value).replace("|", "\\|"))
        for step, settings in entry.config.items()
        if isinstance(settings, dict)
        for name, value in settings.items()
        if value not in (None, {}, [])
    ]


def _by_source(decisions: pl.DataFrame) -> pl.DataFrame:
    """source, rows, kept, and the share of all weight that its rows have."""
    if "source" not in decisions.columns:
        decisions = decisions.with_columns(source=pl.lit("all"))
    share = pl.col("weight").sum()
    found = decisions.group_by("source").agg(
        pl.len().alias("rows"), pl.col("kept").sum(), share.alias("share")
    )
    return found.with_columns(pl.col("share") / pl.col("share").sum()).sort("source")
