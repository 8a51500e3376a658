"""Compiled models run eagerly meanwhile: in compiled code hooks and torch calls are not seen."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.util import find_spec
from threading import RLock
from typing import Any

import torch

_COMPILER = "torch._dynamo"
_ONE = RLock()  # torch's switch is one for the whole process


@contextmanager
def eager() -> Iterator[None]:
    """Nothing that torch.compile has made, or makes meanwhile, runs compiled code.

    torch's own switch imports the whole compiler: a second, and 70 MiB. Where nobody has imported
    it nothing is compiled yet, so the switch waits for somebody to.
    """
    with _ONE, ExitStack() as stack:

        def switch() -> None:
            stack.enter_context(torch.compiler.set_stance("force_eager"))

        if _COMPILER in sys.modules:
            switch()
        else:
            finder = _Finder(switch)
            sys.meta_path.insert(0, finder)
            stack.callback(finder.leave)
        yield


class _Finder(MetaPathFinder):
    """Calls `then` when the compiler has been imported."""

    def __init__(self, then: Callable[[], None]) -> None:
        self._then = then

    def find_spec(self, name: str, *_: Any) -> Any:
        """The compiler's own spec, with a loader that calls; nothing for any other module."""
        if name != _COMPILER:
            return None
        self.leave()
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Calling(spec.loader, self._then)
        return spec

    def leave(self) -> None:
        """Look at imports no longer."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)


class _Calling(Loader):
    """Another loader, and a call once the module is there."""

    def __init__(self, real: Loader, then: Callable[[], None]) -> None:
        self._real, self._then = real, then

    def create_module(self, spec: Any) -> Any:
        """As the other."""
        return self._real.create_module(spec)

    def exec_module(self, module: Any) -> None:
        """As the other, whose module it is again."""
        module.__spec__.loader = module.__loader__ = self._real
        self._real.exec_module(module)
        self._then()
