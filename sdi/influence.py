"""Influence between step vectors: SDI, the step matrix, TracIn, and what is read off them.

With step gradients φ and checkpoint weights η_k,

    TracIn(z, z')    = Σ_k η_k ⟨Σ_s φ_s(z), Σ_t φ_t(z')⟩
    SDI_t(z, z')     = Σ_k η_k ⟨Σ_s φ_s(z), φ_t(z')⟩          Σ_t SDI_t = TracIn
    M_{s,t}(z, z')   = Σ_k η_k ⟨φ_s(z), φ_t(z')⟩              Σ_s M_{s,t} = SDI_t

and, in an untied model, influence_t = Σ_k η_k ⟨φ_t(z), φ_t(z')⟩ with M off its diagonal zero by
definition. Positive means that a gradient step on z lowers the loss of z'.

The functions take whole blocks in memory: a ``Part``, a bare tensor, or a list of either with one
entry per checkpoint. Streaming over shards is the caller's business.

Letters: B examples, K checkpoints, S or τ steps, M vector length, N training rows, Q queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sdi.errors import SpecError

Score = Literal["dot", "cosine"]
Weight = float | Sequence[float]


class Stepped(Protocol):
    """What has step vectors: a ``Part``, or exact gradients."""

    @property
    def ids(self) -> tuple[str, ...]:
        """The B examples' ids."""
        ...

    @property
    def values(self) -> Tensor:
        """Step vectors (B, τ, M)."""
        ...


Vectors = Tensor | Stepped | Sequence[Tensor] | Sequence[Stepped]


def influence(
    train: Vectors,
    query: Vectors,
    weight: Weight = 1.0,
    *,
    tied: bool = True,
    score: Score = "dot",
) -> Tensor:
    """Return SDI_t of every training row on every query, (N, Q, τ).

    Args:
        train: step vectors (N, S, M), or one such per checkpoint.
        query: step vectors (Q, τ, M), or one such per checkpoint.
        weight: η of each checkpoint, or one number for all.
        tied: False matches steps one by one, as for a model whose steps have their own weights.
        score: ``dot``, or ``cosine``: divided by the norms of the two vectors compared, which
            over checkpoints are those of the stacked √η_k-weighted vectors, so that |score| ≤ 1.
            Cosines do not add up over steps. A zero vector has cosine 0.

    Raises:
        SpecError: shapes, ids, checkpoints or weights that do not fit.
    """
    pairs = _pairs(train, query, weight, tied=tied)
    if tied:
        pairs = [(g.sum(1), q, eta) for g, q, eta in pairs]
        dots = _sum([eta * torch.einsum("nm,qtm->nqt", g, q) for g, q, eta in pairs])
    else:
        dots = _sum([eta * torch.einsum("ntm,qtm->nqt", g, q) for g, q, eta in pairs])
    if _checked(score) == "dot":
        return dots
    left, right = _norms(pairs)
    return _divide(dots, left[:, None, None] if tied else left[:, None, :], right[None, :, :])


def step_matrix(
    train: Vectors,
    query: Vectors,
    weight: Weight = 1.0,
    *,
    tied: bool = True,
    score: Score = "dot",
) -> Tensor:
    """Return M_{s,t} of every training row on every query, (N, Q, S, τ).

    Arguments and errors as in ``influence``; untied, the matrix is zero off its diagonal.
    """
    pairs = _pairs(train, query, weight, tied=tied)
    if not tied:
        return torch.diag_embed(influence(train, query, weight, tied=False, score=score))
    dots = _sum([eta * torch.einsum("nsm,qtm->nqst", g, q) for g, q, eta in pairs])
    if _checked(score) == "dot":
        return dots
    left, right = _norms(pairs)
    return _divide(dots, left[:, None, :, None], right[None, :, None, :])


def tracin(
    train: Vectors,
    query: Vectors,
    weight: Weight = 1.0,
    *,
    tied: bool = True,
    score: Score = "dot",
) -> Tensor:
    """Return TracIn of every training row on every query, (N, Q).

    Arguments and errors as in ``influence``. Computed from the totals, not as a sum over steps;
    untied, a row's gradient is its step vectors laid end to end.
    """
    pairs = [
        (g.sum(1), q.sum(1), eta) if tied else (g.flatten(1), q.flatten(1), eta)
        for g, q, eta in _pairs(train, query, weight, tied=tied)
    ]
    dots = _sum([eta * (g @ q.T) for g, q, eta in pairs])
    if _checked(score) == "dot":
        return dots
    left, right = _norms(pairs)
    return _divide(dots, left[:, None], right[None, :])


def energy(scores: Tensor) -> Tensor:
    """Return each row's energy Σ_t |SDI_t|, (...,) from (..., τ)."""
    return scores.abs().sum(-1)


def step_energy(scores: Tensor) -> Tensor:
    """Return each step's energy, Σ over training rows of |SDI_t|: (Q, τ) from (N, Q, τ)."""
    return scores.abs().sum(0, dtype=torch.float64).to(scores.dtype)


