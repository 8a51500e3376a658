"""What of a model is attributed, as lines to read: by parameters, by gradient, by rules, by steps.

The same lines are shown for a run, from its manifest, and for a model that `curate doctor` looks
at. Only `recorded` needs torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from curate.manifest import Manifest
    from curate.sketching import SketcherLike

Line = tuple[str, str]


def recorded(
    manifest: Manifest, sketcher: SketcherLike, labels: Iterable[str], detached: Iterable[str]
) -> dict[str, Any]:
    """The coverage for the manifest, once rows were sketched.

    Args:
        manifest: as it stands.
        sketcher: what sketched them.
        labels: of the steps of these rows.
        detached: labels of the steps that this process saw without a gradient.
    """
    from sdi.coverage import served

    seen = dict(sketcher.coverage)
    seen["served"] = served(sketcher.loop, seen.get("rules", {}))
    return {**seen, "detached": with_detached(manifest, labels, detached)}


def with_detached(manifest: Manifest, labels: Iterable[str], new: Iterable[str]) -> list[str]:
    """Labels of the steps that ran without a gradient in some batch, in the order of time.

    Those that the manifest has already stay: an earlier process may have seen them.
    """
    known = manifest.loop.coverage.get("detached", ()) if manifest.loop else ()
    found = {*known, *new}
    order = dict.fromkeys((*manifest.steps, *labels))
    return [label for label in order if label in found]


def lines(coverage: Mapping[str, Any], gradients: Mapping[str, Any]) -> Iterator[Line]:
    """(what, text) for everything that is known of the coverage.

    Args:
        coverage: of the manifest's loop.
        gradients: checkpoint name → shares of the squared gradient norm, as self-checks record
            them; the name may be empty.
    """
    yield from _parameters(coverage)
    for name, shares in gradients.items():
        if shares:
            yield f"gradient @ {name}" if name else "gradient", gradient_text(shares)
    yield from _left_out(coverage, gradients)
    for rule, count in coverage.get("served", {}).items():
        tensors = f"{count['tensors']} tensor{'s' if count['tensors'] != 1 else ''}"
        yield f"rule {rule}", f"{count['parameters']:,} parameters in {tensors}"
    if "detached" in coverage:
        detached = ", ".join(coverage["detached"])
        text = f"ran without a gradient: {detached}" if detached else "all ran with a gradient"
        yield "steps", text


def _parameters(coverage: Mapping[str, Any]) -> Iterator[Line]:
    if "share" not in coverage:
        return
    attributed, body = coverage["attributed"], coverage["parameters"]
    text = f"{attributed:,} of {body:,} of the body attributed ({percent(coverage['share'])})"
    if "share_of_model" in coverage:
        text += f", {percent(coverage['share_of_model'])} of the model's"
    yield "parameters", text


def gradient_text(shares: Mapping[str, Any]) -> str:
    """The attributed share of the squared gradient norm, of the body's and of the model's."""
    return (
        f"{percent(shares['of_body'])} of the body's squared gradient norm attributed, "
        f"{percent(shares['of_model'])} of the model's"
    )


def _left_out(coverage: Mapping[str, Any], gradients: Mapping[str, Any]) -> Iterator[Line]:
    if coverage.get("frozen"):
        yield "frozen", f"require no gradient: {', '.join(coverage['frozen'])}"
    for name, share in coverage.get("skipped", {}).items():
        known = [(at, g["skipped"][name]) for at, g in gradients.items() if g and g.get("skipped")]
        of_gradient = [f"{percent(s)}{f' @ {at}' if at else ''}" for at, s in known]
        text = f"by request: {percent(share)} of the body's parameters"
        if of_gradient:
            text += f", {', '.join(of_gradient)} of its squared gradient norm"
        yield f"skipped {name}", text


def percent(share: float | None) -> str:
    """`98.2 %`; what is not all or nothing is not rounded to it, and what is unknown is a dash."""
    if share is None:
        return "–"
    for digits in (1, 3, 5):
        text = f"{share:.{digits}%}"
        if share in (0, 1) or float(text[:-1]) not in (0, 100):
            break
    return f"{share:.0%}".replace("%", " %") if share in (0, 1) else text.replace("%", " %")
