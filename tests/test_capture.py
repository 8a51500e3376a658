"""Captured step gradients against per-row autograd, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sdi
from sdi.errors import CaptureError, LossError, SelfCheckError, SpecError
from tests.looped import Block, Custom, LoopedModel, Square, checked, make, names, tokens


def _w(*shape: int) -> nn.Parameter:
    torch.manual_seed(len(shape) + sum(shape))
    return nn.Parameter(torch.randn(shape) * 0.2)


BODIES = {
    "linear": lambda: Custom(lambda m, x: torch.tanh(m.a(x)), a=nn.Linear(16, 16)),
    "what it asks tensors": lambda: Custom(
        lambda m, x: (
            m.a(x.reshape(len(x), x.size(1), x.stride(1))) / m.a.weight.numel() ** 0.5
            if m.a.weight.requires_grad and m.a.weight.dtype == x.dtype and x.is_contiguous()
            else x
        ),
        a=nn.Linear(16, 16),
    ),
    "linear called twice": lambda: Custom(
        lambda m, x: m.a(torch.tanh(m.a(x))), a=nn.Linear(16, 16)
    ),
    "matmul": lambda: Custom(lambda m, x: torch.tanh(x @ m.a), a=_w(16, 16)),
    "matmul of a transpose": lambda: Custom(lambda m, x: x + x @ m.a.t(), a=_w(16, 16)),
    "addmm on flattened rows": lambda: Custom(
        lambda m, x: torch.tanh(torch.addmm(m.b, x.reshape(-1, 16), m.a)).view_as(x),
        a=_w(16, 16),
        b=_w(16),
    ),
    "einsum": lambda: Custom(lambda m, x: torch.einsum("btd,de->bte", x, m.a), a=_w(16, 16)),
    "rescaled weight": lambda: Custom(
        lambda m, x: F.linear(x, m.a / m.a.norm(dim=1, keepdim=True)), a=_w(16, 16)
    ),
    "one bias for every output": lambda: Custom(
        lambda m, x: torch.tanh(F.linear(x, m.a.weight, m.a.bias[:1])) * m.a.bias,
        a=nn.Linear(16, 16),
    ),
    "one bias in addmm": lambda: Custom(
        lambda m, x: torch.tanh(torch.addmm(m.b, x.reshape(-1, 16), m.a)).view_as(x),
        a=_w(16, 16),
        b=_w(1),
    ),
    "gate and bias": lambda: Custom(lambda m, x: x * torch.sigmoid(m.a) + m.b, a=_w(16), b=_w(1)),
    "scalar gain": lambda: Custom(lambda m, x: x + m.a * x, a=_w()),
    "in-place bias": lambda: Custom(lambda m, x: (x * 1.0).add_(m.a), a=_w(16)),
    "in-place augmented": lambda: Custom(lambda m, x: _augmented(m, x), a=_w(16)),
    "custom norm": lambda: Custom(
        lambda m, x: m.a * (x / x.pow(2).mean(-1, keepdim=True).add(1e-5).sqrt()), a=_w(16)
    ),
    "where": lambda: Custom(lambda m, x: torch.where(x > 0, x, m.a * x), a=_w(16)),
    "concatenated prefix": lambda: Custom(
        lambda m, x: x + torch.cat([m.a.expand(len(x), 1, 16), x[:, 1:]], dim=1), a=_w(1, 1, 16)
    ),
    "conv1d": lambda: Custom(
        lambda m, x: x + m.a(x.transpose(1, 2)).transpose(1, 2), a=nn.Conv1d(16, 16, 3, padding=1)
    ),
    "norm twice a step": lambda: Custom(lambda m, x: m.a(torch.tanh(m.a(x))), a=nn.LayerNorm(16)),
    "prelu": lambda: Custom(lambda m, x: m.a(x), a=nn.PReLU()),
    "bilinear": lambda: Custom(lambda m, x: torch.tanh(m.a(x, x)), a=nn.Bilinear(16, 16, 16)),
    "chunks of a weight": lambda: Custom(_chunked, a=_w(32, 16)),
    "stacked weights": lambda: Custom(
        lambda m, x: torch.einsum("btd,kde->bte", x, torch.stack([m.a, m.b])).tanh(),
        a=_w(16, 16),
        b=_w(16, 16),
    ),
    "indexed weight": lambda: Custom(
        lambda m, x: torch.tanh(x @ m.a[torch.arange(15, -1, -1)]), a=_w(16, 16)
    ),
    "cast that changes nothing": lambda: Custom(
        lambda m, x: torch.tanh(F.linear(x.type_as(m.a), m.a.float())), a=_w(16, 16)
    ),
    "weight norm": lambda: Custom(
        lambda m, x: torch.tanh(m.a(x)),
        a=nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)),
    ),
    "embedding of ids by row": lambda: Custom(
        lambda m, x: x + m.a((x.sum(-1) * 10).long() % 7), a=nn.Embedding(7, 16, padding_idx=2)
    ),
    "shared by two modules": lambda: _shared(),
    "in-place view": lambda: Custom(lambda m, x: _view_changed(m, x), a=nn.Linear(16, 16)),
    "block": lambda: Block(16),
}


def _chunked(module: Any, x: Tensor) -> Tensor:
    first, second = module.a.chunk(2)
    return torch.tanh(F.linear(input=x @ first.T, weight=second))


def _shared() -> nn.Module:
    one, two = nn.Linear(16, 16), nn.Linear(16, 16)
    two.weight = one.weight
    return Custom(lambda m, x: m.b(torch.tanh(m.a(x))), a=one, b=two)


def _view_changed(module: Any, x: Tensor) -> Tensor:
    y = module.a(x)
    y[..., :8] *= 2
    return torch.tanh(y)


def _augmented(module: Any, x: Tensor) -> Tensor:
    y = x * 1.0
    y += module.a
    y *= module.a
    return y


@pytest.mark.parametrize("kind", BODIES)
@pytest.mark.parametrize("rows", [1, 4, 7])
def test_body_agrees_with_per_row_autograd(kind: str, rows: int) -> None:
    """Every kind of body has exact step gradients and sketches, also where B equals T."""
    torch.manual_seed(0)
    checked(make(BODIES[kind]()), batch=tokens(rows, 7))


@pytest.mark.parametrize("length", [7, 8])
def test_positions_in_the_batch_are_no_rows(length: int) -> None:
    """Positions (T,) beside rows-first tensors are shared by the rows, also where B divides T."""

    class Placed(LoopedModel):
        def forward(
            self, input_ids: Tensor, places: Tensor, attention_mask: Tensor | None = None
        ) -> Tensor:
            x = self.embed(input_ids)
            for _ in range(3):
                x = self.body((x, places))
            return self.head(x)

    body = Custom(lambda m, pair: torch.tanh(pair[0] + m.a(pair[1])), a=nn.Embedding(9, 16))
    torch.manual_seed(0)
    batch = {**tokens(4, length), "places": torch.arange(length)}
    checked(Placed(body).eval(), batch=batch)


def test_gradients_inside_the_forward_pass_are_refused() -> None:
    """A gradient taken inside of the body or the loss is refused, with the parameter's name."""

    def energy(module: Any, x: Tensor) -> Tensor:
        y = x.detach().requires_grad_()
        return x - torch.autograd.grad(module.a(y).tanh().sum(), y, create_graph=True)[0]

    model = make(Custom(energy, a=nn.Linear(16, 16)))
    sketcher = sdi.Sketcher(sdi.Loop(model, "body"), dim=64)
    with pytest.raises(CaptureError, match=r"body\.a\.bias.*differentiated during the forward"):
        sketcher(tokens(), names(4))


