"""Can this model be attributed? What `curate doctor MODEL` finds out, step by step.

The model is built, its loop is found or named, a few rows are sketched and held against per-row
autograd, and every parameter's gradient is shown at every step. Whatever refuses on the way ends
the examination with a verdict; what was found until then is still shown, and the share of the
gradient that the body has is measured by plain autograd in any case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sdi
from curate import coverage
from curate.candidates import Candidate, looped, rivals, stacks
from curate.doctor import Finding, parsed
from curate.errors import UsageError
from curate.models import build_model
from curate.specimen import TOKENS, Loss, Specimen, chosen_loss, from_file, made_up
from curate.startcheck import refuse_padding
from sdi.checkpoints import load_weights
from sdi.coverage import GradientShare, gradient_share, served
from sdi.errors import LoopError, SdiError, SelfCheckError
from sdi.selfcheck import LOOSE, TOLERANCE
from sdi.stepnorms import StepNorms, step_norms

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Request:
    """What to look at, as the command line says it.

    Attributes:
        source: `hf:DIR` or `file.py:callable`.
        bodies: names of the body; found where there are none.
        tied: False for an ordinary stack of layers.
        skip: parameters of the body to leave out.
        arguments: NAME=VALUE for the callable.
        trust_code: whether code that is not shipped may run.
        loss: causal, masked, `file.py:callable`, or None for what the class's name says.
        data: a file to take the rows from; else they are made up.
        tokens: tokens of a made-up row, or the most of a row of the data.
        rows: how many rows.
        checkpoint: weights to load.
        dim: M of the sketches that are checked.
    """

    source: str
    bodies: tuple[str, ...] = ()
    tied: bool = True
    skip: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    trust_code: bool = False
    loss: str | None = None
    data: str | None = None
    tokens: int | None = None
    rows: int = 2
    checkpoint: Path | None = None
    dim: int = 1024


@dataclass
class Examination:
    """What was found, in the order in which it was.

    Attributes:
        findings: the model, the rows, the loops, the body.
        steps: labels of the steps.
        tied: whether the weights are the same at every step.
        members: names of the body's members.
        shapes: shape of each parameter of the body.
        norms: each attributed parameter at each step; empty where capture refused.
        tolerance: the largest error that the self-check takes for rounding.
        rules: parameter name → the rules that served it.
        gradients: what plain autograd measured; None where it could not.
        covered: (what, text) lines of the coverage.
        verdict: one line.
        refused: the error that ended it; None where the model is attributable.
    """

    findings: list[Finding] = field(default_factory=list)
    steps: tuple[str, ...] = ()
    tied: bool = True
    members: tuple[str, ...] = ()
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    norms: list[StepNorms] = field(default_factory=list)
    tolerance: float = LOOSE
    rules: dict[str, list[str]] = field(default_factory=dict)
    gradients: GradientShare | None = None
    covered: list[coverage.Line] = field(default_factory=list)
    verdict: str = ""
    refused: Exception | None = None

    def note(self, check: str, verdict: str, detail: str) -> None:
        """Add a finding."""
        self.findings.append(Finding(check, verdict, detail))  # type: ignore[arg-type]

    def refuse(self, error: Exception) -> None:
        """End with the error's message as the verdict."""
        self.refused = error
        self.verdict = f"refused: {' '.join(str(error).split())}"


def examine(request: Request, progress: Progress | None = None) -> Examination:
    """Look at a model; refusals are in the result and not raised.

    Raises:
        UsageError: a model, a body, a parameter or an option that is not there, or rows that the
            model cannot read.
        CheckpointError: weights that are not the model's.
    """
    found = Examination(tied=request.tied)
    model = _built(request, found)
    loss, name = chosen_loss(request.loss, model, trust_code=request.trust_code)
    specimen = _specimen(request, model, name)
    found.note("rows", "ok", f"{specimen.made_from}, {name} loss")
    bodies = request.bodies or _searched(request, model, specimen, loss, found)
    if not bodies:
        return found
    try:
        loop = sdi.Loop(model, list(bodies), tied=request.tied, skip=request.skip)
    except LoopError as error:
        raise UsageError(str(error)) from error
    kind = "tied" if request.tied else "untied"
    members = f"{len(loop.members)} modules, " if len(loop.members) > 1 else ""
    found.note("body", "ok", f"{', '.join(bodies)}: {members}{kind}")
    found.members = loop.names
    found.tolerance = TOLERANCE.get(next(iter(loop.parameters().values())).dtype, LOOSE)
    found.shapes = {name: tuple(p.shape) for name, p in loop.all_parameters().items()}
    _measure(request, loop, specimen, loss, found, progress or (lambda *_: None))
    return found


