"""Influence of step vectors: against slow definitions, conservation, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sdi.errors import SpecError
from sdi.influence import (
    centre,
    check_weights,
    contrast,
    energy,
    influence,
    peak,
    signed_share,
    standard_error,
    step_energy,
    step_matrix,
    tracin,
    windows,
)
from sdi.part import Part

K, N, Q, S, M = 2, 5, 3, 4, 32
ETA = [0.5, 2.0]


def make_vectors(rows: int, seed: int, steps: int = S) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, steps, M, generator=generator) for _ in range(K)]


TRAIN, QUERY = make_vectors(N, 1), make_vectors(Q, 2)


def by_hand(tied: bool) -> Tensor:
    """Return M_{s,t}, (N, Q, S, τ) in float64, one inner product at a time."""
    matrix = torch.zeros(N, Q, S, S, dtype=torch.float64)
    for k, eta in enumerate(ETA):
        for n in range(N):
            for q in range(Q):
                for s in range(S):
                    for t in range(S):
                        if tied or s == t:
                            left, right = TRAIN[k][n, s].double(), QUERY[k][q, t].double()
                            matrix[n, q, s, t] += eta * torch.dot(left, right)
    return matrix


def as_part(values: Tensor, ids: tuple[str, ...] | None = None) -> Part:
    ids = ids or tuple(str(row) for row in range(values.shape[0]))
    return Part(ids, values, values.norm(dim=-1), ("1", "2", "3", "4"), torch.zeros(len(ids)))


@pytest.mark.parametrize("tied", [True, False])
def test_scores_follow_their_definitions(tied: bool) -> None:
    """Step matrix, influence and TracIn equal sums of single inner products, tied and untied."""
    expected = by_hand(tied)
    matrix = step_matrix(TRAIN, QUERY, ETA, tied=tied).double()
    torch.testing.assert_close(matrix, expected, rtol=1e-4, atol=1e-4)
    sdi = influence(TRAIN, QUERY, ETA, tied=tied).double()
    torch.testing.assert_close(sdi, expected.sum(2), rtol=1e-4, atol=1e-4)
    total = tracin(TRAIN, QUERY, ETA, tied=tied).double()
    torch.testing.assert_close(total, expected.sum((2, 3)), rtol=1e-4, atol=1e-4)
    assert sdi.shape == (N, Q, S)
    assert total.shape == (N, Q)


def test_parts_and_tensors_are_the_same() -> None:
    """A Part, a bare tensor and a list of one give one answer."""
    expected = influence(TRAIN[0], QUERY[0], 0.5)
    torch.testing.assert_close(influence(as_part(TRAIN[0]), as_part(QUERY[0]), 0.5), expected)
    torch.testing.assert_close(influence([as_part(TRAIN[0])], [QUERY[0]], [0.5]), expected)


def test_double_precision_is_kept() -> None:
    """Exact gradients in float64 are compared in float64."""
    scores = influence([t.double() for t in TRAIN], [q.double() for q in QUERY], ETA)
    torch.testing.assert_close(scores, by_hand(True).sum(2))


def test_tied_depths_may_differ() -> None:
    """Training rows of another depth are fine where only their totals count."""
    assert influence(make_vectors(N, 3, steps=2), QUERY, ETA).shape == (N, Q, S)
    with pytest.raises(SpecError, match="equal steps and vector lengths"):
        influence(make_vectors(N, 3, steps=2), QUERY, ETA, tied=False)


@pytest.mark.parametrize("tied", [True, False])
def test_cosines_are_those_of_the_weighted_stack(tied: bool) -> None:
    """Over checkpoints a cosine is that of the √η-weighted vectors laid end to end."""
    train = torch.cat([v * eta**0.5 for v, eta in zip(TRAIN, ETA, strict=True)], -1)
    query = torch.cat([v * eta**0.5 for v, eta in zip(QUERY, ETA, strict=True)], -1)
    unit = torch.nn.functional.normalize
    seen = influence(TRAIN, QUERY, ETA, tied=tied, score="cosine")
    if tied:
        expected = torch.einsum("nm,qtm->nqt", unit(train.sum(1), dim=-1), unit(query, dim=-1))
    else:
        expected = torch.einsum("ntm,qtm->nqt", unit(train, dim=-1), unit(query, dim=-1))
    torch.testing.assert_close(seen, expected)
    matrix = step_matrix(TRAIN, QUERY, ETA, score="cosine")
    expected = torch.einsum("nsm,qtm->nqst", unit(train, dim=-1), unit(query, dim=-1))
    torch.testing.assert_close(matrix, expected)
    same = tracin(TRAIN, TRAIN, ETA, tied=tied, score="cosine").diagonal()
    torch.testing.assert_close(same, torch.ones(N))


def test_zero_and_tiny_vectors_have_finite_cosines() -> None:
    """An absent step has cosine 0, and norms whose product underflows still divide."""
    query = QUERY[0].clone()
    query[0, 1] = 0
    scores = influence(TRAIN[0] * 1e-15, query * 1e-15, score="cosine")
    assert bool((scores[:, 0, 1] == 0).all())
    assert bool(torch.isfinite(scores).all())
    assert float(scores.abs().max()) > 0.01


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: influence(TRAIN, QUERY[:1]), "train has 2 checkpoints and query 1"),
        (lambda: influence(TRAIN, QUERY, [1.0]), "1 weights for 2 checkpoints"),
        (lambda: influence(TRAIN, QUERY, [0.0, 0.0]), "every checkpoint weight is zero"),
        (lambda: influence(TRAIN, QUERY, [-1.0, 1.0]), "none negative"),
        (lambda: influence(TRAIN[0], QUERY[0][..., :8]), "equal vector lengths.*same loop, dim"),
        (lambda: influence(TRAIN[0][0], QUERY[0]), r"expected \(rows, steps, m\)"),
        (lambda: influence([], []), "empty list"),
        (lambda: tracin(TRAIN, QUERY, score="angle"), "'angle'; expected 'dot' or 'cosine'"),  # type: ignore[arg-type]
        (
            lambda: influence([as_part(TRAIN[0]), as_part(TRAIN[1], tuple("vwxyz"))], QUERY),
            "ids differ between checkpoints",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call: Any, text: str) -> None:
    """Checkpoints, weights, shapes, scores and ids that do not fit each get their own message."""
    with pytest.raises(SpecError, match=text):
        call()


def test_one_weight_serves_all_checkpoints() -> None:
    """A single number is every checkpoint's weight."""
    assert check_weights(2, 3) == [2.0, 2.0, 2.0]


