"""What is set aside while a pass is captured, and put back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sdi.loop import Loop


@contextmanager
def only_body_trains(loop: Loop) -> Iterator[None]:
    """Everything but the attributed parameters is frozen meanwhile; `.grad` is empty."""
    body = {id(p) for p in loop.parameters().values()}
    others = [p for p in loop.model.parameters() if p.requires_grad and id(p) not in body]
    gradients = [(p, p.grad) for p in loop.model.parameters()]
    try:
        for parameter in others:
            parameter.requires_grad_(False)
        for parameter, _ in gradients:
            parameter.grad = None
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)
        for parameter, gradient in gradients:
            parameter.grad = gradient
