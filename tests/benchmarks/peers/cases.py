"""The models and rows that every library is given, and the exact answers.

Needs torch only: each driver (`with_*.py`) imports this file in an environment of its own, in which
this project is not installed. Every model is the same recurrence,

    h_0 = x,    h_{u+1} = tanh(c·W_u h_u + x),    loss(row) = ‖h_U − y‖²,

over U uses u of square matrices W_u: one W for the loops, two for the control. So one reference in
float64, written from the formula and run row by row, serves them all; it shares no code with the
modules that the libraries see.

Letters: N training rows, Q queries, T tokens, D width, U uses, S steps, P parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Rows = tuple[Tensor, Tensor]  # inputs and targets, both (rows, D), or (rows, T, D) for tokens

WIDTH, LOOPS, TRAIN, QUERY, TOKENS = 32, 3, 6, 4, 5


@dataclass(frozen=True)
class Case:
    """One model and its rows.

    Attributes:
        name: as printed.
        make: a fresh model, float32, always with the same weights.
        weights: the distinct matrices, float32.
        uses: for each use, which of `weights` it takes.
        steps: for each use, its zero-based step; an untied model counts as one step.
        scale: c, by which the layer multiplies its own weight.
        detached: how many of the first uses run under no_grad.
        train, query: the rows.
        lengths: tokens that count, per training row and query, where rows have tokens.
        later: the matrix at further checkpoints, whose influence is added.
    """

    name: str
    make: Callable[[], nn.Module]
    weights: tuple[Tensor, ...]
    uses: tuple[int, ...]
    steps: tuple[int, ...]
    train: Rows
    query: Rows
    scale: float = 1.0
    detached: int = 0
    lengths: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    later: tuple[Tensor, ...] = ()


class Control(nn.Module):
    """Two layers, each with weights of its own: what every library here is made for."""

    def __init__(self, weights: tuple[Tensor, ...], kind: type[nn.Linear] = nn.Linear) -> None:
        super().__init__()
        self.first, self.second = (_linear(weight, kind) for weight in weights)
        self.tanh1, self.tanh2 = nn.Tanh(), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        """(rows, D) → (rows, D)."""
        h = self.tanh1(self.first(x) + x)
        return self.tanh2(self.second(h) + x)


class Looped(nn.Module):
    """One `nn.Linear`, called in a loop; nothing else is called twice."""

    def __init__(self, body: nn.Module, detached: int = 0) -> None:
        super().__init__()
        self.body, self.detached = body, detached
        self.tanhs = nn.ModuleList(nn.Tanh() for _ in range(LOOPS))

    def forward(self, x: Tensor) -> Tensor:
        """(rows, D) → (rows, D)."""
        h = x
        for step, tanh in enumerate(self.tanhs):
            with torch.no_grad() if step < self.detached else nullcontext():
                h = tanh(self.body(h) + x)
        return h


class Twice(nn.Module):
    """A body that calls its one `nn.Linear` twice."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.linear = _linear(weight)

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        """(rows, D) → (rows, D)."""
        return torch.tanh(self.linear(torch.tanh(self.linear(h) + x)) + x)


class LoopedTwice(nn.Module):
    """Loops over `Twice`."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.body = Twice(weight)

    def forward(self, x: Tensor) -> Tensor:
        """(rows, D) → (rows, D)."""
        h = x
        for _ in range(LOOPS):
            h = self.body(h, x)
        return h


class Rescaled(nn.Linear):
    """Multiplies its weight by one half before using it."""

    def forward(self, input: Tensor) -> Tensor:
        """(rows, D) → (rows, D)."""
        return F.linear(input, 0.5 * self.weight)


class AlsoFunctional(Looped):
    """Uses the body's weight once more, by `F.linear`, after the loop."""

    def forward(self, x: Tensor) -> Tensor:
        """(rows, D) → (rows, D)."""
        h = super().forward(x)
        return torch.tanh(F.linear(h, self.body.weight) + x)  # type: ignore[arg-type]