def test_autocast_passes_the_self_check() -> None:
    """Under autocast rows alone and together round differently, and the check allows for it."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return sdi.causal_lm_loss(model, batch)

    sketcher = sdi.Sketcher(sdi.Loop(make(), "body"), dim=64, loss=loss)
    assert sdi.self_check(sketcher, tokens(), names(4)).worst < 2e-2


def test_custom_autograd_function_is_refused_by_name() -> None:
    """A use inside a custom autograd function cannot be seen: refused, naming the parameter."""
    body = Custom(lambda m, x: Square.apply(x, m.a), a=_w(16))
    with pytest.raises(CaptureError, match=r"body\.a: used by an operation that cannot be seen"):
        sdi.Sketcher(sdi.Loop(make(body), "body"), dim=64)(tokens(), names(4))


def test_tied_head_is_refused() -> None:
    """A body weight that the head uses too has gradient outside of every step: refused."""

    class Tied(LoopedModel):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            x = self.embed(input_ids)
            for _ in range(3):
                x = self.body(x)
            return x @ self.body.a

    torch.manual_seed(0)
    model = Tied(Custom(lambda m, x: torch.tanh(x @ m.a), a=_w(16, 16)), vocabulary=16)
    with pytest.raises(CaptureError, match=r"body\.a: used outside of the body"):
        sdi.Sketcher(sdi.Loop(model, "body"), dim=64)(tokens(vocabulary=16), names(4))


@pytest.mark.parametrize("kind", ["dropout", "batch norm"])
def test_rows_that_cannot_be_told_apart_fail_the_self_check(kind: str) -> None:
    """Dropout and batch norm are stopped at the first batch."""
    torch.manual_seed(0)
    bodies = {
        "dropout": Custom(lambda m, x: F.dropout(m.a(x), 0.5), a=nn.Linear(16, 16)),
        "batch norm": Custom(
            lambda m, x: m.b(m.a(x).transpose(1, 2)).transpose(1, 2),
            a=nn.Linear(16, 16), b=nn.BatchNorm1d(16, track_running_stats=False),
        ),
    }  # fmt: skip
    model = make(bodies[kind])
    with pytest.raises((SelfCheckError, CaptureError)):
        sdi.self_check(sdi.Sketcher(sdi.Loop(model, "body"), dim=64), tokens(4, 8), names(4))


def test_model_is_left_as_it_was() -> None:
    """Weights, mode, .grad, requires_grad and hooks are what they were, also after a failure."""
    model = make()
    model.train()
    model.head.weight.requires_grad_(False)
    kept = torch.ones_like(model.body.up.weight)
    model.body.up.weight.grad = kept
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}

    def broken(_model: nn.Module, _batch: Any) -> Tensor:
        raise RuntimeError("stop")

    sketcher = sdi.Sketcher(sdi.Loop(model, "body"), dim=64)
    sketcher(tokens(), names(4))
    sketcher.loss = broken
    with pytest.raises(RuntimeError, match="stop"):
        sketcher(tokens(), names(4))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.requires_grad == flags[name]
        assert parameter.grad is (kept if name == "body.up.weight" else None)
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_order_batch_size_padding_and_company_change_nothing() -> None:
    """A row's sketch is a function of the row: not of order, batch, padding or other parameters."""
    model = make()
    batch, ids = tokens(6), names(6)
    sketcher = sdi.Sketcher(sdi.Loop(model, "body"), dim=256)
    whole = dict(zip(ids, sketcher(batch, ids).values, strict=True))
    order = [4, 1, 5, 0]
    shuffled = sketcher({k: v[order] for k, v in batch.items()}, [ids[i] for i in order])
    padded = {
        "input_ids": F.pad(batch["input_ids"], (0, 3)),
        "attention_mask": F.pad(batch["attention_mask"], (0, 3)),
        "labels": F.pad(batch["labels"], (0, 3), value=-100),
    }
    for part in (shuffled, sketcher(padded, ids)):
        for row, value in zip(part.ids, part.values, strict=True):
            assert (value - whole[row]).norm() <= 1e-5 * whole[row].norm()
    one = sdi.Sketcher(sdi.Loop(model, "body.up"), dim=256)(batch, ids).values
    for p in model.body.parameters():
        p.requires_grad_(False)
    model.body.up.weight.requires_grad_(True)
    model.body.up.bias.requires_grad_(True)
    alone = sdi.Sketcher(sdi.Loop(model, "body"), dim=256)(batch, ids).values
    torch.testing.assert_close(alone, one, rtol=1e-5, atol=1e-6)


