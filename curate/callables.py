"""Code that a recipe names as `file.py:callable`, and the context its own steps are called with.

Only two kinds of files are ever executed: those whose bytes equal a file shipped with the
package (the shipped file itself is then what runs, so a changed neighbour has no say), and,
with `--trust-code`, any other file the recipe names. A file is loaded as a member of a package
made for its folder, so it imports its neighbours with `from .neighbour import name`; nothing is
put on `sys.path`.
"""

from __future__ import annotations

import hashlib
import importlib
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate.cookbook import nearest, shipped_folder
from curate.errors import UsageError

if TYPE_CHECKING:
    import torch

    from curate.recipe import Recipe

Progress = Callable[[str, int, int], None]


def _silent(label: str, done: int, total: int) -> None:
    """Report nothing."""


@dataclass(frozen=True)
class StepContext:
    """What generate, train, retrain and compare are called with: `step(context, **args)`.

    Attributes:
        run: the run directory; steps put their files below it (`data/`, `checkpoints/`, …).
        recipe: the resolved recipe (`context.recipe.model.args`, `context.specs()`, …).
        folder: the folder of the recipe file.
        trust_code: whether `--trust-code` was given.
        overwrite: whether the step was asked for again (`--from`): its old files are then stale.
        log: prints one line on standard error.
        progress: `progress(label, done, total)`, as often as liked; shown with an ETA.

    A step may return `None`, or a table (polars DataFrame), or a mapping of titles to tables;
    tables are printed on standard output. A step that returns has succeeded.
    """

    run: Path
    recipe: Recipe
    folder: Path
    trust_code: bool = False
    overwrite: bool = False
    log: Callable[[str], None] = field(default=print)
    progress: Progress = field(default=_silent)

    def model(self, **args: Any) -> torch.nn.Module:
        """A new model as the recipe describes it; `args` replace some of `model.args`."""
        from curate.models import build_model

        section = self.recipe.model
        settings = {**section.args, **args}
        return build_model(section.source, settings, self.folder, trust_code=self.trust_code)

    def specs(self) -> dict[str, Any]:
        """The recipe's data sets as `DataSpec`s, `{run}` expanded."""
        return self.recipe.specs(self.run)


def load_callable(source: str, folder: Path, *, trust_code: bool = False) -> Callable[..., Any]:
    """The callable that `file.py:callable` names, the file looked for in `folder`.

    Raises UsageError where the file or the name is not there, or the code is not trusted.
    """
    path, name = locate(source, folder)
    module = _load_file(trusted_file(path, trust_code=trust_code))
    found = getattr(module, name, None)
    if not callable(found):
        public = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        raise UsageError(f"{path.name} has no callable {name!r}{nearest(name, public)}")
    return found  # type: ignore[no-any-return]


def locate(source: str, folder: Path) -> tuple[Path, str]:
    """The file and the name in `source`; a bare file may also be one shipped with the package."""
    head, mark, name = source.rpartition(".py:")
    if not mark or not head or not name.isidentifier():
        raise UsageError(f"{source!r} names no code; expected file.py:callable")
    file = f"{head}.py"
    for candidate in (folder / file, shipped_folder() / file):
        if candidate.is_file():
            return candidate.resolve(), name
    raise UsageError(f"{source!r}: there is no {file} in {folder}")


def trusted_file(path: Path, *, trust_code: bool) -> Path:
    """The file to execute for `path`: the shipped file with the same bytes, or, trusted, itself."""
    twin = shipped_twin(path)
    if twin is not None:
        return twin
    if trust_code:
        return path
    raise UsageError(
        f"{path.name} is code that did not come with this package; read it, and if you trust it "
        "run again with --trust-code"
    )


def shipped_twin(path: Path) -> Path | None:
    """The shipped file with the same name and the same sha256 as `path`, if there is one."""
    twin = shipped_folder() / path.name
    if twin.is_file() and file_hash(twin) == file_hash(path):
        return twin
    return None


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _load_file(path: Path) -> types.ModuleType:
    """Import `path` as a member of a package standing for its folder, once per process."""
    package = "curate_recipe_" + hashlib.sha256(str(path.parent).encode()).hexdigest()[:12]
    if package not in sys.modules:
        parent = types.ModuleType(package)
        parent.__path__ = [str(path.parent)]
        sys.modules[package] = parent
    try:
        return importlib.import_module(f"{package}.{path.stem}")
    except SyntaxError as failure:
        raise UsageError(f"{path.name}, line {failure.lineno}: {failure.msg}") from failure
