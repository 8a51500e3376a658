"""A recipe is strict, says what is wrong in one line, and runs only code that may run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from curate import callables, cookbook
from curate.cookbook import apply_override, load_recipe
from curate.errors import UsageError
from curate.recipe import Recipe, expand
from curate.strict import validated

SHIPPED = sorted(cookbook.shipped_folder().glob("*.yaml"))


def minimal(**more: Any) -> dict[str, Any]:
    return {
        "name": "tiny",
        "model": {"source": "tiny.py:build", "args": {"width": 8}},
        "loop": {"body": "body"},
        "data": {"train": "train.jsonl", "query": "query.jsonl"},
        **more,
    }


def written(folder: Path, **more: Any) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(minimal(**more)))
    return path


def refusal(raw: dict[str, Any]) -> str:
    with pytest.raises(UsageError) as caught:
        validated(Recipe, raw)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_an_unknown_key_names_the_nearest() -> None:
    """An unknown key at the top or deep inside is one line with the key and the nearest one."""
    assert "'modle'; did you mean 'model'?" in refusal(minimal(modle={}))
    deep = minimal(score={"query": "query", "windows": {"erly": [0, 1]}})
    assert "'score.0.windows.erly'; did you mean 'early'?" in refusal(deep)
    assert "'sketch.dims'; did you mean 'dim'?" in refusal(minimal(sketch={"dims": 8}))


def test_an_unknown_key_of_a_data_set_is_found_when_the_recipe_is_read(tmp_path: Path) -> None:
    """A misspelt key of a data set is an error of the recipe, with the set's name."""
    path = written(tmp_path, data={"train": {"path": "train.jsonl", "promt": "question"}})
    with pytest.raises(UsageError, match=r"'data.train.promt'; did you mean 'prompt'\?"):
        load_recipe(str(path))


def test_a_wrong_value_is_named() -> None:
    """A value of the wrong kind is one line with its place and what was seen."""
    assert "sketch.dim" in refusal(minimal(sketch={"dim": "many"}))
    assert "expected hf:DIR or file.py:callable" in refusal(minimal(model={"source": "os.system"}))
    assert "model is missing" in refusal({k: v for k, v in minimal().items() if k != "model"})


def test_steps_come_from_the_registry() -> None:
    """A step that is not an operation of the registry is refused; the default order follows it."""
    assert "steps" in refusal(minimal(steps=["sketch", "rm"]))
    recipe = validated(Recipe, minimal(score="query", filter={"top": 3}, train="t.py:go"))
    assert recipe.order == ("train", "sketch", "score", "filter")


def test_a_key_written_twice_is_refused(tmp_path: Path) -> None:
    """YAML would silently keep the second of two equal keys; a recipe refuses them."""
    path = tmp_path / "twice.yaml"
    path.write_text("name: a\nname: b\n")
    with pytest.raises(UsageError, match="'name' is written twice"):
        load_recipe(str(path))


def test_like_and_defaults() -> None:
    """`like` hands on how a set is read but not which rows; `defaults` stand below every set."""
    data = {
        "defaults": {"tokenizer": "bytes"},
        "train": {"path": "a.jsonl", "prompt": "q", "where": {"rows": "10:"}},
        "held": {"like": "train", "where": {"rows": ":10"}},
    }
    recipe = validated(Recipe, minimal(data=data))
    assert recipe.data["held"] == {
        "tokenizer": "bytes",
        "path": "a.jsonl",
        "prompt": "q",
        "where": {"rows": ":10"},
        "role": "query",
    }
    with pytest.raises(UsageError, match="goes in a circle"):
        validated(Recipe, minimal(data={"a": {"like": "b"}, "b": {"like": "a"}}))