def test_different_learning_rates_enter_before_pooling() -> None:
    """With a rate per group, an inner product weighs each parameter by η_p/η̄."""
    model = make(Custom(lambda m, x: x + m.a(x), a=nn.Linear(16, 16)))
    loop = sdi.Loop(model, "body")
    exact = sdi.ExactGradients(loop)(tokens(), names(4))
    rates = {"body.a.weight": 0.3, "body.a.bias": 0.01}
    mean = (0.3 * 256 + 0.01 * 16) / 272
    part = sdi.Sketcher(loop, dim=1 << 15, rates=rates)(tokens(), names(4))
    expected = sum(
        rates[n] / mean * exact.values[:, :, s].flatten(1).pow(2).sum(1)
        for n, s in exact.names.items()
    )
    torch.testing.assert_close(part.values.flatten(1).pow(2).sum(1), expected, rtol=2e-2, atol=0)


def test_conservation_against_a_separate_autograd_path() -> None:
    """Σ_t SDI_t equals TracIn computed from plain per-row gradients."""
    model = make()
    loop = sdi.Loop(model, "body")
    batch = tokens(4)
    exact = sdi.ExactGradients(loop)(batch, names(4)).values
    plain = []
    for row in range(4):
        one = {k: v[row : row + 1] for k, v in batch.items()}
        loss = sdi.causal_lm_loss(model, one).sum()
        found = torch.autograd.grad(loss, list(loop.parameters().values()))
        plain.append(torch.cat([g.flatten() for g in found]))
    stacked = torch.stack(plain)
    sums = sdi.influence(exact[:2], exact[2:]).sum(dim=2)
    torch.testing.assert_close(sums, (stacked[:2] @ stacked[2:].T).to(sums), rtol=1e-4, atol=1e-5)


