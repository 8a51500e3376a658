"""Mixtures of experts: x is (..., d); each token is sent to two of four experts."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import WIDTH
from tests.zoo.parts import Kinds, Part, linear, weight

D, EXPERTS, CHOSEN, INNER = WIDTH, 4, 2, 16
MIXED = Kinds()


def _parts() -> dict[str, Part]:
    return {
        "router": linear(EXPERTS, bias=False),
        "up": weight(EXPERTS, 2 * INNER, D),
        "down": weight(EXPERTS, D, INNER),
    }


def _routed(m: Any, flat: Tensor) -> tuple[Tensor, Tensor]:
    """(N, k) weights and (N, k) experts."""
    share, chosen = m.router(flat).softmax(-1).topk(CHOSEN, dim=-1)
    return share / share.sum(-1, keepdim=True), chosen


def _gated(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def _dense(m: Any, x: Tensor, _t: int) -> Tensor:
    share = m.router(x).softmax(-1)
    hidden = _gated(torch.einsum("...d,efd->...ef", x, m.up))
    return x + torch.einsum("...ef,edf,...e->...d", hidden, m.down, share)


def _masked(m: Any, x: Tensor, _t: int) -> Tensor:
    share, chosen = _routed(m, x)
    gates = torch.zeros_like(m.router(x)).scatter(-1, chosen, share)
    hidden = _gated(torch.einsum("...d,efd->...ef", x, m.up))
    return x + torch.einsum("...ef,edf->...ed", hidden, m.down).mul(gates[..., None]).sum(-2)


def _scattered(m: Any, x: Tensor, _t: int) -> Tensor:
    flat = x.reshape(-1, D)
    share, chosen = _routed(m, flat)
    out = torch.zeros_like(flat)
    with torch.no_grad():
        mask = F.one_hot(chosen, num_classes=EXPERTS).permute(2, 1, 0)
        hit = torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero()
    for expert in hit[:, 0]:
        place, token = torch.where(mask[expert])
        hidden = _gated(F.linear(flat[token], m.up[expert]))
        hidden = F.linear(hidden, m.down[expert]) * share[token, place, None]
        out.index_add_(0, token, hidden.to(out.dtype))
    return x + out.view_as(x)


def _listed(m: Any, x: Tensor, _t: int) -> Tensor:
    flat = x.reshape(-1, D)
    share, chosen = _routed(m, flat)
    out = torch.zeros_like(flat)
    for i, expert in enumerate(m.experts):
        token, place = torch.where(chosen == i)
        out[token] += (share[token, place, None] * expert(flat[token])).to(x.dtype)
    return x + out.view_as(x)


def _expert() -> nn.Module:
    return nn.Sequential(linear(INNER), nn.ReLU(inplace=True), linear(D, INNER))


def _by_mask(m: Any, x: Tensor, _t: int) -> Tensor:
    share, best = m.router(x).softmax(-1).max(-1)
    out = torch.zeros_like(x)
    for i in range(EXPERTS):
        mine = best == i
        out[mine] = F.linear(_gated(F.linear(x[mine], m.up[i])), m.down[i]).to(x.dtype)
    return x + out * share[..., None]


def _per_token(m: Any, x: Tensor, _t: int) -> Tensor:
    flat = x.reshape(-1, D)
    share, chosen = _routed(m, flat)
    each = flat.repeat_interleave(CHOSEN, dim=0)
    which = chosen.reshape(-1)
    hidden = _gated(torch.bmm(m.up[which], each.unsqueeze(-1)).squeeze(-1))
    hidden = torch.bmm(m.down[which], hidden.unsqueeze(-1)).squeeze(-1)
    return x + (hidden * share.reshape(-1, 1)).view(-1, CHOSEN, D).sum(1).view_as(x)


def _sorted(product: Any) -> Any:
    def run(m: Any, x: Tensor, _t: int) -> Tensor:
        flat = x.reshape(-1, D)
        share, chosen = _routed(m, flat)
        order = chosen.reshape(-1).argsort(stable=True)
        count = torch.bincount(chosen.reshape(-1), minlength=EXPERTS)
        ends = count.cumsum(0).to(torch.int32)
        each = flat[order // CHOSEN]
        hidden = product(_gated(product(each, m.up, ends)), m.down, ends)
        back = (hidden * share.reshape(-1)[order, None])[order.argsort()]
        return x + back.view(-1, CHOSEN, D).sum(1).view_as(x)

    return run


def _grouped_mm(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    return torch._grouped_mm(x, w.transpose(-2, -1), offs=ends)


def _functional_grouped_mm(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    return F.grouped_mm(x, w.transpose(-2, -1), offs=ends)


def _slices(x: Tensor, w: Tensor, ends: Tensor) -> Tensor:
    edges = [0, *ends.tolist()]
    return torch.cat([x[a:b] @ w[e].T for e, (a, b) in enumerate(pairwise(edges))])


def _capacity(m: Any, x: Tensor, _t: int) -> Tensor:
    flat = x.reshape(-1, D)
    share, chosen = _routed(m, flat)
    sent = F.one_hot(chosen, EXPERTS).to(x.dtype).transpose(0, 1)
    place = (sent.cumsum(1) - 1) * sent
    slots = F.one_hot(place.sum(-1).long(), flat.shape[0]).to(x.dtype)
    out = torch.zeros_like(flat)
    for k in range(CHOSEN):
        dispatch = torch.einsum("ne,nc->nec", sent[k], slots[k])
        arrived = torch.einsum("nec,nd->ecd", dispatch, flat)
        hidden = torch.bmm(_gated(torch.bmm(arrived, m.up.mT)), m.down.mT)
        out = out + share[:, k, None] * torch.einsum("nec,ecd->nd", dispatch, hidden)
    return x + out.view_as(x)


MIXED.add("experts, dense einsum", _dense, _parts)
MIXED.add("experts, dense with top-k gates", _masked, _parts)
MIXED.add("experts, tokens scattered", _scattered, _parts)
MIXED.add("experts, tokens by boolean mask", _by_mask, _parts)
MIXED.add(
    "experts, a list of modules",
    _listed,
    lambda: {
        "router": linear(EXPERTS),
        "experts": nn.ModuleList([_expert() for _ in range(EXPERTS)]),
    },
)
MIXED.add("experts, a weight gathered per token", _per_token, _parts)
MIXED.add("experts, tokens sorted and sliced", _sorted(_slices), _parts)
MIXED.add("experts, torch._grouped_mm", _sorted(_grouped_mm), _parts, needs="single")
MIXED.add("experts, F.grouped_mm", _sorted(_functional_grouped_mm), _parts, needs="single")
# Slots mix the rows of a batch in one axis, by a product that only arithmetic could take apart.
MIXED.add(
    "experts, dispatched to slots",
    _capacity,
    _parts,
    expected="rows of the batch|differs from per-row autograd",
)
