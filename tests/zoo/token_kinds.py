"""Layer kinds that treat each token alone: x is (..., d) with any leading axes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from tests.zoo.case import WIDTH
from tests.zoo.parts import Kinds, linear, weight

D = WIDTH
TOKEN = Kinds()


class NormalisedLinear(nn.Linear):
    """A subclass that uses its weight with rows of norm 1."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight / self.weight.norm(dim=1, keepdim=True), self.bias)


class TernaryLinear(nn.Linear):
    """A quantised weight with a straight-through gradient, as in BitNet."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.abs().mean()
        coarse = (self.weight / scale).round().clamp(-1, 1) * scale
        return F.linear(x, self.weight + (coarse - self.weight).detach(), self.bias)


class CastLinear(nn.Linear):
    """Casts its weights to the input's dtype, as TRM and HRM do."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class RootMean(nn.Module):
    """RMSNorm in float32, cast back, with a gain about 0 or about 1."""

    def __init__(self, about: float) -> None:
        super().__init__()
        self.about = about
        self.gain = weight(D)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype != torch.float64 else x
        hat = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return ((self.about + self.gain) * hat.to(x.dtype)).to(x.dtype)


def _bent(call: Any) -> Any:
    return lambda m, x, _t: x + torch.tanh(call(m, x))


def _matrix(name: str, call: Any, shape: tuple[int, ...] = (D, D)) -> None:
    TOKEN.add(name, _bent(call), lambda: {"a": weight(*shape)})


def _module(name: str, make: Any, **options: Any) -> None:
    TOKEN.add(name, _bent(lambda m, x: m.a(x)), lambda: {"a": make()}, **options)


def _flat(call: Any) -> Any:
    return lambda m, x: call(m, x.reshape(-1, D)).view_as(x)


_module("nn.Linear", linear)
_module("nn.Linear without bias", lambda: linear(bias=False))
_module("Linear subclass, rows of norm 1", lambda: NormalisedLinear(D, D))
_module("Linear subclass, ternary straight-through", lambda: TernaryLinear(D, D))
_module("Linear subclass, cast weights", lambda: CastLinear(D, D))
_module("weight norm", lambda: nn.utils.parametrizations.weight_norm(linear()))
_module("spectral norm", lambda: nn.utils.parametrizations.spectral_norm(linear()).eval())
_module("orthogonal weight", lambda: nn.utils.parametrizations.orthogonal(linear()), needs="wide")
_module("nn.LayerNorm", lambda: nn.LayerNorm(D))
_module("nn.RMSNorm", lambda: nn.RMSNorm(D))
_module("custom RMSNorm", lambda: RootMean(0.0))
_module("custom RMSNorm, 1 + gain", lambda: RootMean(1.0))
_module("nn.PReLU", lambda: nn.PReLU())

