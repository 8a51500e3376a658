"""int8 storage: its error, its special cases, and torch and numpy alike."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sdi.errors import SdiError
from sdi.sketch.quantize import dequantize, quantize

FLOATS = st.floats(-(2.0**100), 2.0**100, width=32)


@settings(max_examples=50, deadline=None)
@given(hnp.arrays(np.float32, (2, 3, 5), elements=FLOATS))
def test_error_is_at_most_half_a_scale(values: np.ndarray) -> None:
    """Every entry comes back to within half a scale (and float rounding), subnormals aside."""
    stored, scale = quantize(values)
    assert stored.dtype == np.int8
    assert scale.shape == (2, 3)
    assert scale.dtype == np.float32
    error = np.abs(dequantize(stored, scale).astype(np.float64) - values)
    assert (error <= scale[..., None] * 0.5001 + 1e-43).all()


@settings(max_examples=50, deadline=None)
@given(hnp.arrays(np.float32, (4, 7), elements=st.floats(-1e6, 1e6, width=32)))
def test_torch_and_numpy_agree(values: np.ndarray) -> None:
    """The same vectors are stored alike from a tensor and from an array, to float rounding."""
    stored, scale = quantize(values)
    other, other_scale = quantize(torch.from_numpy(values.copy()))
    np.testing.assert_allclose(scale, other_scale.numpy(), rtol=1e-6, atol=1e-44)
    assert np.abs(stored.astype(int) - other.numpy().astype(int)).max() <= 1
    back = dequantize(other, other_scale).numpy()
    np.testing.assert_allclose(back, dequantize(other.numpy(), other_scale.numpy()))


def test_zero_vectors_stay_zero() -> None:
    """A zero vector has scale 0 and comes back as zeros, beside others that do not."""
    values = torch.tensor([[0.0, 0.0], [-2.0, 1.0]])
    stored, scale = quantize(values)
    assert scale[0] == 0
    assert stored[0].tolist() == [0, 0]
    assert stored[1].tolist() == [-127, 64]
    assert dequantize(stored, scale)[0].tolist() == [0, 0]


def test_inner_products_survive() -> None:
    """At M = 2048 quantising adds far less error than sketching does (1/√M = 0.022)."""
    values = torch.randn(64, 2048, generator=torch.Generator().manual_seed(0))
    back = dequantize(*quantize(values))
    error = (back @ back.T - values @ values.T) / 2048
    assert float(error.square().mean().sqrt()) < 0.002


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_vectors_are_refused(bad: float) -> None:
    """NaN and infinity raise, whichever kind of array they come in."""
    values = np.array([[1.0, bad], [1.0, 2.0]], dtype=np.float32)
    for given_values in (values, torch.from_numpy(values)):
        with pytest.raises(SdiError, match=r"1 vector\(s\).*NaN or infinity"):
            quantize(given_values)


def test_half_precision_is_taken() -> None:
    """bfloat16 sketches are quantised in float32."""
    stored, scale = quantize(torch.tensor([[1.0, -0.5]], dtype=torch.bfloat16))
    assert scale.dtype == torch.float32
    assert stored.tolist() == [[127, -64]]
