"""The only hooks: one forward and backward pass in which every use of a body parameter is seen.

How it works. A `TorchFunctionMode` sees each torch call of the forward pass. A call that takes a
body parameter is one of two kinds. Where every other operand is a constant or a parameter (a cast,
a transpose, 1 + gain, the position embedding of arange(T)), its result is a *weight* too: it stays
on autograd's graph down to the parameter and is remembered. Where an operand carries rows of the
batch, it is a *use*: the operation runs with the weights detached, its operands are kept, and a
hook on its output hands the output's gradient to a rule (`sdi.rules`), which adds the per-example
gradient to a sink. So no weight gradient is ever computed.

Which tensors carry rows. Those of the batch, and whatever is computed from them: a tag on the
tensor object says where the rows lie, and every call passes it on (`sdi.rowflow`). A tensor on the
graph carries rows as well.

Why not module hooks. A parameter can be used by a module of any class, raw, cast, transposed, or
by two modules; the uses are the same few operations.

What it gives up. Operations inside a custom autograd function or a foreign kernel are not seen.
Every parameter of the body still requires a gradient while the model runs, so that an unseen use
leaves it reachable from the loss, and `refuse_unseen` names it. Composite functions written in
Python (`multi_head_attention_forward`) are entered. Compiled models run eagerly meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sdi import refusals, rules
from sdi.aside import only_body_trains
from sdi.batchrows import tagged
from sdi.eager import eager
from sdi.fullgraph import full_graph
from sdi.loop import Loop
from sdi.quicker import runner
from sdi.recompute import Operands, in_replayed_region, reentrant, restored
from sdi.rowflow import pass_on
from sdi.rowrandom import seeded_rows
from sdi.rowtags import FIRST, is_tagged, leaves, tag, tag_of, untag
from sdi.rules.derived import part_of_weight
from sdi.rules.elementwise import add_rule
from sdi.rules.generic import generic_rule
from sdi.rules.use import HALVES, Use, Weight
from sdi.sinks import Sink
from sdi.steps import StepCounter, counting
from sdi.torchcalls import (
    CONSTANTS,
    FACTS,
    IN_PLACE,
    LENDING,
    autocast_of,
    entered,
    is_composite,
    origin,
    reachable,
    unchanged,
)

Loss = Callable[[nn.Module, Any], Tensor]


@dataclass
class Trace:
    """What one captured pass saw.

    Attributes:
        losses: (B,) detached.
        labels: of the steps "1" … "τ", between "prelude" and "coda" where the loop asks for them.
        detached: labels of the steps in which parameters were used without a gradient only.
        served: parameter name → names of the rules that served it.
        narrow: whether gradients were in half precision somewhere.
    """

    losses: Tensor
    labels: tuple[str, ...]
    detached: tuple[str, ...]
    served: dict[str, set[str]] = field(default_factory=dict)
    narrow: bool = False

    @property
    def steps(self) -> int:
        """How many bins there are: steps, and prelude and coda where the loop asks for them."""
        return len(self.labels)


def capture(
    loop: Loop,
    batch: Any,
    loss: Loss,
    sink: Sink,
    ids: Sequence[str],
    check: Callable[[Tensor], Any],
) -> Trace:
    """Run the loss forward and backward and hand every use of the body to the sink.

    Args:
        loop: model and body.
        batch: what the loss takes; tensors inside are aliased, never changed.
        loss: (model, batch) → (B,).
        sink: receives the per-example contributions.
        ids: of the B rows.
        check: refuses losses that are no (B,) of finite numbers.

    Raises:
        CaptureError: what cannot be attributed, by parameter name.
        LoopError: if the body is never called.
    """
    mode = _CaptureMode(loop, sink, len(ids))
    with ExitStack() as stack:
        stack.callback(mode.release)
        stack.enter_context(eager())
        stack.enter_context(only_body_trains(loop))
        stack.enter_context(counting(loop, mode.steps, lambda: mode.replaying))
        stack.enter_context(reentrant(mode.unseen_gradients, mode.noted_state))
        stack.enter_context(torch.enable_grad())
        # Regions are run again by the thread that has the mode, on a GPU too.
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        with full_graph(loop.full_graph), seeded_rows(ids, loop.seeded_rows), mode:
            losses = loss(loop.model, tagged(batch, len(ids), loop.layouts))
        check(losses)
        mode.refuse_after_forward(losses)
        mode.steps.drop_unused(losses)
        mode.replaying = True
        total = losses.sum()
        with full_graph(loop.full_graph), mode:
            # Entered: as a torch call of its own, backward would hide all recomputation.
            entered(torch.autograd.backward)(total)
        mode.refuse_after_backward()
    return Trace(losses.detach(), mode.labels(), mode.detached_steps(), mode.served, mode.narrow)


class _CaptureMode(TorchFunctionMode):
    """Sees every torch call; see the module's docstring."""

    def __init__(self, loop: Loop, sink: Sink, size: int) -> None:
        super().__init__()
        self.steps = StepCounter(loop)
        self._run = runner()
        self.replaying = self.narrow = False
        self.served: dict[str, set[str]] = {}
        self._loop, self._sink, self._size = loop, sink, size
        self._weights: dict[int, Weight] = {}
        self._keep: list[Tensor] = []
        self._names = {id(p): name for name, p in loop.parameters().items()}
        for name, p in loop.parameters().items():
            self._weights[id(p)] = Weight(p, name, False, {name: p})
        self._used: set[int] = set()
        self._blind: set[int] = set()
        self._hidden = 0
        self._outside: set[str] = set()
        self._unmade: dict[int, Use] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in FACTS:
            return func(*args, **kwargs)
        if func is torch.autograd.backward:  # of a reentrant region: more may be nested in it
            with self:
                return entered(func)(*args, **kwargs)
        operands = leaves((args, kwargs))
        others = [t for t in operands if id(t) not in self._weights]
        carriers = [t for t in others if is_tagged(t) or t.requires_grad]
        if len(others) == len(operands):
            output = self._run(func, args, kwargs)
            return self._passed(func, args, kwargs, output, carriers)
        if func in CONSTANTS or not torch.is_grad_enabled():
            return self._blind_use(func, args, kwargs, carriers)
        if rules.find(func) is None and is_composite(func):
            with self:
                return entered(func)(*args, **kwargs)
        if carriers and not self._lends(func, args):
            return self._use(func, args, kwargs, carriers)
        return self._derive(func, args, kwargs)

    def _lends(self, func: Any, args: Any) -> bool:
        """Whether a weight only takes the shape or the type of what carries rows."""
        weight = bool(args) and id(args[0]) in self._weights
        return weight and getattr(func, "__name__", "") in LENDING

    # -- the kinds of call ---------------------------------------------------------------------

    def _passed(
        self, func: Any, args: Any, kwargs: Any, output: Any, carriers: list[Tensor]
    ) -> Any:
        """The output, tagged with where the rows of the operands went."""
        return pass_on(func, args, kwargs, output, carriers, self._size) if carriers else output

    def _blind_use(self, func: Any, args: Any, kwargs: Any, carriers: list[Tensor]) -> Any:
        """A use without a gradient: nothing flows, and the step is reported as detached."""
        output = func(*args, **kwargs)
        if carriers and self.steps.current is not None and not (self.replaying or self._hidden):
            self._blind.add(self.steps.current)
        return self._passed(func, args, kwargs, output, carriers)

    def _derive(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A function of parameters and constants alone: its result is a weight."""
        parents = [self._weights[id(t)] for t in leaves((args, kwargs)) if id(t) in self._weights]
        with torch.autograd.graph.saved_tensors_hooks(unchanged, unchanged):
            output = func(*args, **kwargs)  # kept out of checkpointing, to be pulled back at once
        parameters = {name: p for w in parents for name, p in w.parameters.items()}
        for number, tensor in enumerate(leaves(output)):
            if (known := self._weights.get(id(tensor))) and known.name is not None:
                continue  # a cast that changes nothing returns the parameter itself
            if tensor.requires_grad:
                weight = part_of_weight(func, args, kwargs, parents[0], tensor, number)
                self._weights[id(tensor)] = weight or Weight(tensor, None, False, parameters)
                self._keep.append(tensor)  # an id is only as good as the tensor's life
        return output

    def _use(self, func: Any, args: Any, kwargs: Any, carriers: list[Tensor]) -> Any:
        """A parameter meets activations: run with the weights detached, and hook the output."""
        if func in IN_PLACE:
            copy = tag(args[0].clone(), tag_of(args[0]) or FIRST)
            others = [t for t in carriers if t is not args[0]]
            result = self._use(IN_PLACE[func], (copy, *args[1:]), kwargs, [copy, *others])
            return tag(args[0].copy_(result), tag_of(result) or FIRST)
        self._refuse_writes(func, args, kwargs)
        weights: dict[tuple[str, Any], Weight] = {}
        run = tuple(self._swapped(("args", i), v, weights) for i, v in enumerate(args))
        run_named = {k: self._swapped(("kwargs", k), v, weights) for k, v in kwargs.items()}
        output = self._run(func, run, run_named)
        if not isinstance(output, Tensor):
            return self._many_outputs(func, weights, output)
        if not (output.is_floating_point() or output.is_complex()):
            return self._passed(func, args, kwargs, output, carriers)
        if output._is_view() and origin(output) is output:
            output = output.clone()
        if not output.requires_grad:
            output = output.detach().requires_grad_().clone()  # no leaf: it may change in place
        self._passed(func, args, kwargs, output, carriers)
        operands = Operands(run, run_named, {id(t) for t in carriers})
        if not self.replaying:
            self._record(func, operands, weights, output)
        elif not in_replayed_region():
            raise refusals.foreign_checkpointing(weights.values())
        return output

    def _swapped(self, at: tuple[str, Any], value: Any, weights: dict[Any, Weight]) -> Any:
        """An argument with its weights detached; these are noted by their place."""
        if isinstance(value, list | tuple):
            items = [self._swapped((at[0], (at[1], j)), v, weights) for j, v in enumerate(value)]
            return type(value)(items)
        if isinstance(value, Tensor) and id(value) in self._weights:
            weights[at] = self._weights[id(value)]
            return value.detach()
        return value

    # -- recording -----------------------------------------------------------------------------

    def _record(
        self, func: Any, operands: Operands, weights: dict[Any, Weight], output: Tensor
    ) -> None:
        step = self.steps.current
        if step is None:
            self._outside |= {n for w in weights.values() for n in w.parameters}
            if not self._loop.outside:
                return
            step = -1 - self.steps.count
        self._used.add(step)
        use = Use(
            func, (), {}, weights, step, self._size, self._sink, tag_of(output) or FIRST,
            torch.empty(0), autocast_of(output),
        )  # fmt: skip
        self._unmade[id(use)] = use
        hooked, shape = origin(output), output.shape
        place = hooked.output_nr

        def receive(deltas: tuple[Tensor | None, ...]) -> None:
            nonlocal operands
            delta = deltas[place]
            if delta is None:
                return
            if not self.replaying or self._unmade.pop(id(use), None) is None:
                raise refusals.inner_gradient(use)
            with torch._C.DisableTorchFunction():  # what is ours need not pass through the mode
                own = replace(use, delta=delta.detach().reshape(shape))
                served = self._serve_bare(own, operands)
            if not served:
                self._serve(own, operands)
            del operands  # the graph keeps this closure

        # On the node, not the tensor: there a user's own hooks have changed the gradient already.
        assert hooked.grad_fn is not None
        hooked.grad_fn.register_prehook(receive)

    def _serve_bare(self, use: Use, operands: Operands) -> bool:
        """Serve what needs no operand: it may be gone, and what restores it is the model's code."""
        if use.delta.numel() == 0:
            return True
        self.narrow = self.narrow or use.autocast is not None or use.delta.dtype in HALVES
        use.step = self.steps.bin(use.step)
        plain = rules.find(use.function) is add_rule and not use.delta.is_complex()
        return plain and self._applied(add_rule, use, operands.shapes())

    def _serve(self, use: Use, operands: Operands) -> None:
        """Serve any other use."""
        arguments = restored(use, operands)
        with torch._C.DisableTorchFunction():
            rule = None if use.delta.is_complex() else rules.find(use.function)
            if rule is None or not self._applied(rule, use, arguments):
                self._applied(generic_rule, use, arguments)

    def _applied(self, rule: rules.Rule, use: Use, arguments: tuple[Any, Any]) -> bool:
        use.args, use.kwargs = arguments
        with torch.no_grad():
            served = rule(use)
        if served:
            kind = rule.__name__.removesuffix("_rule")
            for name in {name for weight in use.weights.values() for name in weight.parameters}:
                self.served.setdefault(name, set()).add(kind)
        return served

    def _refuse_writes(self, func: Any, args: Any, kwargs: Any) -> None:
        """An in-place operation that has no out-of-place twin here, or one with `out=`."""
        name = str(getattr(func, "__name__", func))
        writes = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
        if writes or kwargs.get("out") is not None:
            found = [self._weights[id(t)] for t in leaves((args, kwargs)) if id(t) in self._weights]
            raise refusals.written_in_place(found, name)

    def _many_outputs(self, func: Any, weights: dict[Any, Weight], output: Any) -> Any:
        if not any(t.is_floating_point() for t in leaves(output)):
            return output
        raise refusals.several_outputs(weights.values(), func)

    # -- regions that run again ----------------------------------------------------------------

    @contextmanager
    def unseen_gradients(self) -> Iterator[None]:
        """Around the first run of a reentrant region: that it has no gradients says nothing."""
        if self._loop.full_graph:
            raise refusals.full_graph_reentrant()
        self._hidden += 1
        try:
            yield
        finally:
            self._hidden -= 1

    def noted_state(self) -> Callable[[], AbstractContextManager[None]]:
        """Note the step in which a region begins; the result goes around its second run."""
        state = self.steps.state()
        return lambda: self._rerun(state)

    @contextmanager
    def _rerun(self, state: tuple[Any, ...]) -> Iterator[None]:
        now, replaying = self.steps.state(), self.replaying
        self.steps.restore(state)
        self.replaying = False
        try:
            yield
        finally:
            self.steps.restore(now)
            self.replaying = replaying

    # -- refusals ------------------------------------------------------------------------------

    def refuse_after_forward(self, losses: Tensor) -> None:
        """Refuse bodies that were never called, uses outside the body, and uses not seen."""
        if self.steps.count == 0:
            raise refusals.never_called(self._loop)
        if self._outside and not self._loop.outside:
            raise refusals.used_outside(self._outside)
        if not losses.requires_grad:
            raise refusals.no_gradient(self._loop)
        if unseen := reachable(losses, self._names):
            raise refusals.used_unseen(unseen)

    def refuse_after_backward(self) -> None:
        """Refuse uses in a recomputed region that were not seen: they left a gradient."""
        parameters = self._loop.parameters().items()
        if unseen := {name for name, p in parameters if p.grad is not None}:
            raise refusals.used_unseen(unseen)

    def release(self) -> None:
        """Drop what is held, uses that the loss does not depend on among it.

        The graph's hooks hold this mode: were it to hold the graph, neither would ever be freed.
        """
        self._unmade.clear()
        self._weights.clear()
        self._keep.clear()
        self.steps.forget_calls()
        for buffer in self._loop.model.buffers():  # changed in place: they outlive the pass
            untag(buffer)

    def labels(self) -> tuple[str, ...]:
        """See `Trace.labels`."""
        steps = self.steps.labels()
        return ("prelude", *steps, "coda") if self._loop.outside else steps

    def detached_steps(self) -> tuple[str, ...]:
        """Labels of the steps whose every use ran without a gradient."""
        blind = sorted(n for n in self._blind - self._used if n < self.steps.count)
        return tuple(self.steps.labels()[n] for n in blind)
