"""Checks of an installation, a run directory and a model, each finding one row of a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from curate.errors import UsageError

if TYPE_CHECKING:
    import torch

    from sdi import Loop

Verdict = Literal["ok", "note", "bad"]

PACKAGES = ("torch", "numpy", "polars", "duckdb", "datasets", "pyarrow")
OPTIONAL = {"numba": "cpu", "transformers": "hf", "tokenizers": "hf"}
FAISS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu11", "faiss-gpu-cu12")
#: Rows and tokens of the made-up batch that a model is checked with.
ROWS, TOKENS = 4, 16


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


def model(
    source: str,
    bodies: Sequence[str] = (),
    *,
    tied: bool = True,
    arguments: Sequence[str] = (),
    trust_code: bool = False,
) -> list[Finding]:
    """Build a model, find its loops, and compare step gradients of two rows with autograd.

    Without `bodies` the outermost module that is called more than once is taken.
    """
    import torch

    import sdi
    from curate.models import build_model

    built = build_model(source, parsed(arguments), Path.cwd(), trust_code=trust_code)
    count = sum(parameter.numel() for parameter in built.parameters())
    found = [Finding("model", "ok", f"{type(built).__name__}, {count:,} parameters")]
    torch.manual_seed(0)
    batch = made_up_batch(built)
    inputs = {key: value for key, value in batch.items() if key == "input_ids"}
    loops = sdi.find_loops(built, inputs)
    for loop in loops:
        detail = f"{loop.kind} called {loop.calls} times, {loop.parameters:,} parameters"
        found.append(Finding(f"loop {loop.name}", "ok", detail))
    chosen = list(bodies) or [loop.name for loop in loops[:1]]
    if not chosen:
        remedy = "name the layers with --body and pass --untied for an ordinary transformer"
        return [*found, Finding("loop", "bad", f"no module is called more than once; {remedy}")]
    return [*found, *_checked(sdi.Loop(built, chosen, tied=tied), batch)]


def _checked(loop: Loop, batch: dict[str, torch.Tensor]) -> list[Finding]:
    """The coverage of a loop body, and the self-check of the sketches of a batch."""
    import sdi

    coverage = loop.coverage()
    share = f"{coverage['attributed']:,} of {coverage['parameters']:,} parameters attributed"
    sketcher = sdi.Sketcher(loop, dim=1024)
    ids = [f"row-{number}" for number in range(ROWS)]
    try:
        report = sdi.self_check(sketcher, batch, ids, rows=2)
    except Exception as failure:
        if not hasattr(failure, "exit_code"):
            raise
        bad = Finding("self-check", "bad", " ".join(str(failure).split()))
        return [Finding("body", "ok", f"{', '.join(loop.names)}: {share}"), bad]
    detail = f"{report.steps} steps, worst relative error {report.worst:.2g} at {report.worst_at}"
    return [
        Finding("body", "ok", f"{', '.join(loop.names)}: {share}"),
        Finding("self-check", "ok", detail),
        Finding("conservation", "ok", f"relative error {report.conservation:.2g}"),
    ]


def made_up_batch(built: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Random tokens below the vocabulary of the model's first embedding: (B, T) int64 tensors."""
    import torch

    embeddings = [m for m in built.modules() if isinstance(m, torch.nn.Embedding)]
    if not embeddings:
        raise UsageError("the model has no embedding, so no token batch can be made up for it")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, embeddings[0].num_embeddings, (ROWS, TOKENS), generator=generator)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}


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