def test_set_replaces_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--set reaches nested keys, list items and a set's path, relative to where the user stands."""
    (tmp_path / "mine.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    raw = minimal(score=[{"query": "query"}])
    raw["data"]["train"] = {"path": "openai/gsm8k", "split": "train", "prompt": "q"}
    for override in (
        "sketch.dim=64",
        "score.0.kind=cosine",
        "data.train=mine.jsonl",
        "data.query.limit=5",
        "name=other",
    ):
        apply_override(raw, override)
    recipe = validated(Recipe, raw)
    assert (recipe.sketch.dim, recipe.score[0].kind, recipe.name) == (64, "cosine", "other")
    assert recipe.data["train"]["path"] == str(tmp_path / "mine.jsonl")
    assert recipe.data["train"]["prompt"] == "q"
    assert "split" not in recipe.data["train"]
    assert recipe.data["query"] == {"path": "query.jsonl", "limit": 5, "role": "query"}


@pytest.mark.parametrize("override", ["sketch", "=3", "score.7.kind=dot", "loop=body"])
def test_a_wrong_override_is_refused(override: str) -> None:
    """An override without a value, or of a place that is not there, is one line."""
    with pytest.raises(UsageError, match="--set"):
        apply_override(minimal(score=[{"query": "query"}]), override)


def test_the_resolved_recipe_reads_back(tmp_path: Path) -> None:
    """What is written into a run is a recipe again, with the same hash, from any folder."""
    (tmp_path / "train.jsonl").write_text("{}\n")
    recipe, _ = load_recipe(str(written(tmp_path, score="query")))
    assert recipe.data["train"]["path"] == str(tmp_path / "train.jsonl")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    copy = elsewhere / "recipe.yaml"
    copy.write_text(yaml.safe_dump(recipe.resolved()))
    again, _ = load_recipe(str(copy))
    assert again.hash() == recipe.hash()


def test_placeholders() -> None:
    """{run} is expanded in every string, at any depth."""
    assert expand({"a": ["{run}/x", 3]}, run=Path("/r")) == {"a": ["/r/x", 3]}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path: Path) -> None:
    """Every shipped recipe is found by its bare name, and its code needs no --trust-code."""
    recipe, folder = load_recipe(path.stem)
    sources = [recipe.model.source]
    sources += [
        getattr(recipe, step).call
        for step in recipe.order
        if step in ("generate", "train", "retrain", "compare")
    ]
    for source in sources:
        assert callable(callables.load_callable(source, folder))


def test_foreign_code_needs_trust(tmp_path: Path) -> None:
    """Code beside a recipe runs with --trust-code only."""
    (tmp_path / "tiny.py").write_text("def build():\n    return 1\n")
    with pytest.raises(UsageError, match="run again with --trust-code"):
        callables.load_callable("tiny.py:build", tmp_path)
    assert callables.load_callable("tiny.py:build", tmp_path, trust_code=True)() == 1


def test_a_misspelt_callable_names_the_nearest(tmp_path: Path) -> None:
    """A callable that is not in the file is one line with the nearest one."""
    (tmp_path / "other.py").write_text("def build():\n    return 1\n")
    with pytest.raises(UsageError, match="did you mean 'build'"):
        callables.load_callable("other.py:biuld", tmp_path, trust_code=True)
    with pytest.raises(UsageError, match=r"there is no gone\.py"):
        callables.load_callable("gone.py:build", tmp_path, trust_code=True)


def test_a_copy_of_shipped_code_runs_the_shipped_file(tmp_path: Path) -> None:
    """A byte-equal copy is exempt because the shipped file itself runs, with its own neighbours."""
    shipped = next(iter(sorted(cookbook.shipped_folder().glob("*.py"))))
    copy = tmp_path / shipped.name
    copy.write_bytes(shipped.read_bytes())
    assert callables.trusted_file(copy, trust_code=False) == shipped
    copy.write_bytes(shipped.read_bytes() + b"\n# changed\n")
    with pytest.raises(UsageError, match="--trust-code"):
        callables.trusted_file(copy, trust_code=False)