def _linear(weight: Tensor, kind: type[nn.Linear] = nn.Linear) -> nn.Linear:
    layer = kind(WIDTH, WIDTH, bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


def row_losses(output: Tensor, target: Tensor) -> Tensor:
    """‖h − y‖² of each row: (rows,)."""
    return (output - target).square().flatten(1).sum(1)


# -- the cases ---------------------------------------------------------------------------------


def control() -> Case:
    """Two untied layers."""
    weights = _weights(2)
    return Case("control", lambda: Control(weights), weights, (0, 1), (0, 0), *_rows())


def looped() -> Case:
    """One Linear, three steps."""
    return _looped("looped", lambda w: Looped(_linear(w)))


def twice() -> Case:
    """One Linear, twice a step, three steps."""
    case = _looped("called twice a step", LoopedTwice)
    return replace(case, uses=(0,) * 6, steps=(0, 0, 1, 1, 2, 2))


def rescaled() -> Case:
    """The control, of Linears that halve their weight."""
    case, weights = control(), _weights(2)
    make = lambda: Control(weights, Rescaled)  # noqa: E731
    return replace(case, name="Linear that rescales its weight", make=make, scale=0.5)


def truncated() -> Case:
    """The first of three steps runs under no_grad."""
    case = _looped("first step under no_grad", lambda w: Looped(_linear(w), detached=1))
    return replace(case, detached=1)


def functional() -> Case:
    """The weight is used once more, outside of the body, without its module."""
    case = _looped("weight used by F.linear too", lambda w: AlsoFunctional(_linear(w)))
    return replace(case, uses=(0,) * 4, steps=(0, 1, 2, 2))


def padded() -> Case:
    """Rows of 1 to 5 tokens, to be given the mean loss over all tokens of the batch."""
    case = _looped("scalar mean over padded tokens", lambda w: Looped(_linear(w)))
    lengths = (tuple(1 + i % TOKENS for i in range(TRAIN)), tuple(1 + i for i in range(QUERY)))
    train, query = _rows(TOKENS)
    return replace(case, train=train, query=query, lengths=lengths)


def shuffled() -> Case:
    """Two checkpoints, and training rows that a shuffling loader hands out."""
    case = _looped("shuffled loader, two checkpoints", lambda w: Looped(_linear(w)))
    return replace(case, later=(_weights(2)[1],))


def _looped(name: str, make: Callable[[Tensor], nn.Module]) -> Case:
    weights = _weights(1)
    return Case(name, lambda: make(weights[0]), weights, (0,) * 3, (0, 1, 2), *_rows())


def _weights(count: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(count, WIDTH, WIDTH, generator=generator)
    return tuple(drawn / WIDTH**0.5)


def _rows(*tokens: int) -> tuple[Rows, Rows]:
    # A part that all rows share keeps their gradients from being orthogonal, where noise is all.
    generator = torch.Generator().manual_seed(2)
    own = torch.randn(2, TRAIN + QUERY, *tokens, WIDTH, generator=generator)
    shared = torch.randn(2, 1, *(1 for _ in tokens), WIDTH, generator=generator)
    drawn = shared + 0.5 * own
    return (drawn[0, :TRAIN], drawn[1, :TRAIN]), (drawn[0, TRAIN:], drawn[1, TRAIN:])


def mask(lengths: tuple[int, ...]) -> Tensor:
    """(rows, T): 1 for tokens, 0 for padding."""
    return (torch.arange(TOKENS)[None] < torch.tensor(lengths)[:, None]).float()


# -- the exact answers -------------------------------------------------------------------------


@dataclass(frozen=True)
class Uses:
    """Factors of each use's gradient of one row: φ_u = c·Σ_tokens δ_u ⊗ a_u, in float64.

    Attributes:
        inputs: U tensors a_u (T, D), with T = 1 for rows without tokens.
        deltas: U tensors δ_u (T, D); zero for uses under no_grad.
    """

    inputs: list[Tensor]
    deltas: list[Tensor]

    def gradient(self, delta: int, given: int, scale: float) -> Tensor:
        """c·Σ δ ⊗ a (D, D) with the δ of one use and the a of another (the same one: φ)."""
        return scale * self.deltas[delta].T @ self.inputs[given]


def uses(case: Case, rows: Rows, lengths: tuple[int, ...] | None) -> Iterator[Uses]:
    """The reference: one row at a time, in float64."""
    for index, (x, y) in enumerate(zip(*rows, strict=True)):
        row, target = (t.double().reshape(-1, WIDTH) for t in (x, y))
        if lengths is not None:
            row, target = row[: lengths[index]], target[: lengths[index]]
        h, inputs, products = row, [], []
        for number, which in enumerate(case.uses):
            product = case.scale * (h @ case.weights[which].double().T)
            if not product.requires_grad:  # the first, and what follows a detached one
                product = product.requires_grad_()
            inputs.append(h.detach())
            products.append(product)
            h = torch.tanh(product + row)
            h = h.detach() if number < case.detached else h
        loss = (h - target).square().sum() / (1 if lengths is None else lengths[index])
        found = torch.autograd.grad(loss, products, allow_unused=True)
        pairs = zip(products, found, strict=True)
        deltas = [torch.zeros_like(p) if d is None else d for p, d in pairs]
        yield Uses(inputs, deltas)


def step_gradients(case: Case, rows: Rows, lengths: tuple[int, ...] | None = None) -> Tensor:
    """φ of every row: (rows, S, P) in float64."""
    every = []
    for row in uses(case, rows, lengths):
        steps = torch.zeros(max(case.steps) + 1, len(case.weights), WIDTH, WIDTH).double()
        for use, (which, step) in enumerate(zip(case.uses, case.steps, strict=True)):
            steps[step, which] += row.gradient(use, use, case.scale)
        every.append(steps.flatten(1))
    return torch.stack(every)


@dataclass(frozen=True)
class Exact:
    """The exact answers of a case.

    Attributes:
        tracin: ⟨g_i, g_j⟩, (N, Q), added over checkpoints.
        steps: ⟨g_i, φ_t(j)⟩, (N, Q, S), added over checkpoints.
        variance, step_variance: of either under a random projection to one dimension,
            ‖u‖²‖v‖² + ⟨u, v⟩² added over checkpoints; divided by M for M dimensions.
    """

    tracin: Tensor
    steps: Tensor
    variance: Tensor
    step_variance: Tensor

    def noise(self, dim: int) -> tuple[float, float]:
        """Relative errors of `tracin` and of `steps` that a projection to `dim` explains."""
        whole = (self.variance.sum() / dim).sqrt() / self.tracin.norm()
        return float(whole), float((self.step_variance.sum() / dim).sqrt() / self.steps.norm())


def exact(case: Case) -> Exact:
    """Per-row autograd in float64, added over the case's checkpoints."""
    parts = [_exact(replace(case, weights=(w,))) for w in case.later]
    parts.append(_exact(case))
    names = ("tracin", "steps", "variance", "step_variance")
    return Exact(*(torch.stack([getattr(p, n) for p in parts]).sum(0) for n in names))


def _exact(case: Case) -> Exact:
    lengths = case.lengths or (None, None)
    train = step_gradients(case, case.train, lengths[0]).sum(1)
    query = step_gradients(case, case.query, lengths[1])
    steps = torch.einsum("np,qsp->nqs", train, query)
    total, left = query.sum(1), train.square().sum(1)
    variance = left[:, None] * total.square().sum(1) + steps.sum(2).square()
    by_step = left[:, None, None] * query.square().sum(2)[None] + steps.square()
    return Exact(steps.sum(2), steps, variance, by_step)


def gram(train: Tensor, query: Tensor) -> Tensor:
    """Inner products (N, Q) of per-row gradients (N, …) and (Q, …)."""
    return train.flatten(1).double() @ query.flatten(1).double().T


def mistakes(case: Case) -> dict[str, Tensor]:
    """Matrices (N, Q) that known mistakes would give, by what the mistake is."""
    lengths = case.lengths or (None, None)
    sides = tuple(zip((case.train, case.query), lengths, strict=True))
    right = [step_gradients(case, rows, n).sum(1) for rows, n in sides]
    found = {}
    if case.scale != 1:
        found["the factor on the weight is left out"] = gram(*right) / case.scale**2
        found["the layer is replaced by one without the factor"] = exact(
            replace(case, scale=1.0)
        ).tracin
    if case.lengths is not None:
        shares = [torch.tensor(n) * len(n) / sum(n) for n in case.lengths]
        weighted = [g * share[:, None] for g, share in zip(right, shares, strict=True)]
        found["rows are weighted by their share of the batch's tokens"] = gram(*weighted)
    if len(case.weights) == 1:
        wrong = {
            what: [torch.stack([f(u) for u in uses(case, rows, n)]) for rows, n in sides]
            for what, f in _pairings(case).items()
        }
        found |= {f"{what}": gram(*both) for what, both in wrong.items()}
        found |= {f"{what}, in training rows": gram(w[0], right[1]) for what, w in wrong.items()}
    return found


def _pairings(case: Case) -> dict[str, Callable[[Uses], Tensor]]:
    """Sums over the wrong pairs (δ of one use, a of another)."""
    count = len(case.uses)
    last = count - 1
    pairs = {
        "only the last call counts": [(last, last)],
        "only the first call counts": [(0, 0)],
        "all but the last use count": [(i, i) for i in range(last)],
        "every call is paired with the last call's input": [(i, last) for i in range(count)],
        "every call is paired with the first call's input": [(i, 0) for i in range(count)],
        "calls are paired in the wrong order": [(i, last - i) for i in range(count)],
    }

    def adding(chosen: list[tuple[int, int]]) -> Callable[[Uses], Tensor]:
        return lambda row: torch.stack([row.gradient(d, a, case.scale) for d, a in chosen]).sum(0)

    return {what: adding(chosen) for what, chosen in pairs.items()}
