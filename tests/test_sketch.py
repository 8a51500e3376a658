"""The sketch against its float64 definition, and its law over seeds."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sdi
from sdi import hashes
from sdi.sinks import Plans, SketchSink
from sdi.sketch.plan import Hashing, MatrixPlan
from sdi.sketch.quantize import dequantize, quantize
from sdi.sketch.reference import sketch_of_gradient
from tests.looped import make, names, tokens


def _outer(hashing: Hashing, left: torch.Tensor, right: torch.Tensor, method: str) -> torch.Tensor:
    plans = Plans(hashing, {"w": (left.shape[2], right.shape[2])})
    sink = SketchSink(plans, left.shape[0], {}, method, "float32", 1 << 12)  # type: ignore[arg-type]
    sink.outer("w", 0, left, right)
    return sink.result(1, torch.device("cpu"))[:, 0]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 70), columns=st.integers(1, 70), dim=st.sampled_from([2, 16, 37, 64]),
    count=st.integers(1, 5), batch=st.integers(1, 4), seed=st.integers(0, 9),
)  # fmt: skip
def test_both_evaluations_equal_the_definition(
    rows: int, columns: int, dim: int, count: int, batch: int, seed: int
) -> None:
    """`outer` and `fourier` give the float64 sketch of δᵀa for any shape, wider than M or not."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(batch, count, rows, generator=generator)
    right = torch.randn(batch, count, columns, generator=generator)
    hashing = Hashing(dim, seed, "k")
    for method in ("outer", "fourier"):
        ours = _outer(hashing, left, right, method)
        for b in range(batch):
            gradient = left[b].double().T @ right[b].double()
            true = sketch_of_gradient(hashing, "w", gradient)
            assert (ours[b].double() - true).norm() <= 1e-5 * (1 + gradient.norm())


@given(st.integers(1, 64), st.integers(1, 64), st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_no_two_entries_of_a_row_or_column_collide(rows: int, columns: int, seed: int) -> None:
    """Up to M rows and columns, buckets within each row and each column are all different."""
    plan = Hashing(64, seed, "").plan("w", (rows, columns))
    assert isinstance(plan, MatrixPlan)
    bucket = plan.buckets()
    for line in [*bucket, *bucket.T]:
        assert len(set(line.tolist())) == len(line)


def test_hashes_are_fixed_for_all_time() -> None:
    """Stored sketches outlive the process: these words, signs and buckets may never change."""
    stream = hashes.key(0, 1, "step-1000", "body.weight", "in")
    assert stream == 2214283187845764468
    assert hashes.words(0, 2).tolist() == [16294208416658607535, 7960286522194355700]
    assert hashes.permutation(7, 5).tolist() == [1, 0, 4, 3, 2]
    assert hashes.contiguous_buckets(stream, 5, 3).tolist() == [1, 2, 0, 2, 0]


def _exact_and_sketched(dim: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    loop = sdi.Loop(make(steps=3), "body")
    batch = tokens(8)
    exact = sdi.ExactGradients(loop)(batch, names(8)).values
    return exact, sdi.Sketcher(loop, dim=dim, seed=seed)(batch, names(8)).values


def _errors(dim: int, seeds: range) -> torch.Tensor:
    """(seeds, pairs): (estimate − exact) / product of norms of SDI over all pairs and steps."""
    rows = []
    for seed in seeds:
        exact, sketch = _exact_and_sketched(dim, seed)
        true = sdi.influence(exact[:4], exact[4:])
        estimate = sdi.influence(sketch[:4], sketch[4:])
        train = exact[:4].sum(1).norm(dim=1)[:, None, None]
        scale = train * exact[4:].norm(dim=2)[None]
        rows.append(((estimate - true) / scale).flatten())
    return torch.stack(rows)


def test_sketched_influence_is_unbiased_and_falls_as_root_m() -> None:
    """Over 20 seeds the mean error is within noise of 0, and error·√m is one constant."""
    root = {}
    for dim in (256, 1024, 8192):
        errors = _errors(dim, range(20))
        mean = errors.mean(dim=0)
        spread = errors.std(dim=0) / math.sqrt(errors.shape[0])
        assert float((mean / spread.clamp_min(1e-9)).abs().mean()) < 1.5
        root[dim] = float(errors.pow(2).mean().sqrt()) * math.sqrt(dim)
    assert all(0.7 < value < 1.35 for value in root.values()), root


def test_pooled_int8_at_two_kilobytes() -> None:
    """Pooled int8 sketches of 2 kB a step have at most 0.025 root-mean-square relative error."""
    errors = []
    for seed in range(20):
        exact, sketch = _exact_and_sketched(2048, seed)
        stored = dequantize(*quantize(sketch))
        true = sdi.influence(exact[:4], exact[4:])
        train = exact[:4].sum(1).norm(dim=1)[:, None, None]
        scale = train * exact[4:].norm(dim=2)[None]
        errors.append(((sdi.influence(stored[:4], stored[4:]) - true) / scale).flatten())
    assert float(torch.stack(errors).pow(2).mean().sqrt()) <= 0.025


@pytest.mark.parametrize("dim", [64, 4096])
def test_sketch_is_the_sketch_of_the_exact_gradient(dim: int) -> None:
    """Per step, the pooled sketch equals the sum over parameters of their gradients' sketches."""
    loop = sdi.Loop(make(), "body")
    batch = tokens(3)
    exact = sdi.ExactGradients(loop)(batch, names(3))
    part = sdi.Sketcher(loop, dim=dim, seed=3, checkpoint="c")(batch, names(3))
    shapes = {n: tuple(p.shape) for n, p in loop.parameters().items()}
    for b in range(3):
        for s in range(3):
            total = torch.zeros(dim, dtype=torch.float64)
            for name, place in exact.names.items():
                gradient = exact.values[b, s, place].reshape(shapes[name])
                total += sketch_of_gradient(Hashing(dim, 3, "c"), name, gradient)
            assert (part.values[b, s].double() - total).norm() <= 1e-5 * total.norm()