def signed_share(scores: Tensor) -> Tensor:
    """Return the share of each step in the mean influence: (Q, τ) from (N, Q, τ).

    Shares add up to 1, and may be negative or above 1 where steps disagree; NaN where the mean
    influence is zero.
    """
    mean = scores.mean(0, dtype=torch.float64)
    return (mean / mean.sum(-1, keepdim=True)).to(scores.dtype)


def peak(scores: Tensor) -> Tensor:
    """Return the step, from 1, where |SDI_t| is largest (the first of equals): (...,) int64."""
    # argmax may return any of several equal steps; on ordered keys the answer is the first.
    largest = scores.abs().amax(-1, keepdim=True)
    return (scores.abs() == largest).int().argmax(-1) + 1


def centre(scores: Tensor) -> Tensor:
    """Return the centre of mass of |SDI_t| in steps from 1: (...,) from (..., τ); NaN if all 0."""
    steps = torch.arange(1, scores.shape[-1] + 1, dtype=scores.dtype, device=scores.device)
    return (scores.abs() * steps).sum(-1) / scores.abs().sum(-1)


def contrast(early: Tensor, late: Tensor, *, standardise: bool = True) -> Tensor:
    """Return late − early influence, (N, ...) from two of (N, ...).

    Standardised, each is first brought to mean 0 and standard deviation 1 over the N training
    rows; a window that does not vary counts 0.
    """
    if not standardise:
        return late - early
    return _standardised(late) - _standardised(early)


def standard_error(
    scores: Tensor | Sequence[Tensor],
    train_norms: Tensor | Sequence[Tensor],
    query_norms: Tensor | Sequence[Tensor],
    dim: int,
    weight: Weight = 1.0,
) -> Tensor:
    """Return the standard error of a sketched score Σ_k η_k s_k.

    Each s_k, an inner product of two vectors sketched into M buckets, has a variance of about
    (n₁² n₂² + s_k²) / M; hashes of different checkpoints are independent, so variances add, each
    times η_k². Early, late and contrast are inner products with a query vector of their own (a
    sum over steps, or a difference of two): pass that vector's norm. Summing squares over steps
    instead would be wrong, since steps share the training sketch.

    Args:
        scores: the unweighted s_k, of any shape, or one such per checkpoint.
        train_norms: n₁ of the float sketches, broadcast against the scores, likewise.
        query_norms: n₂, likewise.
        dim: M.
        weight: η of each checkpoint, or one number for all.

    Raises:
        SpecError: the three do not have one entry per checkpoint, or ``dim`` is not positive.
    """
    if dim < 1:
        raise SpecError(f"the sketch dimension is {dim}; expected at least 1")
    lists = [[x] if isinstance(x, Tensor) else list(x) for x in (scores, train_norms, query_norms)]
    if len({len(entries) for entries in lists}) != 1:
        raise SpecError(
            f"scores, training norms and query norms have {[len(x) for x in lists]} entries; "
            "expected one of each per checkpoint"
        )
    weights = check_weights(weight, len(lists[0]))
    variance = _sum(
        [
            eta**2 * ((left.double() * right.double()) ** 2 + s.double() ** 2) / dim
            for s, left, right, eta in zip(*lists, weights, strict=True)
        ]
    )
    return variance.sqrt().to(lists[0][0].dtype)


class Windows(NamedTuple):
    """Which steps are early and which late for each query: two bool masks (Q, τ)."""

    early: Tensor
    late: Tensor


def windows(
    depth: int | Sequence[int] | npt.NDArray[np.integer] | Tensor,
    early: tuple[float, float] = (0.0, 0.5),
    late: tuple[float, float] = (0.5, 1.0),
    *,
    steps: int | None = None,
    absolute: bool = False,
) -> Windows:
    """Return masks of the early and the late steps of each query.

    As fractions, a window [a, b) holds the steps whose middle, (t − ½) / depth, lies in it: windows
    that meet share no step and miss none. The middle step of an odd depth is late by default.

    Args:
        depth: number of steps of each query, (Q,), or one number for a single query.
        early: fractions of the query's own depth; or first and last step, from 1, if ``absolute``.
        late: likewise.
        steps: τ, the width of the masks; by default the largest depth.
        absolute: whether ``early`` and ``late`` are steps. A query's absent steps never count.

    Raises:
        SpecError: a window that is empty by its own bounds or out of range, or a bad depth.
    """
    depths = torch.as_tensor(depth, dtype=torch.int64).reshape(-1, 1)
    if depths.numel() == 0 or int(depths.min()) < 0 or int(depths.max()) < 1:
        raise SpecError(f"depth is {depth}; expected whole numbers of steps, at least one positive")
    width = int(depths.max()) if steps is None else steps
    if width < int(depths.max()):
        raise SpecError(f"steps is {width}, less than the largest depth {int(depths.max())}")
    step = torch.arange(1, width + 1, device=depths.device).reshape(1, -1)
    masks = [
        _window(name, bounds, step, depths, absolute) & (step <= depths)
        for name, bounds in (("early", early), ("late", late))
    ]
    return Windows(*masks)


