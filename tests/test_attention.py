"""Attention of a pass is that of float64 to rounding; in half precision nearer than torch's own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import sdi
from sdi import attention as module
from sdi.attention import torchs_own
from sdi.errors import SelfCheckError
from sdi.quicker import run
from tests.looped import make, names, tokens

HALF = [torch.bfloat16, torch.float16]
SINGLE = torch.float32


def attention(*args: Any, **kwargs: Any) -> Tensor:
    """Attention as a captured pass runs it."""
    found: Tensor = run(F.scaled_dot_product_attention, args, kwargs)
    return found


@pytest.fixture(params=["compiled", "torch's"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which kernels serve float32: of any size the compiled ones, or torch's."""
    compiles = request.param == "compiled"
    if compiles:
        pytest.importorskip("numba")
    monkeypatch.setattr(module, "LARGE", 0)
    monkeypatch.setattr(module, "costs", lambda _: SimpleNamespace(compiles_attention=compiles))
    return str(request.param)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Types of the queries whose attention was not left to torch."""
    seen: list[torch.dtype] = []
    real = module._Attention.apply

    def apply(query: Tensor, *rest: Any) -> Any:
        seen.append(query.dtype)
        return real(query, *rest)

    monkeypatch.setattr(module._Attention, "apply", apply)
    return seen


def _operands(kind: torch.dtype, keys: int = 12) -> list[Tensor]:
    """Query, key and value as a model makes them: views of one product, heads in the middle."""
    torch.manual_seed(0)
    query, both = torch.randn(3, 12, 2, 8), torch.randn(3, keys, 2, 2, 8)
    parts = (query, both[:, :, 0], both[:, :, 1])
    return [part.to(kind).transpose(1, 2).detach().requires_grad_() for part in parts]


def _gradients(call: Any, operands: list[Tensor], **options: Any) -> tuple[Tensor, ...]:
    """Output and gradients for a fixed gradient of the output."""
    torch.manual_seed(1)
    found = call(*operands, **options)
    delta = torch.randn(found.shape[0], found.shape[2], found.shape[1], found.shape[3])
    delta = delta.transpose(1, 2).to(found.dtype)
    return found.detach(), *torch.autograd.grad(found, operands, delta)


def _masks(keys: int) -> dict[str, dict[str, Any]]:
    torch.manual_seed(2)
    keep = torch.rand(3, 1, 12, keys) > 0.3
    keep[..., 0] = True
    padded = torch.arange(keys)[None, None, None] < torch.tensor([3, keys, 5])[:, None, None, None]
    return {
        "plain": {},
        "causal": {"is_causal": True},
        "scaled": {"scale": 0.7},
        "kept": {"attn_mask": keep},
        "padded": {"attn_mask": padded},
        "added": {"attn_mask": torch.randn(12, keys)},
    }


@pytest.mark.parametrize("name", list(_masks(12)))
@pytest.mark.parametrize("keys", [12, 17])
@pytest.mark.parametrize("kind", HALF, ids=str)
def test_gradients(
    kind: torch.dtype, keys: int, name: str, kernels: str, served: list[torch.dtype]
) -> None:
    """Those of float64, no further off than torch's; the output is torch's to the bit."""
    options = _masks(keys)[name]
    mask = options.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        options = {"attn_mask": mask.to(kind)}
    operands = _operands(kind, keys)
    found = _gradients(attention, operands, **options)
    plain = _gradients(F.scaled_dot_product_attention, operands, **options)
    wide = [t.detach().double().requires_grad_() for t in operands]
    if mask is not None and mask.is_floating_point():
        options = {"attn_mask": mask.to(kind).double()}
    exact = _gradients(F.scaled_dot_product_attention, wide, **options)
    assert served == [kind]
    assert torch.equal(found[0], plain[0])
    for ours, theirs, expected in zip(found[1:], plain[1:], exact[1:], strict=True):
        assert ours.dtype == kind
        off, torchs = ((t - expected).norm() / expected.norm() for t in (ours, theirs))
        assert off < 4 * torch.finfo(kind).eps and off < 1.2 * torchs


@pytest.mark.parametrize("name", list(_masks(12)))
@pytest.mark.parametrize("keys", [12, 17])
def test_float32(name: str, keys: int, kernels: str, served: list[torch.dtype]) -> None:
    """Compiled, output and gradients are those of float64 to rounding; else it is torch's."""
    options, operands = _masks(keys)[name], _operands(SINGLE, keys)
    found = _gradients(attention, operands, **options)
    assert served == ([SINGLE] if kernels == "compiled" else [])
    wide = [t.detach().double().requires_grad_() for t in operands]
    mask = options.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        options = {"attn_mask": mask.double()}
    exact = _gradients(F.scaled_dot_product_attention, wide, **options)
    for ours, expected in zip(found, exact, strict=True):
        assert ours.dtype == SINGLE
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [*HALF, SINGLE], ids=str)
def test_rows_that_see_nothing(kind: torch.dtype, kernels: str, served: list[torch.dtype]) -> None:
    """A query whose keys are all masked has the output and the gradients that torch gives it."""
    keep = torch.ones(3, 1, 12, 12, dtype=torch.bool)
    keep[1, :, 4] = False
    found, plain = (
        _gradients(call, _operands(kind), attn_mask=keep)
        for call in (attention, F.scaled_dot_product_attention)
    )
    torch.testing.assert_close(found, plain, rtol=0.05, atol=0.02, equal_nan=True)
    assert bool(served) == (kind != SINGLE or kernels == "compiled")


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # under vmap
@pytest.mark.parametrize("kind", [torch.bfloat16, SINGLE], ids=str)
def test_what_is_left_to_torch(kind: torch.dtype, kernels: str, served: list[torch.dtype]) -> None:
    """Other types, dropout, grouped heads, some masks, other kernels, transforms."""
    query, key, value = _operands(kind)
    mask = torch.zeros(12, 12, dtype=kind)
    attention(*_operands(torch.float64))
    attention(query, key, value, dropout_p=0.1)
    attention(query, key[:, :1], value[:, :1], enable_gqa=True)
    attention(query, key, value, mask.clone().requires_grad_())
    if kind != SINGLE:
        attention(query, key, value, mask.float())
    attention(query, key, value, mask, is_causal=True)
    attention(query[0], key[0], value[0])
    attention(*(t.detach() for t in (query, key, value)))
    with sdpa_kernel(SDPBackend.MATH):
        attention(query, key, value)
    with torch.autocast("cpu", torch.bfloat16):
        attention(query, key, value)
    with torch.no_grad():
        attention(query, key, value)
    torch.func.vmap(attention)(*(t[:, None] for t in (query, key, value)))
    assert not served
    attention(query, key, value)
    assert bool(served) == (kind != SINGLE or kernels == "compiled")


