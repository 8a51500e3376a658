"""What capture refuses, and how it says so: what was seen, what was expected, what to do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sdi.errors import CaptureError, LoopError
from sdi.loop import Loop
from sdi.rules.use import Use, Weight


def _names(weights: Iterable[Weight]) -> str:
    return ", ".join(sorted({name for weight in weights for name in weight.parameters}))


def never_called(loop: Loop) -> LoopError:
    """The body is no part of the forward pass."""
    return LoopError(
        f"the body {', '.join(loop.names)} was never called in the forward pass: expected at least "
        f"one call. Name a module whose forward runs; sdi.find_loops(model, batch) lists them."
    )


def used_outside(names: Iterable[str]) -> CaptureError:
    """A body parameter has gradient outside of every step."""
    return CaptureError(
        f"{', '.join(sorted(names))}: used outside of the body as well (a tied head?), so its "
        f"steps do not add up to its gradient. Choose a body that leaves it out, freeze it with "
        f"requires_grad_(False), or give prelude and coda bins of their own: Loop(outside=True)."
    )


def no_gradient(loop: Loop) -> CaptureError:
    """Nothing flows from the loss into the body."""
    return CaptureError(
        f"no gradient of the loss reaches the body {', '.join(loop.names)}: every step ran "
        f"detached or under no_grad. Run at least the last step with gradients."
    )


def used_unseen(names: Iterable[str]) -> CaptureError:
    """A parameter was used by what no torch call shows."""
    return CaptureError(
        f"{', '.join(sorted(names))}: used by an operation that cannot be seen (a custom autograd "
        f"function or a fused kernel). Switch to the plain implementation of that module, "
        f"or freeze the parameter with requires_grad_(False)."
    )


def foreign_checkpointing(weights: Iterable[Weight]) -> CaptureError:
    """Recomputation by something that is not torch's own checkpointing."""
    return CaptureError(
        f"{_names(weights)}: recomputed in the backward pass, and not by torch.utils.checkpoint. "
        f"Use torch's own gradient checkpointing, or switch it off while sketching."
    )


def full_graph_reentrant() -> CaptureError:
    """A full graph was asked for, and reentrant checkpointing runs without one."""
    return CaptureError(
        "reentrant checkpointing runs without gradients, which full_graph would undo: checkpoint "
        "with use_reentrant=False, or switch gradient checkpointing off while sketching."
    )


def inner_gradient(use: Use) -> CaptureError:
    """A gradient was taken while the model or the loss ran, or a second time."""
    return CaptureError(
        f"{use.label}: differentiated during the forward pass, or more than once (a gradient "
        f"inside of the model, its backward pass or the loss), and a gradient of a gradient cannot "
        f"be attributed. Leave that term out of the loss while sketching."
    )


def written_in_place(weights: Iterable[Weight], operation: str) -> CaptureError:
    """An in-place operation that has no out-of-place twin here, or one with `out=`."""
    return CaptureError(
        f"{_names(weights)}: '{operation}' writes a parameter's values into an activation in "
        f"place, which cannot be attributed. Use the out-of-place operation (torch.where, "
        f"torch.cat)."
    )


def several_outputs(weights: Iterable[Weight], function: Any) -> CaptureError:
    """An operation on a parameter that returns several tensors."""
    return CaptureError(
        f"{_names(weights)}: {getattr(function, '__name__', function)} returns several tensors, "
        f"which cannot be attributed. Use a module made of single-output operations in its place."
    )