def test_what_is_read_off_scores() -> None:
    """Energy, step energy, share, peak and centre on a matrix small enough to do by hand."""
    scores = torch.tensor([[[1.0, -3.0, 0.0, 0.0]], [[1.0, 1.0, 2.0, 2.0]]])
    assert energy(scores).tolist() == [[4.0], [6.0]]
    assert step_energy(scores).tolist() == [[2.0, 4.0, 2.0, 2.0]]
    assert signed_share(scores).tolist() == [[0.5, -0.5, 0.5, 0.5]]
    assert peak(scores).tolist() == [[2], [3]]
    assert centre(scores).tolist() == [[1.75], [pytest.approx(17 / 6)]]


def test_contrast_is_standardised_unless_raw() -> None:
    """Standardised, contrast has mean zero whatever either window's scale; raw, it is l − e."""
    early, late = torch.tensor([[1.0], [3.0]]), torch.tensor([[500.0], [100.0]])
    assert contrast(early, late).tolist() == [[2.0], [-2.0]]
    assert contrast(early, late, standardise=False).tolist() == [[499.0], [97.0]]
    assert contrast(early, torch.ones(2, 1)).tolist() == [[1.0], [-1.0]]


def test_standard_error_is_the_spread_over_sketches() -> None:
    """The formula agrees with the spread over 4,000 CountSketches, for two checkpoints' weights."""
    generator = torch.Generator().manual_seed(0)
    dim, wide, draws = 64, 512, 4000
    pairs = [torch.randn(2, wide, generator=generator) for _ in range(K)]
    estimates = torch.zeros(draws)
    for vectors, eta in zip(pairs, ETA, strict=True):
        bucket = torch.randint(0, dim, (draws, wide), generator=generator)
        sign = torch.randint(0, 2, (draws, wide), generator=generator) * 2.0 - 1
        left, right = (torch.zeros(draws, dim).scatter_add_(1, bucket, sign * v) for v in vectors)
        estimates += eta * (left * right).sum(1)
    error = standard_error(
        [v[0] @ v[1] for v in pairs],
        [v[0].norm() for v in pairs],
        [v[1].norm() for v in pairs],
        dim,
        ETA,
    )
    assert float(estimates.std()) == pytest.approx(float(error), rel=0.06)


def test_standard_error_broadcasts_and_refuses() -> None:
    """Norms broadcast against scores; unequal lists and an empty sketch are refused."""
    error = standard_error(torch.zeros(2, 3), torch.ones(2, 1), torch.full((3,), 2.0), 4)
    assert error.tolist() == [[1.0] * 3] * 2
    with pytest.raises(SpecError, match="one of each per checkpoint"):
        standard_error([torch.zeros(1)], [torch.ones(1)] * 2, torch.ones(1), 4)
    with pytest.raises(SpecError, match="dimension is 0"):
        standard_error(torch.zeros(1), torch.ones(1), torch.ones(1), 0)


def test_windows_follow_each_query_s_own_depth() -> None:
    """Halves are disjoint and complete, the middle step is late, absent steps are in neither."""
    early, late = windows([4, 5, 1])
    assert early.int().tolist() == [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert late.int().tolist() == [[0, 0, 1, 1, 0], [0, 0, 1, 1, 1], [1, 0, 0, 0, 0]]
    for depth in range(1, 40):
        early, late = windows(depth, (0.0, 0.3), (0.3, 1.0))
        assert bool((early ^ late).all())


def test_windows_in_absolute_steps() -> None:
    """Absolute windows hold first to last step inclusive, cut at the query's depth."""
    early, late = windows([3, 6], (1, 2), (3, 6), steps=7, absolute=True)
    assert early.int().tolist() == [[1, 1, 0, 0, 0, 0, 0]] * 2
    assert late.int().tolist() == [[0, 0, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1, 0]]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"depth": 4, "early": (0.5, 0.5)}, "early window is .*0 ≤ a < b ≤ 1"),
        ({"depth": 4, "late": (0.5, 4)}, "late window.*absolute=True for steps"),
        ({"depth": 4, "early": (0, 2), "absolute": True}, "first and last step, from 1"),
        ({"depth": [0]}, "at least one positive"),
        ({"depth": 4, "steps": 3}, "less than the largest depth 4"),
    ],
)
def test_windows_that_cannot_be_meant_are_refused(arguments: Any, text: str) -> None:
    """Empty or reversed windows, steps given as fractions, and bad depths are refused."""
    with pytest.raises(SpecError, match=text):
        windows(**arguments)
