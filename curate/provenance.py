"""Where a run comes from: versions of what computed it, and the state of the working tree."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from typing import Any

_PACKAGES = ("sdi-curate", "torch", "numpy", "polars", "datasets", "faiss-cpu", "faiss-gpu")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on, where installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_state() -> dict[str, Any]:
    """Commit of the current directory's repository and whether it has changes; else empty."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return {}
    return {"commit": commit, "dirty": bool(_git("status", "--porcelain"))}


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
