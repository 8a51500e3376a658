from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from curate.errors import CurateError, DataError, UsageError
from curate.sources import DataSpec, chosen_rows, open_source, source_dataset

ROWS = [{"text": f"row {i}", "n": i} for i in range(5)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write(kind: str, directory: Path) -> Path:
    """ROWS in the file or directory format `kind`."""
    directory.mkdir()
    table = datasets.Dataset.from_list(ROWS)
    path = directory / f"rows.{kind}"
    if kind == "jsonl":
        return jsonl(path, ROWS)
    if kind == "jsonl.gz":
        path.write_bytes(gzip.compress(jsonl(directory / "plain", ROWS).read_bytes()))
    elif kind == "parquet":
        table.to_parquet(str(path))
    elif kind in ("csv", "tsv"):
        table.to_csv(str(path), sep="\t" if kind == "tsv" else ",")
    elif kind == "saved":
        table.save_to_disk(str(path))
    elif kind == "saved-dict":
        datasets.DatasetDict(train=table, test=table.select([0])).save_to_disk(str(path))
    else:
        path.mkdir()
        jsonl(path / "train.jsonl", ROWS)
    return path


KINDS = ["jsonl", "jsonl.gz", "parquet", "csv", "tsv", "saved", "saved-dict", "directory"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_gives_the_same_rows(kind: str, tmp_path: Path) -> None:
    """Files, directories and saved datasets are read alike, in the order of the file."""
    path = write(kind, tmp_path / "data")
    found = source_dataset(DataSpec(path=str(path)))
    assert found.to_list() == ROWS
    assert open_source(DataSpec(path=str(path))).label(0) == "rows"


def test_globs_and_lists_keep_their_order_and_labels(tmp_path: Path) -> None:
    """Several paths are read one after another, and each row knows which path it came from."""
    for name in ("b", "a"):
        jsonl(tmp_path / f"part-{name}.jsonl", [{"text": name}])
    extra = jsonl(tmp_path / "extra.jsonl", [{"text": "x"}])
    source = open_source(DataSpec(path=(str(extra), str(tmp_path / "part-*.jsonl"))))
    assert source.dataset["text"][:] == ["x", "a", "b"]
    assert [source.label(row) for row in range(3)] == ["extra", tmp_path.name, tmp_path.name]


def broken(kind: str, directory: Path) -> DataSpec:
    """Specs of sources that cannot be read, each in its own way."""
    jsonl(directory / "train.jsonl", ROWS)
    jsonl(directory / "other.jsonl", [{"text": 1}])
    (directory / "empty.jsonl").write_text(" \n")
    (directory / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (directory / "header.csv").write_text("text,n\n")
    (directory / "notes.md").write_text("text")
    (directory / "nothing").mkdir()
    names = {
        "misspelt": "trian.jsonl",
        "no match": "*.parquet",
        "header only": "header.csv",
        "kind": "notes.md",
        "no files": "nothing",
        "no parent": "gone/a.jsonl",
    }
    if kind == "mixed":
        return DataSpec(path=(str(directory / "train.jsonl"), str(directory / "other.jsonl")))
    return DataSpec(path=str(directory / names.get(kind, f"{kind}.jsonl")))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("empty", "is empty; expected one example"),
        ("broken", "cannot be read"),
        ("misspelt", "did you mean .*train.jsonl"),
        ("no match", "no file matches"),
        ("header only", "holds no rows"),
        ("kind", "suffixes seen: .md"),
        ("no files", "is empty"),
        ("no parent", "nor the directory"),
        ("mixed", "do not have the same columns"),
    ],
)
def test_what_cannot_be_read_is_one_clear_line(kind: str, words: str, tmp_path: Path) -> None:
    """Each broken source is refused in one line that names it and what is wrong."""
    with pytest.raises(DataError, match=words) as caught:
        open_source(broken(kind, tmp_path))
    assert "\n" not in str(caught.value)


def test_a_hub_name_that_cannot_be_reached_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A hub name is handed to `datasets`, whose failure is told by name."""

    def unreachable(*args: Any, **options: Any) -> None:
        raise ConnectionError("Couldn't reach the hub\nat all")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError, match=r"'some/where' cannot be read: .*reach the hub$"):
        open_source(DataSpec(path="some/where"))


def test_a_hub_name_is_opened_with_its_config_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Config and split of a spec reach `datasets`, and the split that comes back is used."""
    asked: list[Any] = []

    def load(path: str, **options: Any) -> datasets.Dataset:
        asked.append((path, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = open_source(DataSpec(path="openai/gsm8k", config="main", split="test"))
    assert asked == [("openai/gsm8k", {"name": "main", "split": "test"})]
    assert found.label(0) == "gsm8k"


def test_splits_must_be_plain(tmp_path: Path) -> None:
    """A role other than train must say its split where there are several, and name a real one."""
    path = str(write("saved-dict", tmp_path / "data"))
    assert len(source_dataset(DataSpec(path=path, role="query", split="test"))) == 1
    with pytest.raises(UsageError, match="splits train, test; say which"):
        source_dataset(DataSpec(path=path, role="query"))
    with pytest.raises(UsageError, match="there is no 'dev'"):
        source_dataset(DataSpec(path=path, split="dev"))


@given(
    total=st.integers(1, 500),
    seed=st.integers(0, 2**40),
    data=st.data(),
)
def test_a_sample_and_its_complement_share_the_rows_out(
    total: int, seed: int, data: st.DataObject
) -> None:
    """A held-out sample and the rest never overlap and leave nothing out."""
    held = {"sample": {"count": data.draw(st.integers(1, total)), "seed": seed}}
    inside = chosen_rows(DataSpec(path="x", where=held), total)
    assert len(inside) == held["sample"]["count"]
    if len(inside) < total:
        rest = chosen_rows(DataSpec(path="x", where={"exclude": held}), total)
        assert np.array_equal(np.sort(np.concatenate([inside, rest])), np.arange(total))


def test_a_sample_is_the_same_for_ever() -> None:
    """The rows drawn for a seed are fixed: a held-out set must not move with a library."""
    spec = DataSpec(path="x", where={"rows": "10:40", "sample": {"count": 4, "seed": 3}})
    assert chosen_rows(spec, 100).tolist() == [15, 29, 35, 36]
    assert chosen_rows(DataSpec(path="x", where={"rows": "-5:"}, limit=2), 10).tolist() == [5, 6]


def test_slices_are_checked_before_the_data_are_read() -> None:
    """A slice that is none is refused with the spec; one that leaves nothing, with the data."""
    for text in ("7", "a:b", "1:2:-1"):
        with pytest.raises(ValidationError, match="is not a slice of rows"):
            DataSpec(path="x", where={"rows": text})
    with pytest.raises(DataError, match="leaves none of the 10 rows"):
        chosen_rows(DataSpec(path="x", where={"rows": "20:"}), 10)
    with pytest.raises(DataError, match="asks for 11 rows of 10"):
        chosen_rows(DataSpec(path="x", where={"sample": {"count": 11}}), 10)


def test_a_spec_is_strict() -> None:
    """An unknown key is refused, whether in the spec or inside it."""
    with pytest.raises(ValidationError, match="colunms"):
        DataSpec.model_validate({"path": "x", "colunms": ["a"]})
    with pytest.raises(ValidationError, match="sed"):
        DataSpec.model_validate({"path": "x", "where": {"sample": {"count": 1, "sed": 2}}})
    assert DataSpec.of("x", role="query", tokenizer=None) == DataSpec(
        path="x", role="query", tokenizer=None
    )
    assert issubclass(DataError, CurateError)