def _built(request: Request, found: Examination) -> nn.Module:
    here = Path.cwd()
    model = build_model(
        request.source, parsed(request.arguments), here, trust_code=request.trust_code
    )
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    if request.checkpoint is not None:
        load_weights(model, request.checkpoint)
    count = sum(parameter.numel() for parameter in model.parameters())
    if not count:
        raise UsageError(f"{type(model).__name__} has no parameters: there is nothing to attribute")
    weights = f", weights of {request.checkpoint.name}" if request.checkpoint is not None else ""
    found.note("model", "ok", f"{type(model).__name__}, {count:,} parameters{weights}")
    return model


def _specimen(request: Request, model: nn.Module, loss: str) -> Specimen:
    if request.data is not None:
        made = from_file(request.data, request.source, request.rows, request.tokens)
    else:
        tokens = request.tokens or TOKENS
        made = made_up(model, request.rows, tokens, masked=loss == "masked")
    device = next(model.parameters()).device
    tensors = {name: value.to(device) for name, value in made.tensors.items()}
    return replace(made, tensors=tensors)


# -- finding the body ---------------------------------------------------------------------------


def _searched(
    request: Request, model: nn.Module, specimen: Specimen, loss: Loss, found: Examination
) -> tuple[str, ...]:
    """The body that is meant beyond doubt; nothing, and a verdict, where there is none."""

    def fixed(model: nn.Module, batch: Any) -> Any:
        with _seeded():  # every pass draws the same depth, where a model draws one
            return loss(model, batch)

    try:
        with _readable(specimen):
            loops = looped(model, specimen.tensors, fixed) if request.tied else []
    except SdiError as error:
        found.refuse(error)
        return ()
    candidates = loops if request.tied else stacks(model)
    for candidate in candidates:
        times = f"called {candidate.calls} times, " if request.tied else ""
        text = f"{candidate.kind} {times}{candidate.parameters:,} parameters"
        found.note(f"loop {', '.join(candidate.names)}", "ok", text)
    meant = rivals(candidates)
    if len(meant) == 1:
        found.note("choice", "note", _choice(meant[0], candidates))
        return meant[0].names
    found.refuse(_no_choice(request, model, meant))
    return ()


def _choice(taken: Candidate, every: Sequence[Candidate]) -> str:
    left = [name for candidate in every if candidate is not taken for name in candidate.names]
    text = f"{', '.join(taken.names)} is taken as the body; {taken.options} confirms it"
    if left:
        text += f", and --body adds what else runs more than once: {', '.join(left)}"
    return text


def _no_choice(request: Request, model: nn.Module, meant: Sequence[Candidate]) -> Exception:
    if meant:
        options = "; ".join(f"{c.options} ({c.calls} calls)" for c in meant)
        if not request.tied:
            options = "; ".join(c.options for c in meant)
        return UsageError(
            f"{len(meant)} bodies could be meant; name one: {options}. Several --body are one body "
            f"of several modules"
        )
    if not request.tied:
        return LoopError("the model has no list of layers; name the layers with --body, in order")
    stack = next(iter(stacks(model)), None)
    remedy = f"--untied {stack.options}" if stack else "--untied and --body NAME for each layer"
    return LoopError(
        f"no module is called more than once, so there is no loop: expected a body that runs two "
        f"times or more. For an ordinary stack of layers pass {remedy}; a body that this batch "
        f"runs only once can be named with --body."
    )


@contextmanager
def _readable(specimen: Specimen) -> Iterator[None]:
    """A failure inside of the model as a line that says what it was given."""
    try:
        yield
    except (SdiError, UsageError):
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise UsageError(
            f"the model or its loss failed on {specimen.made_from}: {type(error).__name__}: "
            f"{text}. Give rows that it can read with --data, fewer --tokens, or its own --loss"
        ) from error


# -- measuring ------------------------------------------------------------------------------------


