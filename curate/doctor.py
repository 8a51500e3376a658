"""Checks of an installation and of a run directory, each finding one row of a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from curate.errors import UsageError

Verdict = Literal["ok", "note", "bad"]

PACKAGES = ("torch", "numpy", "polars", "duckdb", "datasets", "pyarrow")
OPTIONAL = {"numba": "cpu", "transformers": "hf", "tokenizers": "hf"}
FAISS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu11", "faiss-gpu-cu12")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: `bad` findings make `curate doctor` fail."""

    check: str
    verdict: Verdict
    detail: str

    def as_dict(self) -> dict[str, Any]:
        """As a row of a table."""
        return asdict(self)


def installation() -> list[Finding]:
    """Versions, the device, and whether two packages claim the module `faiss`."""
    found = [_version(package, "bad", "install it: pip install sdi-curate") for package in PACKAGES]
    found.insert(0, _version("sdi-curate", "note", "it runs from a checkout"))
    for package, extra in OPTIONAL.items():
        found.append(_version(package, "note", f"pip install 'sdi-curate[{extra}]' brings it"))
    return [*found, faiss_finding(_installed(FAISS)), _device()]


def _version(package: str, verdict: Verdict, remedy: str) -> Finding:
    try:
        return Finding(package, "ok", metadata.version(package))
    except metadata.PackageNotFoundError:
        return Finding(package, verdict, f"not installed; {remedy}")


def _installed(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def faiss_finding(installed: dict[str, str]) -> Finding:
    """Faiss's CPU and GPU packages own the same module, so at most one may be installed."""
    names = " and ".join(f"{name} {version}" for name, version in installed.items())
    if len(installed) > 1:
        remedy = f"pip uninstall {' '.join(installed)}, then install the extra cpu or gpu"
        return Finding("faiss", "bad", f"{names} overwrite each other; {remedy}")
    if not installed:
        return Finding("faiss", "note", "not installed; pip install 'sdi-curate[cpu]' brings it")
    return Finding("faiss", "ok", names)


def _device() -> Finding:
    import torch

    if torch.cuda.is_available():
        return Finding("device", "ok", torch.cuda.get_device_name(0))
    return Finding("device", "ok", f"cpu, {torch.get_num_threads()} threads")


def run(path: Path) -> list[Finding]:
    """Every file of a run against its checksum, and every self-check it recorded."""
    from curate.rundir import RunDirectory

    directory = RunDirectory.open(path)
    problems = list(directory.problems())
    listed = sum(1 for _ in directory.listed())
    found = [Finding("checksum", "bad", problem) for problem in problems]
    if not problems:
        found.append(Finding("checksums", "ok", f"{listed} files are as they were written"))
    manifest = directory.manifest
    for checkpoint, report in manifest.self_check.items():
        worst = report.get("worst")
        detail = f"worst relative error {worst:.2g}" if isinstance(worst, float) else str(report)
        found.append(Finding(f"self-check {checkpoint}", "ok", detail))
    for package, version in manifest.versions.items():
        now = _installed([package]).get(package, version)
        if now != version:
            found.append(Finding(package, "note", f"the run was made with {version}, not {now}"))
    return found


def parsed(arguments: Sequence[str]) -> dict[str, Any]:
    """`name=value` pairs with YAML values, as keyword arguments."""
    import yaml

    found: dict[str, Any] = {}
    for text in arguments:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(f"--arg {text!r}; expected NAME=VALUE")
        found[name] = yaml.safe_load(value)
    return found