_matrix("F.linear", lambda m, x: F.linear(x, m.a))
_matrix("F.linear by keyword", lambda m, x: F.linear(input=x, weight=m.a))
_matrix("x @ W", lambda m, x: x @ m.a)
_matrix("x @ W.T", lambda m, x: x @ m.a.T)
_matrix("x @ W.mT", lambda m, x: x @ m.a.mT)
_matrix("torch.matmul", lambda m, x: torch.matmul(x, m.a.t()))
_matrix("W on the left", lambda m, x: (m.a @ x.unsqueeze(-1)).squeeze(-1))
_matrix("mm of flattened tokens", _flat(lambda m, x: torch.mm(x, m.a)))
_matrix("addmm, β and α", _flat(lambda m, x: torch.addmm(x, x, m.a, beta=0.5, alpha=2.0)))
_matrix("einsum", lambda m, x: torch.einsum("...d,de->...e", x, m.a))
_matrix("einsum, weight first", lambda m, x: torch.einsum("ed,...d->...e", m.a, x))
_matrix(
    "einsum by head",
    lambda m, x: torch.einsum("...hd,hde->...he", x.unflatten(-1, (4, 4)), m.a).flatten(-2),
    (4, 4, 4),
)
_matrix("tensordot", lambda m, x: torch.tensordot(x, m.a, dims=1))
_matrix("view of a flat weight", lambda m, x: F.linear(x, m.a.view(D, D)), (D * D,))
_matrix(
    "chunks of a weight", lambda m, x: F.linear(x @ m.a.chunk(2)[0], m.a.chunk(2)[1]), (2 * D, D)
)
_matrix("rows of a weight by index", lambda m, x: x @ m.a[torch.arange(D - 1, -1, -1)])
_matrix("cast to another dtype", lambda m, x: F.linear(x.double(), m.a.double()).to(x.dtype))
_matrix("cast that changes nothing", lambda m, x: F.linear(x, m.a.type_as(x)))
_matrix("weight and its stopped gradient", lambda m, x: F.linear(F.linear(x, m.a.detach()), m.a))
_matrix("weight and its transpose", lambda m, x: F.linear(F.relu(F.linear(x, m.a)), m.a.T))
_matrix("low rank from one weight", lambda m, x: F.linear(x, m.a @ m.a.T), (D, 2))
_matrix(
    "expanded over tokens",
    lambda m, x: torch.bmm(x.reshape(-1, 1, D), m.a.expand(x.numel() // D, D, D)).view_as(x),
)
TOKEN.add(
    "complex weight",
    lambda m, x, _t: x + (x.float() * torch.view_as_complex(m.a.float())).abs().to(x.dtype),
    lambda: {"a": weight(D, 2)},
    expected="cannot be seen",
)
_matrix("scalar gain", lambda m, x: m.a * x, ())
_matrix("gain of one number", lambda m, x: x * m.a, (1,))
_matrix("gate", lambda m, x: x * torch.sigmoid(m.a), (D,))
_matrix("bias", lambda m, x: x + m.a, (D,))
_matrix("bias with leading axes of 1", lambda m, x: x + m.a, (1, D))
_matrix("bias added twice as strong", lambda m, x: torch.add(x, m.a, alpha=2), (D,))
_matrix("difference from a weight", lambda m, x: m.a - x, (D,))
_matrix("quotient by a weight", lambda m, x: x / (2 + m.a), (D,))
_matrix("power of a weight", lambda m, x: (1 + x.abs()) ** m.a, (D,))
_matrix("torch.where", lambda m, x: torch.where(x > 0, x, m.a * x), (D,))
_matrix("addcmul", lambda m, x: torch.addcmul(x, x, m.a), (D,))
_matrix("lerp by a weight", lambda m, x: torch.lerp(x, torch.tanh(x), m.a), (D,))
_matrix("outer product of weights", lambda m, x: F.linear(x, torch.outer(m.a, m.a)), (D,))
_matrix("in-place bias", lambda m, x: (x * 1.0).add_(m.a), (D,))
_matrix(
    "softmax of weights mixes powers",
    lambda m, x: sum(p * x**k for k, p in enumerate(m.a.softmax(0), start=1)),
    (3,),
)


def _module_parts(name: str, run: Any, parts: Any, **options: Any) -> None:
    TOKEN.add(name, _bent(run), parts, **options)


def _conv1d_parts() -> dict[str, Any]:
    from transformers.pytorch_utils import Conv1D

    return {"a": Conv1D(3 * D, D), "b": Conv1D(D, 3 * D)}


def _shared_parts() -> dict[str, Any]:
    one, two = linear(), linear()
    two.weight = one.weight
    return {"a": one, "b": two}


def _augmented(m: Any, x: Tensor) -> Tensor:
    y = x * 1.0
    y += m.a
    y *= m.b
    return y


def _rectified(m: Any, x: Tensor) -> Tensor:
    hidden = m.a(x)
    hidden.relu_()
    return m.b(hidden)


def _view_changed(m: Any, x: Tensor) -> Tensor:
    hidden = m.a(x)
    hidden[..., :8] *= 2
    return hidden


def _cell(m: Any, x: Tensor) -> Tensor:
    flat = x.reshape(-1, D)
    return m.a(flat, flat.tanh()).view_as(x)


def _long_cell(m: Any, x: Tensor) -> Tensor:
    flat = x.reshape(-1, D)
    return m.a(flat, (flat.tanh(), flat))[0].view_as(x)


def _partly_without(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        target = m.a(x)
    return m.a(x) * target


def _buckets(x: Tensor) -> Tensor:
    return (x.detach().sum(-1) * 10).long() % 7


_module_parts(
    "a linear called twice", lambda m, x: m.a(torch.tanh(m.a(x))), lambda: {"a": linear()}
)
_module_parts("HF Conv1D", lambda m, x: m.b(F.gelu(m.a(x.contiguous()))), _conv1d_parts)
_module_parts(
    "addmm",
    _flat(lambda m, x: torch.addmm(m.b, x, m.a)),
    lambda: {"a": weight(D, D), "b": weight(D)},
)
_module_parts("one Parameter in two modules", lambda m, x: m.b(torch.tanh(m.a(x))), _shared_parts)
_module_parts(
    "weights concatenated",
    lambda m, x: F.linear(x, torch.cat([m.a, m.b])).unflatten(-1, (2, D)).prod(-2),
    lambda: {"a": weight(D, D), "b": weight(D, D)},
)
_module_parts(
    "weights stacked",
    lambda m, x: torch.einsum("...d,kde->...e", x, torch.stack([m.a, m.b])),
    lambda: {"a": weight(D, D), "b": weight(D, D)},
)
_module_parts(
    "fused gate and up",
    lambda m, x: m.b(_swiglu(m.a(x))),
    lambda: {"a": linear(4 * D), "b": linear(D, 2 * D)},
)
_module_parts(
    "nn.Bilinear", lambda m, x: m.a(x, torch.tanh(x)), lambda: {"a": nn.Bilinear(D, D, D)}
)
_module_parts("nn.GRUCell", _cell, lambda: {"a": nn.GRUCell(D, D)})
_module_parts("nn.RNNCell", _cell, lambda: {"a": nn.RNNCell(D, D)})
_module_parts(
    "nn.LSTMCell", _long_cell, lambda: {"a": nn.LSTMCell(D, D)}, expected="returns several tensors"
)
_module_parts(
    "GroupNorm over a token", _flat(lambda m, x: m.a(x)), lambda: {"a": nn.GroupNorm(4, D)}
)
_module_parts("ReLU in place after a linear", _rectified, lambda: {"a": linear(), "b": linear()})
_module_parts("part of an output changed in place", _view_changed, lambda: {"a": linear()})
_module_parts("augmented assignments", _augmented, lambda: {"a": weight(D), "b": weight(D)})
_module_parts("weight also used without gradient", _partly_without, lambda: {"a": linear()})
_module_parts(
    "functional_call",
    lambda m, x: functional_call(m.a, {"weight": m.a.weight * 2, "bias": m.a.bias}, (x,)),
    lambda: {"a": linear()},
)
_module_parts(
    "embedding of ids by token",
    lambda m, x: x + m.a(_buckets(x)),
    lambda: {"a": nn.Embedding(7, D)},
)
_module_parts(
    "embedding, padding_idx",
    lambda m, x: x + m.a(_buckets(x)),
    lambda: {"a": nn.Embedding(7, D, padding_idx=2)},
)
_module_parts(
    "embedding, max_norm",
    lambda m, x: x + m.a(_buckets(x)),
    lambda: {"a": nn.Embedding(7, D, max_norm=1.0)},
    expected="max_norm",
)
_module_parts(
    "weight rows by token ids", lambda m, x: x + m.a[_buckets(x)], lambda: {"a": weight(7, D)}
)
_module_parts(
    "parameter that does nothing",
    lambda m, x: m.a(x) + 0 * m.b,
    lambda: {"a": linear(), "b": weight(D)},
)
_module_parts(
    "dropout left on",
    lambda m, x: F.dropout(m.a(x), 0.5, training=True),
    lambda: {"a": linear()},
    expected="[Dd]ropout",
)


def _swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


TOKEN.add(
    "loop embedding, scalar id",
    lambda m, x, t: torch.tanh(x + m.a(torch.tensor(t % 4))),
    lambda: {"a": nn.Embedding(4, D)},
)
TOKEN.add(
    "loop embedding, id of one entry",
    lambda m, x, t: torch.tanh(x * m.a(torch.tensor([t % 4]))),
    lambda: {"a": nn.Embedding(4, D)},
)
TOKEN.add(
    "gain per loop", lambda m, x, t: torch.tanh(x + m.a[t % 4] * x), lambda: {"a": weight(4, D)}
)
TOKEN.add(
    "scalar per loop", lambda m, x, t: torch.tanh(x + m.a[t % 4] * x), lambda: {"a": weight(4)}
)
TOKEN.add(
    "bias list per loop",
    lambda m, x, t: torch.tanh(x + m.a[t % 4]),
    lambda: {"a": nn.ParameterList([weight(D) for _ in range(4)])},
)
TOKEN.add(
    "LoRA per loop",
    lambda m, x, t: x + torch.tanh(m.a(x) + x @ m.down[t % 4] @ m.up[t % 4]),
    lambda: {"a": linear(), "down": weight(4, D, 2), "up": weight(4, 2, D)},
)
TOKEN.add(
    "LoRA merged into the weight",
    lambda m, x, t: x + torch.tanh(F.linear(x, m.a.weight + m.up[t % 4] @ m.down[t % 4], m.a.bias)),
    lambda: {"a": linear(), "down": weight(4, 2, D), "up": weight(4, D, 2)},
)
TOKEN.add(
    "norm per loop from a list",
    lambda m, x, t: torch.tanh(m.a[t % 4](x)),
    lambda: {"a": nn.ModuleList([nn.LayerNorm(D) for _ in range(4)])},
)
