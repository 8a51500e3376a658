"""Preconditioning: the inverse against its definition, conservation, scale, and refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sdi.errors import SpecError
from sdi.precondition import SecondMoment

M = 24


def make_rows(count: int = 60, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    spread = torch.linspace(0.1, 3.0, M)
    return torch.randn(count, M, generator=generator) * spread * scale


def moment_of(rows: Tensor, *cuts: int) -> SecondMoment:
    moment = SecondMoment(M)
    for block in rows.tensor_split(cuts):
        moment.add(block)
    return moment


def test_the_inverse_is_that_of_its_definition() -> None:
    """(C + λI)⁻¹ v equals a dense float64 inverse, with λ relative to trace(C)/M."""
    rows, vectors = make_rows(), torch.randn(2, 3, M)
    c = rows.double().T @ rows.double() / len(rows)
    ridge = 0.1 * c.diagonal().mean() * torch.eye(M, dtype=torch.float64)
    expected = vectors.double() @ torch.linalg.inv(c + ridge)
    seen = moment_of(rows).factor(0.1).apply(vectors)
    assert seen.shape == vectors.shape
    assert seen.dtype == torch.float32
    torch.testing.assert_close(seen.double(), expected, rtol=1e-4, atol=1e-5)


def test_blocks_do_not_matter() -> None:
    """However the rows are cut into blocks, the moment is the same."""
    rows = make_rows()
    torch.testing.assert_close(
        moment_of(rows).matrix(), moment_of(rows, 1, 7, 40).matrix(), rtol=1e-5, atol=1e-6
    )
    assert moment_of(rows, 1, 7, 40).count == 60


def test_conservation_survives() -> None:
    """The preconditioned steps add up to the preconditioned total."""
    steps = torch.randn(4, 8, M)
    inverse = moment_of(make_rows()).factor(0.01)
    torch.testing.assert_close(
        inverse.apply(steps).sum(1), inverse.apply(steps.sum(1)), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("scale", [1e-12, 1e6])
def test_units_of_the_gradient_only_scale_the_answer(scale: float) -> None:
    """Gradients times c give inverses times 1/c², however small c is: λ is relative."""
    vectors = torch.randn(3, M)
    expected = moment_of(make_rows()).factor(0.1).apply(vectors)
    seen = moment_of(make_rows(scale=scale)).factor(0.1).apply(vectors)
    torch.testing.assert_close(seen * scale**2, expected, rtol=1e-3, atol=1e-5)


def test_a_dominant_shared_direction_is_discounted() -> None:
    """What all training rows share loses weight against what few of them have."""
    rows = make_rows() * 0.1
    rows[:, 0] += 10
    inverse = moment_of(rows).factor(0.01)
    shared, own = inverse.apply(torch.eye(M)[[0, M - 1]]).norm(dim=-1)
    assert float(shared) < 0.1 * float(own)


def test_a_wide_sketch_with_few_rows_works_with_a_ridge() -> None:
    """With fewer rows than M the moment is singular: λ = 0 is refused with advice, 0.1 is fine."""
    moment = moment_of(make_rows(5))
    with pytest.raises(SpecError, match=r"5 rows with lambda 0.* singular.*larger lambda"):
        moment.factor(0.0)
    assert bool(torch.isfinite(moment.factor(0.1).apply(torch.ones(M))).all())


def test_the_default_sketch_dimension_is_affordable() -> None:
    """M = 4096 factors and applies in seconds, and inverts what it should."""
    moment = SecondMoment(4096)
    rows = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    moment.add(rows)
    solved = moment.factor(0.1).apply(rows[0]).double()
    c = rows.double()
    back = c.T @ (c @ solved) / 64 + 0.1 * float(c.square().sum()) / 64 / 4096 * solved
    torch.testing.assert_close(back, c[0], rtol=1e-3, atol=1e-3)


def test_what_cannot_be_meant_is_refused() -> None:
    """No rows, zero rows, wrong widths, NaN and a negative λ each say what was expected."""
    moment = SecondMoment(M)
    with pytest.raises(SpecError, match="no rows"):
        moment.factor(0.1)
    with pytest.raises(SpecError, match=r"\(2, 3\); expected \(rows, 24\)"):
        moment.add(torch.ones(2, 3))
    with pytest.raises(SpecError, match="not finite"):
        moment.add(torch.full((1, M), torch.nan))
    assert moment.count == 0
    moment.add(torch.zeros(2, M))
    with pytest.raises(SpecError, match="every training sketch is zero"):
        moment.factor(0.1)
    with pytest.raises(SpecError, match="lambda is -1"):
        moment.factor(-1)
    with pytest.raises(SpecError, match=r"vectors are \(2, 3\)"):
        moment_of(make_rows()).factor(0.1).apply(torch.ones(2, 3))
    with pytest.raises(SpecError, match="dimension is 0"):
        SecondMoment(0)
