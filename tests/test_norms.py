"""The gradients of LayerNorm and RMSNorm by a compiled kernel, beside torch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sdi
from sdi.rules import norm
from tests.looped import LoopedModel, names, tokens

pytest.importorskip("numba")


class Turned(nn.Module):
    """A norm, and a layer; over tokens first where `turned`."""

    def __init__(self, inner: nn.Module, width: int, *, turned: bool) -> None:
        super().__init__()
        self.norm, self.layer, self.turned = inner, nn.Linear(width, width), turned

    def forward(self, x: Tensor) -> Tensor:
        seen = x.transpose(0, 1) if self.turned else x
        normed = self.layer(self.norm(seen * 3 + 1))
        return x + (normed.transpose(0, 1) if self.turned else normed)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each use was served by the kernel."""
    seen: list[bool] = []
    real = norm._compiled

    def counted(*args: Any, **options: Any) -> Any:
        found = real(*args, **options)
        seen.append(found is not None)
        return found

    monkeypatch.setattr(norm, "_compiled", counted)
    return seen


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [10, 100])
@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_kernel_and_torch_agree(
    kind: Any, width: int, dtype: torch.dtype, turned: bool,
    calls: list[bool], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """To float32's rounding, whatever the layout."""
    torch.manual_seed(0)
    body = Turned(kind(width, eps=1e-3), width, turned=turned)
    loop = sdi.Loop(LoopedModel(body, width).to(dtype), "body")
    found = sdi.ExactGradients(loop)(tokens(), names(4))
    assert calls == [True] * 3
    monkeypatch.setattr(norm.team, "kernels", lambda _: None)
    expected = sdi.ExactGradients(loop)(tokens(), names(4))
    assert calls == [True] * 3 + [False] * 3
    gap = (found.values - expected.values).norm(dim=2) / expected.values.norm(dim=2)
    assert 0 < float(gap.max()) < 2e-6


@pytest.mark.parametrize(
    "given",
    [
        lambda m, x: F.rms_norm(x, (16,), m.weight),  # an ε that torch chooses
        lambda m, x: F.layer_norm(x[:, :, None], (1, 16), m.weight[None], m.bias[None])[:, :, 0],
        lambda m, x: F.layer_norm(x.double(), (16,), m.weight.double(), m.bias.double()).float(),
    ],
    ids=["no epsilon", "two axes", "float64"],
)
def test_what_is_left_to_torch(given: Any, calls: list[bool]) -> None:
    """What the kernel does not know has gradients all the same."""

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.ones(16)), nn.Parameter(torch.zeros(16))

        def forward(self, x: Tensor) -> Tensor:
            return x + given(self, x)

    loop = sdi.Loop(LoopedModel(Body()), "body")
    assert sdi.self_check(sdi.Sketcher(loop, dim=64), tokens(), names(4)).worst < 1e-5
    assert calls and not any(calls)
