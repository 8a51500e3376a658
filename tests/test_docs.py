"""The README cannot drift: its commands parse, its recipe is legal, its Python runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
import yaml

import sdi
from curate import cli
from curate.recipe import Recipe
from tests.looped import make, names, tokens

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def _commands() -> list[list[str]]:
    """Every `curate …` of the README, as words; comments are dropped."""
    inline = [" ".join(found.split()) for found in re.findall(r"`(curate run [^`]+)`", README)]
    text = "\n".join([*_blocks("bash"), *inline])
    text = re.sub(r'"([^"]*)"', lambda m: '"' + " ".join(m[1].split()) + '"', text)
    found = []
    for line in text.splitlines():
        for part in line.split("&&"):
            words = shlex.split(part, comments=True)
            if words[:1] == ["curate"]:
                found.append(words[1:])
    return found


def _group() -> click.Group:
    return next(v for v in vars(cli).values() if isinstance(v, click.Group))


@pytest.mark.parametrize("words", _commands(), ids=" ".join)
def test_every_command_of_the_readme_parses(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each command names a verb that exists, with options that it takes."""
    (tmp_path / "runs" / "mine").mkdir(parents=True)  # a run must exist to be named
    monkeypatch.chdir(tmp_path)
    group = _group()
    command = group.get_command(click.Context(group), words[0])
    assert command is not None, words
    command.make_context(words[0], list(words[1:])).close()


def test_the_recipe_of_the_readme_is_legal() -> None:
    """The YAML block passes the strict schema."""
    (block,) = _blocks("yaml")
    assert Recipe.model_validate(yaml.safe_load(block)).name == "mine"


def test_the_python_of_the_readme_runs() -> None:
    """The block about `sdi` alone works as printed, on a small model."""
    block = next(b for b in _blocks("python") if "sdi.Loop" in b)
    model = make()
    block = block.replace("model.layers", "body")
    scope = {"model": model, "batch": tokens(), "ids": names(4), "eta": 0.1}
    lines = block.splitlines()
    exec("\n".join(lines[:-1]), scope)
    scope["train_part"] = scope["query_part"] = scope["part"]
    exec(lines[-1], scope)
    assert scope["scores"].shape == (4, 4, 3)
    assert isinstance(scope["part"], sdi.Part)


def test_the_picture_is_there() -> None:
    """Every picture the README shows is in the repository."""
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (Path(__file__).parents[1] / path).is_file(), path
