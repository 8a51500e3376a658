"""Linear layers by oneDNN give the numbers of torch's own, which is left what does not suit."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sdi
from sdi import onednn
from sdi.quicker import run
from tests.looped import Custom, make, names, tokens

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"),
    reason="this torch has no oneDNN",
)


def linear(*args: Any, **kwargs: Any) -> Tensor:
    """A linear layer as a captured pass runs it."""
    found: Tensor = run(F.linear, args, kwargs)
    return found


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Products of any size go to oneDNN; the shapes of the weights it multiplied with."""
    seen: list[tuple[int, ...]] = []
    real = onednn._product

    def product(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen.append(tuple(weight.shape))
        return real(input, weight, bias)

    monkeypatch.setattr(onednn, "LARGE", 0)
    monkeypatch.setattr(onednn, "costs", lambda _: SimpleNamespace(onednn=True))
    monkeypatch.setattr(onednn, "_product", product)
    return seen


@pytest.mark.parametrize("shape", [(3, 5, 8), (7, 8), (8,), (2, 3, 4, 8), (0, 8)])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_derivatives(
    shape: tuple[int, ...], bias: bool, products: list[tuple[int, ...]]
) -> None:
    """Those of F.linear, for any number of dimensions."""
    torch.manual_seed(0)
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(6, 8)
    added = torch.randn(6) if bias else None
    found, expected = linear(x, weight, added), F.linear(x, weight, added)
    assert not found._is_view()
    torch.testing.assert_close(found, expected)
    delta = torch.randn_like(expected)
    gradients = [torch.autograd.grad(y, x, delta)[0] for y in (found, expected)]
    torch.testing.assert_close(*gradients)
    assert products == [(6, 8), (8, 6)]


def test_layouts(products: list[tuple[int, ...]]) -> None:
    """Strided inputs, weights and gradients, and gradients that are expanded."""
    torch.manual_seed(0)
    x = torch.randn(4, 8, 5).transpose(1, 2).requires_grad_()
    weight = torch.randn(8, 6).t()
    found, expected = linear(x, weight), F.linear(x, weight)
    torch.testing.assert_close(found, expected)
    for delta in (torch.ones(()).expand(4, 5, 6), torch.randn(6, 5, 4).permute(2, 1, 0)):
        gradients = [
            torch.autograd.grad(y, x, delta, retain_graph=True)[0] for y in (found, expected)
        ]
        torch.testing.assert_close(*gradients)
    assert len(products) == 3


@pytest.mark.parametrize(
    "bias",
    [
        torch.arange(18.0).view(6, 3)[:, 1],
        torch.tensor([2.0]).expand(6),
        torch.arange(6.0).flip(0),
        torch.randn(6, dtype=torch.complex64).conj().imag,
    ],
    ids=["strided", "expanded", "flipped", "negated"],
)
def test_biases_however_they_lie(bias: Tensor, products: list[tuple[int, ...]]) -> None:
    """Those that are no run of numbers in memory are added as they read."""
    torch.manual_seed(0)
    x, weight = torch.randn(4, 5, 8), torch.randn(6, 8)
    torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias))
    assert products


@pytest.mark.parametrize("shape", [(), (1,), (1, 6), (5, 6), (4, 5, 6)])
def test_biases_that_broadcast(shape: tuple[int, ...], products: list[tuple[int, ...]]) -> None:
    """What torch adds by broadcasting is left to it."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(4, 5, 8), torch.randn(6, 8), torch.randn(shape)
    torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias))
    assert not products


class _Doubled(Tensor):
    """A tensor that answers a linear layer in its own way."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = super().__torch_function__(func, types, args, kwargs or {})
        return 2 * found if func is F.linear else found


@pytest.mark.parametrize("place", [0, 1, 2])
def test_subclasses_are_left_to_themselves(place: int, products: list[tuple[int, ...]]) -> None:
    """A subclass in any place says what the product is."""
    torch.manual_seed(0)
    operands = [torch.randn(4, 8), torch.randn(6, 8), torch.randn(6)]
    expected = 2 * F.linear(*operands)
    operands[place] = operands[place].as_subclass(_Doubled)
    found = linear(*operands).as_subclass(Tensor)
    torch.testing.assert_close(found, expected)
    assert not products


def test_sparse_operands_are_left_to_torch(products: list[tuple[int, ...]]) -> None:
    """Numbers that do not lie in memory one after another."""
    torch.manual_seed(0)
    x, weight = torch.randn(4, 8), torch.randn(6, 8)
    torch.testing.assert_close(linear(x, weight.to_sparse()), F.linear(x, weight))
    assert not products