def check_weights(weight: Weight, checkpoints: int) -> list[float]:
    """Return one η per checkpoint, refusing what cannot be meant.

    Raises:
        SpecError: the wrong number of weights, a negative or non-finite one, or all of them zero.
    """
    single = isinstance(weight, (int, float))
    weights = [float(weight)] * checkpoints if single else [float(w) for w in weight]  # type: ignore[arg-type, union-attr]
    if len(weights) != checkpoints:
        raise SpecError(f"{len(weights)} weights for {checkpoints} checkpoints; expected one each")
    if any(not np.isfinite(w) or w < 0 for w in weights):
        raise SpecError(f"checkpoint weights are {weights}; expected finite numbers, none negative")
    if not any(weights):
        raise SpecError(
            "every checkpoint weight is zero, so every influence would be zero; give at least one "
            "checkpoint a positive weight"
        )
    return weights


def _window(
    name: str, bounds: tuple[float, float], step: Tensor, depths: Tensor, absolute: bool
) -> Tensor:
    first, last = bounds
    if absolute:
        if not (1 <= first <= last) or int(first) != first or int(last) != last:
            raise SpecError(f"{name} window is {bounds}; expected first and last step, from 1")
        return (step >= first) & (step <= last)
    if not (0 <= first < last <= 1):
        raise SpecError(
            f"{name} window is {bounds}; expected fractions of the depth, 0 ≤ a < b ≤ 1 "
            "(or absolute=True for steps)"
        )
    middle = (step.double() - 0.5) / depths.double().clamp(min=1)
    return (middle >= first) & (middle < last)


Pair = tuple[Tensor, Tensor, float]


def _pairs(train: Vectors, query: Vectors, weight: Weight, *, tied: bool) -> list[Pair]:
    """Return (train (N, S, M), query (Q, τ, M), η) per checkpoint, after checking that they fit."""
    left, right = _stack("train", train), _stack("query", query)
    if len(left) != len(right):
        raise SpecError(
            f"train has {len(left)} checkpoints and query {len(right)}; expected the same ones, "
            "in the same order"
        )
    pairs = list(zip(left, right, check_weights(weight, len(left)), strict=True))
    for g, q, _ in pairs:
        if g.shape[-1] != q.shape[-1] or (not tied and g.shape[1] != q.shape[1]):
            what = "vector lengths" if tied else "steps and vector lengths"
            raise SpecError(
                f"train is {tuple(g.shape)} and query {tuple(q.shape)}; expected equal {what}. "
                "Sketch both with the same loop, dim and seed"
            )
    return pairs


def _stack(name: str, vectors: Vectors) -> list[Tensor]:
    """Return the step vectors of each checkpoint, in one floating type."""
    single = isinstance(vectors, Tensor) or hasattr(vectors, "values")
    entries: list[Tensor | Stepped] = [vectors] if single else list(vectors)  # type: ignore[list-item, arg-type]
    if not entries:
        raise SpecError(f"{name} is an empty list; expected one entry per checkpoint")
    ids = [entry.ids for entry in entries if not isinstance(entry, Tensor)]
    if any(other != ids[0] for other in ids[1:]):
        raise SpecError(f"{name}'s ids differ between checkpoints; expected the same rows in order")
    tensors = [entry if isinstance(entry, Tensor) else entry.values for entry in entries]
    if any(t.ndim != 3 or t.shape[0] != tensors[0].shape[0] for t in tensors):
        raise SpecError(
            f"{name} has shapes {[tuple(t.shape) for t in tensors]}; expected (rows, steps, m) "
            "with the same rows at each checkpoint"
        )
    return [t if t.dtype == torch.float64 else t.float() for t in tensors]


def _sum(terms: list[Tensor]) -> Tensor:
    return torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]


def _norms(pairs: list[Pair]) -> tuple[Tensor, Tensor]:
    """Return the norms of the √η_k-weighted stacks over checkpoints, without their last axis."""
    left = _sum([eta * g.square().sum(-1) for g, _, eta in pairs])
    right = _sum([eta * q.square().sum(-1) for _, q, eta in pairs])
    return left.sqrt(), right.sqrt()


def _divide(dots: Tensor, left: Tensor, right: Tensor) -> Tensor:
    # Two divisions: the product of two small norms would underflow in float32.
    left, right = (torch.where(norm > 0, norm, torch.inf) for norm in (left, right))
    return dots / left / right


def _checked(score: str) -> str:
    if score not in ("dot", "cosine"):
        raise SpecError(f"score is {score!r}; expected 'dot' or 'cosine'")
    return score


def _standardised(values: Tensor) -> Tensor:
    centred = values - values.mean(0, keepdim=True)
    spread = centred.square().mean(0, keepdim=True).sqrt()
    return centred / torch.where(spread > 0, spread, torch.inf)
