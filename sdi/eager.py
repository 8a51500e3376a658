"""Compiled models run eagerly meanwhile: in compiled code hooks and torch calls are not seen."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


@contextmanager
def eager() -> Iterator[None]:
    """Nothing that torch.compile has made, or makes meanwhile, runs compiled code.

    torch's own switch imports the whole compiler: a second, and 70 MiB. Where nobody has imported
    it nothing is compiled yet, so it is left until somebody calls torch.compile.
    """
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield
            return
        real, switched = torch.compile, False

        def compiled(*args: Any, **options: Any) -> Any:
            nonlocal switched
            if not switched:
                switched = True
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            return real(*args, **options)

        stack.callback(setattr, torch, "compile", real)
        torch.compile = compiled
        yield
