"""The layers of the code: who imports whom, what a bare import costs, and what is packaged."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted([*(ROOT / "sdi").rglob("*.py"), *(ROOT / "curate").rglob("*.py")])
SDI_NEEDS = {"torch", "numpy", "sdi"}
#: What sdi imports inside functions, where a checkpoint or speed asks for it.
SDI_MAY = {"safetensors", "transformers", "numba", "llvmlite", "triton"}
#: Files and folders of kernels and what they are written with: loaded inside a function only.
KERNELS = {
    "sketch/triton_outer.py": {"triton"},
    "sketch/triton_fourier.py": {"triton"},
    "compiled": {"numba", "llvmlite"},
}


def imports(path: Path, *, top_level: bool = False) -> Iterator[str]:
    """Names of the packages that a file imports, anywhere or while it is loaded."""
    tree = ast.parse(path.read_text("utf-8"))
    nodes = _loaded(tree.body) if top_level else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


def _loaded(body: list[ast.stmt]) -> Iterator[ast.AST]:
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With):
            yield from _loaded(node.body)


@pytest.mark.parametrize("path", sorted((ROOT / "sdi").rglob("*.py")), ids=lambda p: p.stem)
def test_sdi_never_imports_curate(path: Path) -> None:
    """Imports go one way, and sdi needs nothing beside torch and numpy to be imported."""
    assert "curate" not in set(imports(path))
    own = set(sys.stdlib_module_names) | SDI_NEEDS
    place = path.relative_to(ROOT / "sdi").as_posix()
    kernels = [needs for start, needs in KERNELS.items() if place.startswith(start)]
    assert set(imports(path, top_level=True)) <= own.union(*kernels)
    assert set(imports(path)) <= own | SDI_MAY


def test_kernels_are_loaded_when_asked_for() -> None:
    """Importing sdi and its sketches loads neither triton nor numba."""
    code = "import sys, sdi.sinks; print({'triton', 'numba'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_click_is_in_the_command_files_only() -> None:
    """The command line is a thin layer: nothing below it knows click."""
    users = {path.relative_to(ROOT / "curate") for path in FILES if "click" in set(imports(path))}
    assert users <= {
        Path("cli.py"),
        *(Path("commands") / p.name for p in (ROOT / "curate" / "commands").glob("*.py")),
    }


def test_importing_the_command_line_is_light() -> None:
    """`curate --help`, with every verb's file loaded, imports nothing heavy."""
    heavy = ["torch", "polars", "datasets", "pydantic", "numpy", "duckdb", "rich", "yaml"]
    code = (
        "import sys; from curate.cli import main; main(['--help']); "
        f"print([m for m in {heavy} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stderr.strip() == "[]"
    assert "Usage: curate" in done.stdout


@pytest.mark.parametrize("first", ["polars", "torch, curate.sketching"])
def test_a_process_ends_without_a_search_and_in_silence(first: str) -> None:
    """The last search for cycles is left out, but where libraries would call these leaks."""
    if "torch" in first and importlib.util.find_spec("triton"):
        first += ", triton._C.libtriton"  # which torch imports where it compiles
    code = (
        f"import atexit, gc, sys, {first}; from curate.cli import process; "
        "atexit.register(lambda: print(gc.get_freeze_count() > 0)); "
        "sys.argv = ['curate', '--version']; sys.exit(process())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[1:] == [str("torch" not in first)]
    assert done.stderr == ""


def test_every_package_is_listed() -> None:
    """Each folder with an __init__ is in pyproject's list, so that a wheel has all of it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    listed = set(project["tool"]["setuptools"]["packages"])
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in FILES
        if path.name == "__init__.py"
    }
    assert found <= listed
    assert listed - found <= {"curate.shipped", "curate.templates"}


def test_files_are_short() -> None:
    """A file is one noun: none is longer than 400 lines."""
    long = {
        str(path.relative_to(ROOT)): count
        for path in FILES
        if (count := len(path.read_text("utf-8").splitlines())) > 400
    }
    assert long == {}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_what_is_public_is_documented(path: Path) -> None:
    """Every module and every public function, class and method has a docstring."""
    tree = ast.parse(path.read_text("utf-8"))
    if not tree.body:
        return
    missing = [] if ast.get_docstring(tree) else ["the module"]
    for node in _public(tree):
        if ast.get_docstring(node) is None:
            missing.append(node.name)
    assert missing == []


def _public(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    for node in _named(tree.body):
        yield node
        if isinstance(node, ast.ClassDef):
            yield from _named(node.body)


def _named(body: list[ast.stmt]) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        if not any("overload" in ast.unparse(mark) for mark in node.decorator_list):
            yield node