def test_scalar_and_nan_losses_are_refused() -> None:
    """A mean over the batch cannot be undone; a NaN is named by its row's id."""
    sketcher = sdi.Sketcher(sdi.Loop(make(), "body"), dim=64)
    sketcher.loss = lambda model, batch: sdi.causal_lm_loss(model, batch).mean()
    with pytest.raises(LossError):
        sketcher(tokens(), names(4))
    poison = torch.tensor([1.0, 1.0, float("nan"), 1.0])
    sketcher.loss = lambda model, batch: sdi.causal_lm_loss(model, batch) * poison
    with pytest.raises(LossError, match="r2"):
        sketcher(tokens(), names(4))


def test_duplicate_ids_are_refused() -> None:
    """A row is its id, so one batch cannot hold it twice."""
    with pytest.raises(SpecError, match="duplicate ids"):
        sdi.Sketcher(sdi.Loop(make(), "body"), dim=64)(tokens(2), ["a", "a"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own imports
def test_wrapped_models_have_the_same_sketch() -> None:
    """`module.` and `_orig_mod.` prefixes do not change a parameter's hash."""

    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, **inputs: Tensor) -> Tensor:
            return self.module(**inputs)

    model = make()
    plain = sdi.Sketcher(sdi.Loop(model, "body"), dim=64)(tokens(), names(4))
    loop = sdi.Loop(torch.compile(Wrapper(model)), "body")  # type: ignore[arg-type]
    torch.testing.assert_close(sdi.Sketcher(loop, dim=64)(tokens(), names(4)).values, plain.values)