def test_torchs_own(kernels: str, served: list[torch.dtype]) -> None:
    """Half precision is left to torch on request; float32, which rounds no worse, is not."""
    with torchs_own():
        for kind in HALF:
            attention(*_operands(kind))
        assert not served
        attention(*_operands(SINGLE))
    assert bool(served) == (kernels == "compiled")


def test_long_rows(kernels: str, served: list[torch.dtype]) -> None:
    """Of bfloat16, long rows gain by the compiled kernels only."""
    long = torch.zeros(1, 2, (module.SHORT >> 3) + 1, 8, dtype=torch.bfloat16, requires_grad=True)
    gains = kernels == "compiled" or not module.multiplies_bfloat16(long.device)
    attention(long, long, long)
    assert bool(served) == gains


def test_few_heads_and_few_tokens(
    kernels: str, served: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Float32 is left to torch where a call costs more, or threads would have nothing to do."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)  # 3 rows of 2 heads
    attention(*_operands(SINGLE))
    monkeypatch.undo()
    monkeypatch.setattr(module, "costs", lambda _: pytest.fail("measured"))
    attention(*_operands(SINGLE))
    assert not served


def test_more_keys_than_values(kernels: str, served: list[torch.dtype]) -> None:
    """Left to torch, whose kernel does not look either."""
    query, key, value = (torch.zeros(2, 2, n, 8, requires_grad=True) for n in (12, 20, 5))
    assert module.attention(query, key, value) is None
    assert not served


@pytest.mark.parametrize(
    "options",
    [
        {"attn_mask": torch.ones(5, 5).bool()},
        {"attn_mask": torch.ones(12, 12).long()},
        {"attn_mask": np.ones((12, 12))},
        {"dropout_p": None},
        {"enable_gqa": 0},
    ],
)
def test_errors_are_those_of_torch(options: dict[str, Any]) -> None:
    """Of masks that do not fit, and of options of a wrong type."""
    messages = []
    for call in (attention, F.scaled_dot_product_attention):
        with pytest.raises((RuntimeError, TypeError)) as caught:
            call(*_operands(torch.bfloat16), **options)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("shape", [(2, 0, 5, 8), (0, 2, 5, 8), (2, 2, 0, 8)])
@pytest.mark.parametrize("mask", [None, torch.ones(0).bool(), torch.ones(()).bool()])
def test_nothing_to_attend_to(shape: tuple[int, ...], mask: Tensor | None) -> None:
    """No heads, no rows, no tokens: torch gives an empty output."""
    empty = torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True)
    if mask is not None and shape[2]:
        mask = None
    assert attention(empty, empty, empty, mask).shape == shape


@pytest.mark.parametrize("kind", [torch.bfloat16, SINGLE], ids=str)
def test_second_derivatives_are_refused_as_by_torch(
    kind: torch.dtype, kernels: str, served: list[torch.dtype]
) -> None:
    """Flash attention has none."""
    for call in (attention, F.scaled_dot_product_attention):
        operands = _operands(kind)
        first = torch.autograd.grad(call(*operands).sum(), operands[0], create_graph=True)[0]
        with pytest.raises(RuntimeError, match=r"derivative for .* is not implemented"):
            torch.autograd.grad(first.sum(), operands[1])
    assert bool(served) == (kind != SINGLE or kernels == "compiled")


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("kind", [torch.bfloat16, SINGLE], ids=str)
def test_gradients_in_batches(kind: torch.dtype, kernels: str, served: list[torch.dtype]) -> None:
    """Several gradients of one output at once, as vmap takes them."""
    operands = _operands(kind)
    found = attention(*operands)
    deltas = torch.randn(4, *found.shape).to(kind)
    batched = torch.autograd.grad(found, operands, deltas, is_grads_batched=True, retain_graph=True)
    single = [torch.autograd.grad(found, operands, d, retain_graph=True) for d in deltas]
    for ours, expected in zip(batched, zip(*single, strict=True), strict=True):
        torch.testing.assert_close(ours, torch.stack(expected), rtol=0.05, atol=0.02)
    assert bool(served) == (kind != SINGLE or kernels == "compiled")


