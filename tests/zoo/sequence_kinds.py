"""Layer kinds that mix the tokens of a row: x is (B, T, d)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import WIDTH
from tests.zoo.parts import Kinds, Part, linear, weight

D, HEADS, LONGEST = WIDTH, 2, 24
SEQUENCE = Kinds()


def _add(name: str, run: Any, parts: Any, **options: Any) -> None:
    SEQUENCE.add(name, run, parts, token=False, **options)


def causal(tokens: int) -> Tensor:
    """(T, T) bool, true where attention is forbidden."""
    return torch.ones(tokens, tokens, dtype=torch.bool).triu(1)


def _split(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def _joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(-2)


def _even(x: Tensor) -> Tensor:
    """Normalised, or the softmax saturates and float32 has no gradient left to compare."""
    return F.layer_norm(x, (D,))


def _fused(m: Any, x: Tensor, _t: int) -> Tensor:
    q, k, v = (_split(part) for part in m.qkv(_even(x)).chunk(3, dim=-1))
    return x + m.out(_joined(F.scaled_dot_product_attention(q, k, v, is_causal=True)))


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT / math.sqrt(q.shape[-1]) + torch.zeros(()).masked_fill(
        causal(q.shape[2]), float("-inf")
    ).to(q.dtype)


def _grouped(m: Any, x: Tensor, _t: int) -> Tensor:
    q = _split(m.q(x))
    k, v = (part(x).unsqueeze(1).expand_as(q) for part in (m.k, m.v))
    return x + m.out(_joined(_scores(q, k).softmax(-1) @ v))


def _score_bias(m: Any, x: Tensor, _t: int) -> Tensor:
    q, k, v = (_split(part) for part in m.qkv(_even(x)).chunk(3, dim=-1))
    tokens = x.shape[1]
    scores = _scores(q, k) + m.bias[:, :, :tokens, :tokens]
    return x + _joined(scores.softmax(-1) @ v)


def _query_key_bias(m: Any, x: Tensor, _t: int) -> Tensor:
    q, k, v = (_split(part) for part in m.qkv(_even(x)).chunk(3, dim=-1))
    return x + _joined(_scores(q + m.bias[0], k + m.bias[1]).softmax(-1) @ v)


def _learned_mask(m: Any, x: Tensor, _t: int) -> Tensor:
    q, k, v = (_split(part) for part in m.qkv(_even(x)).chunk(3, dim=-1))
    mask = m.bias[:, :, : x.shape[1], : x.shape[1]]
    return x + _joined(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


def _relative(m: Any, x: Tensor, _t: int) -> Tensor:
    q, k, v = (_split(part) for part in m.qkv(_even(x)).chunk(3, dim=-1))
    places = torch.arange(x.shape[1])
    far = (places[None, :] - places[:, None]).clamp(-4, 4) + 4
    bias = m.table(far).permute(2, 0, 1)[None]
    return x + _joined((_scores(q, k) + bias).softmax(-1) @ v)


def _sinks(m: Any, x: Tensor, _t: int) -> Tensor:
    q, k, v = (_split(part) for part in m.qkv(_even(x)).chunk(3, dim=-1))
    sink = m.sink.view(1, HEADS, 1, 1).expand(*q.shape[:3], 1)
    scores = torch.cat([_scores(q, k), sink], dim=-1).softmax(-1)[..., :-1]
    return x + _joined(scores @ v)


def _registers(m: Any, x: Tensor, _t: int) -> Tensor:
    long = torch.cat([m.a.expand(x.shape[0], 2, D), x], dim=1)
    return x + torch.tanh(m.mix(long).cumsum(1))[:, 2:]


def _latents(m: Any, x: Tensor, _t: int) -> Tensor:
    asked = m.q(m.latents).expand(x.shape[0], -1, -1)
    read = F.scaled_dot_product_attention(asked, x.to(asked.dtype), m.v(x))
    return x + torch.tanh(read.mean(1, keepdim=True))


def _transformer(first: bool) -> nn.Module:
    return nn.TransformerEncoderLayer(
        D, HEADS, 2 * D, dropout=0.0, batch_first=True, norm_first=first
    ).eval()


def _attend(m: Any, x: Tensor, _t: int) -> Tensor:
    return x + m.a(x, x, x, attn_mask=causal(x.shape[1]), need_weights=False)[0]


def _attend_second(m: Any, x: Tensor, _t: int) -> Tensor:
    y = x.transpose(0, 1)
    return x + m.a(y, y, y, attn_mask=causal(x.shape[1]))[0].transpose(0, 1)


def _heads(first: bool, **options: Any) -> Any:
    return lambda: {"a": nn.MultiheadAttention(D, HEADS, batch_first=first, **options)}


def _cross(m: Any, x: Tensor, _t: int) -> Tensor:
    return x + m.a(x, x.flip(1), torch.tanh(x), need_weights=True)[0]


def _decay(m: Any, x: Tensor, _t: int) -> Tensor:
    keep, state, out = torch.exp(-torch.exp(m.rate)), torch.zeros_like(x[:, 0]), []
    for token in x.unbind(1):
        state = keep * state + (1 - keep) * token
        out.append(state)
    return x + torch.tanh(torch.stack(out, dim=1))


def _state_space(m: Any, x: Tensor, _t: int) -> Tensor:
    step = F.softplus(m.step(x) + m.step_bias)
    keep = torch.exp(step[..., None] * -torch.exp(m.log_a))
    enter, leave = m.enter(x), m.leave(x)
    state, out = x.new_zeros(x.shape[0], D, 4), []
    for i in range(x.shape[1]):
        state = keep[:, i] * state + (step[:, i] * x[:, i])[..., None] * enter[:, i, None]
        out.append((state * leave[:, i, None]).sum(-1) + m.skip * x[:, i])
    return x + torch.tanh(torch.stack(out, dim=1))


def _convolved(m: Any, x: Tensor, _t: int) -> Tensor:
    return x + torch.tanh(m.a(x.transpose(1, 2)).transpose(1, 2)[:, : x.shape[1]])


def _channels(m: Any, x: Tensor, _t: int) -> Tensor:
    return x + torch.tanh(m.a(x.transpose(1, 2)).transpose(1, 2))


def _placed(shape: str) -> Any:
    def run(m: Any, x: Tensor, _t: int) -> Tensor:
        places = torch.arange(x.shape[1])
        places = places[None] if shape == "(1, T)" else places
        places = places.expand(x.shape[0], -1) if shape == "(B, T)" else places
        return torch.tanh(x + m.a(places))

    return run


def _positions() -> dict[str, Part]:
    return {"a": nn.Embedding(LONGEST, D)}


def _with_qkv(**parts: Any) -> Any:
    return lambda: {"qkv": linear(3 * D), **{name: make() for name, make in parts.items()}}


_add("attention, fused qkv", _fused, _with_qkv(out=linear))
_add(
    "attention, separate projections, one key head",
    _grouped,
    lambda: {"q": linear(), "k": linear(D // HEADS), "v": linear(D // HEADS), "out": linear()},
)
_add(
    "attention, 4-D score bias",
    _score_bias,
    _with_qkv(bias=lambda: weight(1, HEADS, LONGEST, LONGEST)),
)
_add(
    "attention, 4-D query and key bias",
    _query_key_bias,
    _with_qkv(bias=lambda: weight(2, HEADS, 1, D // HEADS)),
)
_add(
    "attention, learned mask in the fused kernel",
    _learned_mask,
    _with_qkv(bias=lambda: weight(1, HEADS, LONGEST, LONGEST)),
)
_add("attention, relative positions", _relative, _with_qkv(table=lambda: nn.Embedding(9, HEADS)))
_add("attention, sinks", _sinks, _with_qkv(sink=lambda: weight(HEADS)))
_add(
    "attention from learned latents",
    _latents,
    lambda: {"latents": weight(3, D), "q": linear(), "v": linear()},
)
_add("MultiheadAttention, batch_first", _attend, _heads(True))
_add("MultiheadAttention, batch second", _attend_second, _heads(False))
_add(
    "MultiheadAttention, bias_k and zero",
    _cross,
    _heads(True, add_bias_kv=True, add_zero_attn=True),
)
_add("MultiheadAttention, separate kdim", _cross, _heads(True, kdim=D, vdim=D, bias=False))
_add("TransformerEncoderLayer", lambda m, x, _t: m.a(x), lambda: {"a": _transformer(False)})
_add(
    "TransformerEncoderLayer, norm first",
    lambda m, x, _t: m.a(x, src_mask=causal(x.shape[1])),
    lambda: {"a": _transformer(True)},
)
_add("registers before the tokens", _registers, lambda: {"a": weight(1, 2, D), "mix": linear()})
_add("decay rates in a scan", _decay, lambda: {"rate": weight(D)})
_add(
    "selective state space",
    _state_space,
    lambda: {
        "step": linear(),
        "step_bias": weight(D),
        "log_a": weight(D, 4),
        "enter": linear(4),
        "leave": linear(4),
        "skip": weight(D),
    },
)
_add("Conv1d", _convolved, lambda: {"a": nn.Conv1d(D, D, 3, padding=2)})
_add("Conv1d, depthwise", _convolved, lambda: {"a": nn.Conv1d(D, D, 3, padding=2, groups=D)})
_add("Conv1d of width 1", _channels, lambda: {"a": nn.Conv1d(D, D, 1)})
_add("GroupNorm over channels", _channels, lambda: {"a": nn.GroupNorm(4, D)})
_add("InstanceNorm with gain", _channels, lambda: {"a": nn.InstanceNorm1d(D, affine=True)})
_add("BatchNorm in evaluation", _channels, lambda: {"a": nn.BatchNorm1d(D).eval()})
_add(
    "BatchNorm in training",
    _channels,
    lambda: {"a": nn.BatchNorm1d(D)},
    expected="influence each other",
)
_add(
    "LayerNorm over tokens and features",
    lambda m, x, _t: torch.tanh(x + F.layer_norm(x, x.shape[1:], m.a[: x.shape[1]])),
    lambda: {"a": weight(LONGEST, D)},
)
_add("positions of ids (T,)", _placed("(T,)"), _positions)
_add("positions of ids (1, T)", _placed("(1, T)"), _positions)
_add("positions of ids (B, T)", _placed("(B, T)"), _positions)
_add(
    "positions as a slice",
    lambda m, x, _t: torch.tanh(x + m.a[:, : x.shape[1]]),
    lambda: {"a": weight(1, LONGEST, D)},
)
_add(
    "tokens mixed by a matrix",
    lambda m, x, _t: (
        x + torch.tanh(torch.einsum("st,btd->bsd", m.a[: x.shape[1], : x.shape[1]], x))
    ),
    lambda: {"a": weight(LONGEST, LONGEST)},
)
_add(
    "nn.GRU",
    lambda m, x, _t: x + m.a(x)[0],
    lambda: {"a": nn.GRU(D, D, batch_first=True)},
    expected="returns several tensors",
)
_add(
    "EmbeddingBag",
    lambda m, x, _t: x + m.a((x.detach().sum(-1) * 10).long() % 7)[:, None],
    lambda: {"a": nn.EmbeddingBag(7, D)},
    expected="returns several tensors",
)