@pytest.mark.parametrize("arguments", [((3, 7), (6, 8)), ((), (6, 8)), ((3, 8), (8,))])
def test_errors_are_those_of_torch(
    arguments: tuple[tuple[int, ...], ...], products: list[tuple[int, ...]]
) -> None:
    """Shapes that do not fit, no shape at all, and a vector that fits."""
    x, weight = map(torch.ones, arguments)
    messages = []
    for layer in (linear, F.linear):
        try:
            messages.append(str(layer(x, weight)))
        except RuntimeError as error:
            messages.append(str(error))
    assert messages[0] == messages[1]
    assert not products


def test_few_numbers_of_tokens(products: list[tuple[int, ...]]) -> None:
    """Of all numbers of tokens, 32 between two powers of two: memory is kept for each."""
    weight = torch.ones(1, 1)
    for count in range(1025):
        before = len(products)
        linear(torch.ones(count, 1), weight)
        odd = count // (count & -count or 1)
        assert (len(products) > before) == (odd < 64)
    assert len(products) == 1 + 64 + 32 * 4  # none, to 64, four octaves


def test_second_derivatives(products: list[tuple[int, ...]]) -> None:
    """A gradient that is kept on the graph can be differentiated again."""
    torch.manual_seed(0)
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(6, 8)
    pairs = []
    for layer in (linear, F.linear):
        first = torch.autograd.grad(layer(x, weight).pow(3).sum(), x, create_graph=True)[0]
        pairs.append((first.detach(), torch.autograd.grad(first.pow(2).sum(), x)[0]))
    torch.testing.assert_close(*pairs)
    assert products == [(6, 8), (8, 6)]  # the first derivative was torch's


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # of torch's own jvp
def test_what_is_left_to_torch(
    products: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained weights, other types, autocast, transforms, forward-mode derivatives, a switch."""
    x, weight = torch.randn(3, 8), torch.randn(6, 8)
    linear(x, nn.Parameter(weight))
    linear(x, weight, nn.Parameter(torch.zeros(6)))
    linear(x.double(), weight.double())
    linear(x.bfloat16(), weight.bfloat16())
    linear(x, weight, out=torch.empty(3, 6))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    torch.func.vmap(lambda row: linear(row, weight))(x)
    torch.func.grad(lambda row: linear(row, weight).sum())(x)
    torch.func.jvp(lambda row: linear(row, weight), (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        linear(torch.autograd.forward_ad.make_dual(x, x), weight)
    with monkeypatch.context() as switched:
        switched.setattr(torch.backends.mkldnn, "enabled", False)
        linear(x, weight)
    assert not products
    y = linear(x.requires_grad_(), weight)  # differentiated as a batch, with vmap
    deltas = torch.randn(4, 3, 6)
    batched = torch.autograd.grad(y, x, deltas, is_grads_batched=True)[0]
    torch.testing.assert_close(batched, deltas @ weight)
    assert products == [(6, 8)]


def test_small_products_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is measured for them either."""
    monkeypatch.setattr(onednn, "costs", lambda _: pytest.fail("measured"))
    linear(torch.randn(3, 8), torch.randn(6, 8))


class _Wide(nn.Module):
    """A linear layer whose weight is computed, a plain one, and one that is checkpointed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(F.linear(x, weight=self.a.weight * 0.5, bias=self.a.bias))
        x = x + torch.tanh(self.b(x.flatten(0, 1))).view_as(x)
        return x + checkpoint(lambda y: torch.tanh(self.c(y)), x, use_reentrant=False)


@pytest.mark.parametrize("method", ["outer", "fourier"])
def test_a_pass(
    method: Any, products: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uses by oneDNN are seen as others are, and their sketches are those of per-row autograd."""
    model = make(_Wide())
    batch, rows = tokens(), len(tokens()["input_ids"])
    sketcher = sdi.Sketcher(sdi.Loop(model, "body"), dim=128, method=method)
    report = sdi.self_check(sketcher, batch, names(rows), rows=3)
    assert report.worst < 1e-5 and report.conservation < 1e-5
    assert report.sketch is not None and report.sketch < 1e-5
    products.clear()
    part = sketcher(batch, names(rows))
    assert len(products) > 3 * part.values.shape[1]
    with monkeypatch.context() as switched:
        switched.setattr(torch.backends.mkldnn, "enabled", False)
        plain = sketcher(batch, names(rows))
    torch.testing.assert_close(part.values, plain.values, rtol=1e-4, atol=1e-6)


def test_a_pass_leaves_nothing(products: list[tuple[int, ...]]) -> None:
    """Hooks on the nodes of the function here keep no pass alive."""
    held: list[weakref.ref[Tensor]] = []

    def seen(module: nn.Module, x: Tensor) -> Tensor:
        held.append(weakref.ref(x))
        return torch.tanh(F.linear(x, module.a.weight))

    model = make(Custom(seen, a=nn.Linear(16, 16)))
    sketcher = sdi.Sketcher(sdi.Loop(model, "body"), dim=128)
    gc.disable()
    try:
        sketcher(tokens(), names(len(tokens()["input_ids"])))
        assert held and products
        assert not [ref for ref in held if ref() is not None]
    finally:
        gc.enable()