class _Attending(nn.Module):
    """A block of attention, plain and checkpointed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(16, 48) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._attend(self.a(x))
        return x + checkpoint(lambda y: self._attend(self.b(y)), x, use_reentrant=False)

    @staticmethod
    def _attend(projected: Tensor) -> Tensor:
        query, key, value = projected.view(*projected.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return mixed.transpose(1, 2).flatten(2)


class _Sharper(TorchFunctionMode):
    """A caller's own mode: attention with three times the scores."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            args = (3 * args[0], *args[1:])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
def test_a_callers_own_mode_is_obeyed(
    kind: torch.dtype, kernels: str, served: list[torch.dtype]
) -> None:
    """A mode that is open around a pass sees its calls; that of a default device costs nothing."""
    batch, model = tokens(), make(_Attending()).to(kind)
    rows = names(len(batch["input_ids"]))
    sketcher = sdi.Sketcher(sdi.Loop(model, "body"), dim=256)
    with _Sharper():
        part = sketcher(batch, rows)
        sdi.self_check(sketcher, batch, rows)
        expected = sdi.causal_lm_loss(model, batch).detach().float()
    assert not served
    torch.testing.assert_close(part.losses.float(), expected, rtol=1e-2, atol=1e-2)
    with torch.device("cpu"):
        sketcher(batch, rows)
    assert bool(served) == (kind != SINGLE or kernels == "compiled")


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
def test_a_wrapper_is_called_once(
    kind: torch.dtype, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention that somebody has wrapped after the import of sdi is not wrapped again inside."""
    real, called = F.scaled_dot_product_attention, []

    def wrapper(query: Tensor, *rest: Any, **options: Any) -> Tensor:
        called.append(1)
        return real(3 * query, *rest, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", wrapper)
    batch, model = tokens(), make(_Attending()).to(kind)
    rows = names(len(batch["input_ids"]))
    sketcher = sdi.Sketcher(sdi.Loop(model, "body"), dim=256)
    steps = sketcher(batch, rows).values.shape[1]
    assert len(called) == 3 * steps  # the checkpointed one runs again
    sdi.self_check(sketcher, batch, rows)


@pytest.mark.parametrize(
    ("kind", "kernels"),
    [(torch.bfloat16, "compiled"), (torch.bfloat16, "torch's"), (SINGLE, "compiled")],
    indirect=["kernels"],
    ids=str,
)
@pytest.mark.parametrize("broken", ["output", "gradient"])
def test_the_self_check_sees_attention_gone_wrong(
    broken: str, kind: torch.dtype, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half precision: a pass is compared with one that is checked closely. Float32: so is it."""
    batch, model = tokens(), make(_Attending()).to(kind)
    rows = names(len(batch["input_ids"]))
    real = module._Attention.apply

    def apply(query: Tensor, *rest: Any) -> Any:
        found = real(query, *rest)
        return 1.5 * found if broken == "output" else found.detach() + 0 * found

    monkeypatch.setattr(module._Attention, "apply", apply)
    sketcher = sdi.Sketcher(sdi.Loop(model, "body"), dim=256)
    message = "step gradient of" if kind == SINGLE else "attention in half precision"
    with pytest.raises(SelfCheckError, match=message):
        sdi.self_check(sketcher, batch, rows)


def test_a_pass(kernels: str, served: list[torch.dtype]) -> None:
    """Sketches of a bfloat16 model are those of the same weights in float32, whoever attends."""
    batch = tokens()
    rows = names(len(batch["input_ids"]))
    model = make(_Attending()).bfloat16()
    part = sdi.Sketcher(sdi.Loop(model, "body"), dim=256)(batch, rows)
    assert served.count(torch.bfloat16) >= 2 * part.values.shape[1]
    sketcher = sdi.Sketcher(sdi.Loop(model.float(), "body"), dim=256)
    wide = sketcher(batch, rows)
    error = (part.values - wide.values).norm() / wide.values.norm()
    assert error < 0.03
    report = sdi.self_check(sketcher, batch, rows, rows=3)
    assert report.worst < 1e-5 and report.conservation < 1e-5
    assert (SINGLE in served) == (kernels == "compiled")
    served.clear()
    report = sdi.self_check(sdi.Sketcher(sdi.Loop(model.bfloat16(), "body"), dim=256), batch, rows)
    assert report.worst < 1e-2 and len(served) <= 2 * part.values.shape[1] * 2