def _measure(
    request: Request,
    loop: sdi.Loop,
    specimen: Specimen,
    loss: Loss,
    found: Examination,
    progress: Progress,
) -> None:
    """Sketch, check, and measure; whatever refuses becomes the verdict."""
    sketcher = sdi.Sketcher(loop, dim=request.dim, loss=loss)
    detached: tuple[str, ...] = ()
    with _readable(specimen):
        try:
            with _seeded():
                part = sketcher(specimen.tensors, specimen.ids)
            found.steps, detached = part.steps, part.detached
            _table(loop, specimen, loss, found, progress)
            report = _checked(sketcher, specimen, found)
            _pad(sketcher, specimen, found)
            _refuse_disagreement(found.norms)
        except SdiError as error:
            found.refuse(error)
        _cover(loop, specimen, loss, found, sketcher, detached)
    if found.refused is None:
        found.verdict = _verdict(report, found, detached)


def _checked(sketcher: sdi.Sketcher, specimen: Specimen, found: Examination) -> sdi.SelfCheck:
    """The self-check of a run, of every parameter and every row."""
    ids = specimen.ids
    with _seeded():
        report = sdi.self_check(sketcher, specimen.tensors, ids, len(ids), seconds=float("inf"))
    at = f" at {report.worst_at}" if report.worst_at else ""
    found.note("self-check", "ok", f"worst relative error {report.worst:.2g}{at}")
    found.note("conservation", "ok", f"relative error {report.conservation:.2g}")
    if report.sketch is not None:
        found.note("sketch", "ok", f"relative error {report.sketch:.2g}")
    return report


def _pad(sketcher: sdi.Sketcher, specimen: Specimen, found: Examination) -> None:
    """Half a row alone and padded, as a run does it with a short row of its own."""
    alone, wide = specimen.padded_half()
    device = next(sketcher.loop.model.parameters()).device
    try:
        report = refuse_padding(sketcher, alone, wide, device)
    except SelfCheckError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        found.note("padding", "note", f"the model cannot read half a row: {text}")
        return
    widths = " and padded to ".join(map(str, report["widths"]))
    gap = max(report["loss"], report["sketch"] or 0.0)
    found.note("padding", "ok", f"a row of {widths} tokens differs by {gap:.2g}")


def _refuse_disagreement(norms: Sequence[StepNorms]) -> None:
    """What the self-check let pass is refused too where the table shows otherwise."""
    worst = max(norms, key=lambda row: row.error)
    if worst.error > LOOSE:
        raise SelfCheckError(
            f"{worst.name} differs from per-row autograd by {worst.error:.2g} in one pass and not "
            f"in another (expected below {LOOSE:g}): the model is random. Call model.eval(), or "
            f"fix its random states."
        )


def _table(
    loop: sdi.Loop, specimen: Specimen, loss: Loss, found: Examination, progress: Progress
) -> None:
    """Every parameter at every step."""

    def moved(done: int, total: int) -> None:
        progress("compare parameters with autograd", done, total)

    given = (loop, specimen.tensors, specimen.ids, loss, len(found.steps))
    with _seeded():
        found.norms.extend(step_norms(*given, progress=moved))


def _cover(
    loop: sdi.Loop,
    specimen: Specimen,
    loss: Loss,
    found: Examination,
    sketcher: sdi.Sketcher,
    detached: Sequence[str],
) -> None:
    """What is attributed, or would be."""
    known: dict[str, Any] = dict(sketcher.coverage)
    found.rules = known["rules"]
    if found.rules:
        known["served"] = served(loop, found.rules)
    if found.steps:
        known["detached"] = detached
    try:
        with _seeded():
            found.gradients = gradient_share(loop, specimen.tensors, specimen.ids, loss)
    except (SdiError, RuntimeError):
        if found.refused is None:
            raise
    shares = {"": found.gradients.as_dict()} if found.gradients is not None else {}
    found.covered.extend(coverage.lines(known, shares))


def _verdict(report: sdi.SelfCheck, found: Examination, detached: Sequence[str]) -> str:
    shares = found.gradients
    assert shares is not None
    worst = max([report.worst, *(row.error for row in found.norms)])
    text = (
        f"attributable: worst error {worst:.1g} over {len(report.rows)} rows × {report.steps} "
        f"steps; {coverage.percent(shares.of_body)} of the body's squared gradient norm, "
        f"{coverage.percent(shares.of_model)} of the model's"
    )
    if detached:
        text += f"; {len(detached)} of {report.steps} steps ran without a gradient"
    return text


@contextmanager
def _seeded() -> Iterator[None]:
    """The same random numbers every time, for models that draw some; put back afterwards."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        yield
