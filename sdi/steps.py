"""Which call of the body is which step.

Steps are calls of the body in the order of time. For one module a step is one call. For a list of
modules looped in Python (the list itself is never called) a step is one pass and begins when the
member that was called first is called again. In nested cycles each level has a role, and a step
ends where another role begins as well. In an untied model every member is a step of its own, with
weights of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from sdi.loop import Loop
from sdi.rowtags import leaves
from sdi.torchcalls import graph_nodes


class StepCounter:
    """Numbers the steps of one forward pass from the calls of the body's members.

    Members that hold the very same parameters (a shared block wrapped by several layers) count as
    one. `current` is the zero-based step while a member runs, else None.
    """

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        same = [frozenset(map(id, member.parameters())) or id(member) for member in loop.members]
        self._index = {id(m): same.index(own) for m, own in zip(loop.members, same, strict=True)}
        self._stack: list[int | None] = []
        self._first: dict[str, int] = {}
        self._roles: list[str] = []
        self._calls: list[tuple[int, list[Any]]] = []
        self.current: int | None = None
        self.count = 0

    def called(self, output: Any) -> None:
        """A call of the whole model ended with this output."""
        if self.current is None and id(self._loop.model) not in self._index:
            makers = [t.grad_fn for t in leaves(output) if t.grad_fn is not None]
            self._calls.append((self.count, makers))

    def drop_unused(self, losses: Tensor) -> None:
        """Forget the steps of calls of the model after the last one that the losses depend on."""
        calls, self._calls = self._calls, []  # a hook that holds the graph would never be freed
        if len(calls) < 2 or not self._loop.tied:
            return
        nodes = graph_nodes(losses)
        live = [count for count, makers in calls if any(m in nodes for m in makers)]
        if live:
            self.count = live[-1]

    def forget_calls(self) -> None:
        """Let go of the graph."""
        self._calls.clear()

    def state(self) -> tuple[Any, ...]:
        """What `restore` brings back: where a region that will run again begins."""
        return list(self._stack), dict(self._first), list(self._roles), self.current, self.count

    def restore(self, state: tuple[Any, ...]) -> None:
        """Go back to (or on from) a noted state."""
        stack, first, roles, self.current, self.count = state
        self._stack, self._first, self._roles = list(stack), dict(first), list(roles)

    def enter(self, module: nn.Module) -> None:
        """A member begins: settle which step this call belongs to."""
        self._stack.append(self.current)
        if self.current is not None:
            return
        member = self._index[id(module)]
        if not self._loop.tied:
            self.current = member
            self.count = max(self.count, member + 1)
            return
        role = self._loop.roles[member]
        same = self.count > 0 and self._roles[self.count - 1] == role
        if not same or member == self._first[role]:
            self._first.setdefault(role, member)
            self.count += 1
            self._roles[self.count - 1 :] = [role]
        self.current = self.count - 1

    def leave(self) -> None:
        """A member ends."""
        self.current = self._stack.pop()

    def bin(self, step: int) -> int:
        """The index of a step among the bins; -1 - n stands for what is used after n steps."""
        if not self._loop.outside:
            return step
        before = -1 - step
        if step >= 0:
            return step + 1
        return before if before < self.count else self.count + 1

    def labels(self) -> tuple[str, ...]:
        """Of the steps: "1" … "τ", or "cycle.role" and the number within the cycle."""
        if not self._loop.tied or not self._loop.roles[0]:
            return tuple(str(n + 1) for n in range(self.count))
        outermost, cycle, within = self._loop.roles[-1], 1, Counter[str]()
        labels = []
        for role in self._roles[: self.count]:
            within[role] += 1
            labels.append(f"{cycle}.{role}.{within[role]}")
            if role == outermost:
                cycle, within = cycle + 1, Counter()
        return tuple(labels)


@contextmanager
def counting(loop: Loop, steps: StepCounter, paused: Callable[[], bool]) -> Iterator[None]:
    """Hooks that number the steps of a forward pass; while `paused` calls do not count."""

    def enter(module: nn.Module, _args: Any) -> None:
        if not paused():
            steps.enter(module)

    def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
        if not paused():
            steps.leave()

    def ended(_module: nn.Module, _args: Any, output: Any) -> None:
        if not paused():
            steps.called(output)

    handles: list[Any] = []
    for member in loop.members:
        handles.append(member.register_forward_pre_hook(enter, prepend=True))
        handles.append(member.register_forward_hook(leave, always_call=True))
    handles.append(loop.model.register_forward_hook(ended))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
