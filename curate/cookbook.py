"""Finding, reading and settling recipe files.

A recipe is named by its path or, if it is shipped with the package, by its bare name. Relative
paths inside it are looked for beside the file first; what stands in `--set` is relative to where
the user stands. What is found is made absolute, so that the `recipe.yaml` written into the run
can be run again from anywhere; what is not found (a hub name, a file that a step will make) is
left as it is.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from curate.errors import UsageError
from curate.recipe import Recipe, expand
from curate.strict import unknown_key, validated

#: Keys of a data set that describe the layout of a hub dataset, not of a file put in its place.
HUB_KEYS = ("split", "config")


def shipped_folder() -> Path:
    """The folder of the recipes that come with the package (installed, or in a checkout)."""
    here = Path(__file__).resolve().parent
    installed = here / "shipped"
    return installed if installed.is_dir() else here.parent / "recipes"


def find_recipe(name: str) -> Path:
    """The recipe file for a path, or for the bare name of a shipped recipe."""
    path = Path(name)
    if path.is_file():
        return path.resolve()
    shipped = shipped_folder() / f"{name.removesuffix('.yaml')}.yaml"
    if path.name == name and shipped.is_file():
        return shipped
    if path.parts[:1] == ("recipes",) and (shipped_folder() / path.name).is_file():
        return shipped_folder() / path.name
    known = sorted(file.stem for file in shipped_folder().glob("*.yaml"))
    raise UsageError(f"no recipe {name!r}; expected a YAML file or one of: {', '.join(known)}")


def load_recipe(name: str, overrides: Sequence[str] = ()) -> tuple[Recipe, Path]:
    """The recipe with its `--set key=value` overrides, and the folder its file is in."""
    path = find_recipe(name)
    raw = read_yaml(path)
    raw = anchored(expand(raw, recipe=path.parent), path.parent)
    for override in overrides:
        apply_override(raw, override)
    recipe = validated(Recipe, raw, "")
    recipe.specs()  # a wrong key in a data set is the recipe's error, so it is found here
    return recipe, path.parent


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds one mapping; anything else is a UsageError of one line."""
    try:
        raw = yaml.load(path.read_text("utf-8"), Loader=_UniqueKeys)
    except yaml.YAMLError as failure:
        line = " ".join(str(failure).split())
        raise UsageError(f"{path.name} is not YAML that can be read: {line}") from None
    if not isinstance(raw, dict):
        raise UsageError(f"{path.name} holds {type(raw).__name__}; expected a mapping of sections")
    return raw


class _UniqueKeys(yaml.SafeLoader):  # type: ignore[misc]
    """The safe loader, which also refuses a key that is written twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for key in keys if keys.count(key) > 1 and key != "<<"]
        if twice:
            line = node.start_mark.line + 1
            raise yaml.YAMLError(f"key {twice[0]!r} is written twice in the mapping at line {line}")
        return dict(super().construct_mapping(node, deep))


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Put one `dotted.key=value` into `raw`; the value is YAML, as it would stand in the file.

    A bare path given for a mapping that has a `path` (a data set) replaces the path alone, and
    the split of the hub dataset that it replaces goes with it.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UsageError(f"--set {override!r}; expected key=value, such as sketch.dim=1024")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    parts = key.split(".")
    here: Any = raw
    for depth, part in enumerate(parts[:-1]):
        here = _inside(here, part, parts[: depth + 1])
    if parts[0] == "checkpoints" or (
        parts[0] == "data" and (len(parts) == 2 or key[-5:] == ".path")
    ):
        value = _anchored_paths(value, Path.cwd())
    _assign(here, parts[-1], value, key)


def _inside(here: Any, part: str, path: Sequence[str]) -> Any:
    if isinstance(here, list):
        return here[_position(here, part, path)]
    if isinstance(here, dict):
        inner = here.setdefault(part, {})
        if inner is None or isinstance(inner, str):
            inner = here[part] = {} if inner is None else {_scalar_key(path): inner}
        return inner
    raise UsageError(f"--set {'.'.join(path)}: {'.'.join(path[:-1])} is {here!r}, not a mapping")


def _scalar_key(path: Sequence[str]) -> str:
    return "call" if path[0] in ("generate", "train", "retrain", "compare") else "path"


def _assign(here: Any, part: str, value: Any, key: str) -> None:
    if isinstance(here, list):
        here[_position(here, part, key.split("."))] = value
    elif not isinstance(here, dict):
        raise UsageError(f"--set {key}: {here!r} is not a mapping")
    elif isinstance(here.get(part), dict) and not isinstance(value, Mapping) and value is not None:
        if "path" not in here[part] and "like" not in here[part]:
            legal = sorted(here[part])
            raise UsageError(f"--set {key}={value!r}: it is a section; set one of its keys {legal}")
        kept = {k: v for k, v in here[part].items() if k not in (*HUB_KEYS, "like")}
        here[part] = kept | {"path": value}
    else:
        here[part] = value


def _position(here: Sequence[Any], part: str, path: Sequence[str]) -> int:
    if part.isdigit() and int(part) < len(here):
        return int(part)
    raise UsageError(f"--set {'.'.join(path)}: expected a position from 0 to {len(here) - 1}")


def anchored(raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`raw` with the relative paths that exist beside the recipe made absolute.

    Code shipped with the package keeps its bare name: it is found by that name everywhere.
    """
    out = dict(raw)
    if isinstance(out.get("data"), dict):
        out["data"] = {name: _anchored_paths(spec, folder) for name, spec in out["data"].items()}
    if "checkpoints" in out:
        out["checkpoints"] = _anchored_paths(out["checkpoints"], folder)
    if folder != shipped_folder():
        for key in ("model", "generate", "train", "retrain", "compare"):
            if key in out:
                out[key] = _anchored_code(out[key], folder)
    return out


def _anchored_paths(value: Any, folder: Path) -> Any:
    """A path, several, or a mapping with a `path`: every path found below `folder` is absolute."""
    if isinstance(value, str):
        return _absolute(value, folder)
    if isinstance(value, list):
        return [_anchored_paths(item, folder) for item in value]
    if isinstance(value, dict) and "path" in value:
        return value | {"path": _anchored_paths(value["path"], folder)}
    return value


def _absolute(text: str, folder: Path) -> str:
    if "{run}" in text or not text or Path(text).is_absolute():
        return text
    candidate = folder / text
    if candidate.exists() or ("*" in text and next(folder.glob(text), None) is not None):
        return str(candidate.resolve() if candidate.exists() else candidate)
    return text


def _anchored_code(value: Any, folder: Path) -> Any:
    if isinstance(value, dict):
        return {
            k: _anchored_code(v, folder) if k in ("call", "source") else v for k, v in value.items()
        }
    if isinstance(value, str) and (value.startswith("hf:") or ".py:" in value):
        head, _, _ = value.removeprefix("hf:").rpartition(".py:")
        file = f"{head}.py" if head else value.removeprefix("hf:")
        found = _absolute(file, folder)
        return value.replace(file, found, 1)
    return value


def nearest(name: str, known: Sequence[str]) -> str:
    """`; did you mean …?` for the known name nearest to `name`, or nothing."""
    found = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


def step_named(name: str, recipe: Recipe) -> str:
    """`name`, if it is a step of the recipe, else a UsageError with the nearest."""
    if name in recipe.order:
        return name
    raise UsageError(unknown_key(name, name, recipe.order).replace("key", "step"))
