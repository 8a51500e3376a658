"""Where the rows of a batch lie, followed through moves, picks, joins and reductions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sdi
from sdi.errors import CaptureError
from sdi.rowflow import pass_on
from sdi.rowtags import FIRST, Rows, layout, leaves, tag, tag_of
from tests.looped import Custom, LoopedModel, make, names, tokens

B = 3

CALLS: dict[str, Callable[[Tensor], Any]] = {
    "transpose(0, 1)": lambda x: (torch.transpose, (x, 0, 1)),
    "transpose(1, 2)": lambda x: (Tensor.transpose, (x, 1, 2)),
    "permute": lambda x: (Tensor.permute, (x, 2, 0, 1)),
    "movedim": lambda x: (torch.movedim, (x, 0, -1)),
    "mT": lambda x: (torch.Tensor.mT.__get__, (x,)),  # type: ignore[attr-defined]
    "flatten": lambda x: (torch.flatten, (x, 0, 1)),
    "flatten all": lambda x: (Tensor.reshape, (x, -1)),
    "one in front": lambda x: (Tensor.unsqueeze, (x, 0)),
    "view (1, N, d)": lambda x: (Tensor.reshape, (x, 1, -1, x.shape[-1])),
    "select": lambda x: (Tensor.select, (x, -1, 0)),
    "item of the first axis": lambda x: (Tensor.__getitem__, (x, 0)),
    "slice of the first axis": lambda x: (Tensor.__getitem__, (x, slice(1, None))),
    "every other": lambda x: (Tensor.__getitem__, (x, slice(None, None, 2))),
    "last": lambda x: (Tensor.__getitem__, (x, (slice(None), -1))),
    "new axis": lambda x: (Tensor.__getitem__, (x, (None, Ellipsis))),
    "reversed": lambda x: (torch.flip, (x, (0,))),
    "reversed second": lambda x: (torch.flip, (x, (1,))),
    "picked": lambda x: (Tensor.__getitem__, (x, torch.tensor([2, 0, 1, 1, 0]) % len(x))),
    "picked along the second": lambda x: (
        Tensor.__getitem__,
        (x, (slice(None), torch.tensor([1, 0, 1]) % x.shape[1])),
    ),
    "picked by two": lambda x: (
        Tensor.__getitem__,
        (x, (torch.arange(len(x)), torch.arange(len(x)) % x.shape[1])),
    ),
    "picked in two axes": lambda x: (
        Tensor.__getitem__,
        (x, torch.tensor([[0, 1], [1, 1], [0, 0]]) % len(x)),
    ),
    "masked": lambda x: (Tensor.__getitem__, (x, torch.arange(len(x)) % 2 == 0)),
    "masked two axes": lambda x: (
        Tensor.__getitem__,
        (x, torch.arange(x.shape[0] * x.shape[1]).view(x.shape[:2]) % 3 > 0),
    ),
    "index_select": lambda x: (torch.index_select, (x, 1, torch.tensor([0, 0]))),
    "index_select rows": lambda x: (torch.index_select, (x, 0, torch.arange(len(x)).flip(0))),
    "expand": lambda x: (Tensor.expand, (x, 4, *x.shape)),
    "repeat": lambda x: (Tensor.repeat, (x, 2, 1, 1)),
    "repeat_interleave": lambda x: (torch.repeat_interleave, (x, 2, 1)),
    "unbind": lambda x: (torch.unbind, (x, 1)),
    "chunk": lambda x: (torch.chunk, (x, 2, -1)),
    "split": lambda x: (torch.split, (x, 1, 1)),
    "stack in front": lambda x: (torch.stack, ([x, x],)),
    "stack behind": lambda x: (torch.stack, ([x, x], -1)),
    "cat": lambda x: (torch.cat, ([x, x], 1)),
    "cat of rows": lambda x: (torch.cat, ([x, x],)),
    "mean of the last": lambda x: (torch.mean, (x, -1)),
    "mean of the middle": lambda x: (Tensor.mean, (x, 1)),
    "mean kept": lambda x: (Tensor.mean, (x, -1, True)),
    "largest": lambda x: (Tensor.amax, (x, -1)),
    "sorted": lambda x: (torch.sort, (x, -1)),
    "contiguous": lambda x: (Tensor.contiguous, (x,)),
    "doubled": lambda x: (torch.mul, (x, 1.0)),
    "softplus": lambda x: (F.relu, (x,)),
    "einsum": lambda x: (torch.einsum, ("abc->bca", x)),
    "einsum with dots": lambda x: (torch.einsum, ("a...->...a", x)),
    "padded": lambda x: (F.pad, (x, (0, 0))),
    "broadcast": lambda x: (torch.add, (x, torch.zeros(2, 1, 1, 1))),
}


def _marked(shape: tuple[int, ...], axis: int, inner: int) -> Tensor:
    """A tensor whose every element is the number of its row, tagged so."""
    line = torch.arange(shape[axis]) // inner % B
    x = line.view([-1 if a == axis else 1 for a in range(len(shape))]).expand(shape)
    x = x.to(torch.float32, copy=True).contiguous()
    first = axis == 0 and shape[0] == B * inner
    below = torch.Size(shape[axis + 1 :]).numel()
    return tag(x, FIRST if first else Rows(B, inner * below))  # type: ignore[no-any-return]


@settings(max_examples=600, deadline=None)
@given(
    path=st.lists(st.sampled_from(sorted(CALLS)), min_size=1, max_size=4),
    axis=st.integers(0, 2),
    inner=st.integers(1, 2),
    other=st.integers(2, 3),
)
def test_a_layout_says_which_row_every_element_is_of(
    path: list[str], axis: int, inner: int, other: int
) -> None:
    """Through any chain of moves, a tag names the true row of every element, or is lost."""
    sizes = [other, 4, 2]
    sizes[axis] = B * inner
    x = _marked(tuple(sizes), axis, inner)
    for name in path:
        try:
            func, args = CALLS[name](x)
            output = func(*args)
        except (IndexError, RuntimeError, ValueError):
            return
        pass_on(func, args, {}, output, [x], B)
        x = leaves(output)[0]
        if x.ndim == 0 or x.numel() == 0:
            return
    known = layout(tag_of(x) or FIRST, x.shape, B)
    if known is None:
        return
    place = torch.arange(x.numel()) // known.stride % known.count
    owner = place if known.ids is None else known.ids[place]
    assert owner.tolist() == x.reshape(-1).tolist()


USUAL = ("transpose(0, 1)", "permute", "unbind", "picked", "cat", "stack in front", "einsum",
         "view (1, N, d)", "mean of the middle")  # fmt: skip


@pytest.mark.parametrize("name", USUAL)
def test_usual_moves_are_followed(name: str) -> None:
    """The moves that models make are not lost."""
    x = _marked((B, 4, 2), 0, 1)
    func, args = CALLS[name](x)
    output = func(*args)
    pass_on(func, args, {}, output, [x], B)
    found = leaves(output)[0]
    assert layout(tag_of(found) or FIRST, found.shape, B) is not None


class Experts(nn.Module):
    """Top-2 routing; tokens are picked for each expert and added back, as in transformers."""

    def __init__(self, width: int = 16, experts: int = 4, style: str = "loop") -> None:
        super().__init__()
        self.router = nn.Linear(width, experts)
        self.up = nn.Parameter(torch.randn(experts, 2 * width, width) * 0.2)
        self.down = nn.Parameter(torch.randn(experts, width, 2 * width) * 0.2)
        self.style = style

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weights, chosen = self.router(flat).softmax(-1).topk(2, dim=-1)
        run = {"loop": self._loop, "where": self._where, "gathered": self._gathered}[self.style]
        return x + run(flat, weights, chosen).view_as(x)

    def _loop(self, flat: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(flat)
        mask = F.one_hot(chosen, len(self.up)).permute(2, 1, 0)
        for hit in mask.sum(dim=(-1, -2)).greater(0).nonzero():
            slot, token = torch.where(mask[hit[0]])
            hidden = F.linear(flat[token], self.up[hit[0]]).relu()
            out.index_add_(
                0, token, F.linear(hidden, self.down[hit[0]]) * weights[token, slot, None]
            )
        return out

    def _where(self, flat: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(flat)
        for expert in range(len(self.up)):
            own = (chosen == expert).any(dim=-1)
            gate = torch.where(chosen == expert, weights, 0.0).sum(-1)
            part = (flat[own] @ self.up[expert].T).relu() @ self.down[expert].T
            out = out.index_put((own,), part * gate[own][:, None], accumulate=True)
        return out

    def _gathered(self, flat: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        hidden = torch.einsum("nkhd,nd->nkh", self.up[chosen], flat).relu()
        return torch.einsum("nkdh,nkh,nk->nd", self.down[chosen], hidden, weights)


def _second(layer: Any) -> Callable[[Any, Tensor], Tensor]:
    return lambda m, x: torch.tanh(layer(m, x.transpose(0, 1).contiguous())).transpose(0, 1)


BODIES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: Custom(_second(lambda m, x: m.a(x)), a=nn.Linear(16, 16)),
    "norm and gain": lambda: Custom(
        _second(lambda m, x: m.a(x) * m.b + m.c),
        a=nn.LayerNorm(16), b=nn.Parameter(torch.randn(16)), c=nn.Parameter(torch.randn(1, 1, 16)),
    ),
    "rms norm": lambda: Custom(_second(lambda m, x: m.a(x)), a=nn.RMSNorm(16)),
    "embedding": lambda: Custom(
        _second(lambda m, x: x + m.a((x.sum(-1) * 10).long() % 7)), a=nn.Embedding(7, 16)
    ),
    "where": lambda: Custom(
        _second(lambda m, x: torch.where(x > 0, x, m.a * x)), a=nn.Parameter(torch.randn(16))
    ),
    "flattened": lambda: Custom(
        _second(lambda m, x: m.a(x.reshape(-1, 16)).view_as(x)), a=nn.Linear(16, 16)
    ),
    "columns": lambda: Custom(lambda m, x: (m.a @ x.reshape(-1, 16).t()).t().view_as(x).tanh(),
                           a=nn.Parameter(torch.randn(16, 16) * 0.3)),
    "steps of a scan": lambda: Custom(
        lambda m, x: torch.stack([torch.tanh(m.a(part)) for part in x.unbind(1)]).transpose(0, 1),
        a=nn.Linear(16, 16),
    ),
    "attention": lambda: Custom(
        lambda m, x: x + m.a(x, x, x, need_weights=False)[0],
        a=nn.MultiheadAttention(16, 2, batch_first=True),
    ),
    "attention with weights": lambda: Custom(
        lambda m, x: x + m.a(x, x, x)[0], a=nn.MultiheadAttention(16, 2, batch_first=True)
    ),
    "attention, batch second": lambda: Custom(
        _second(lambda m, x: x + m.a(x, x, x, need_weights=False)[0]),
        a=nn.MultiheadAttention(16, 2, bias=False, add_bias_kv=True),
    ),
    "encoder layer": lambda: nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True),
    "encoder layer, batch second": lambda: Custom(
        _second(lambda m, x: m.a(x)), a=nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0)
    ),
    "experts": lambda: Experts(),
    "experts by mask": lambda: Experts(style="where"),
    "experts gathered": lambda: Experts(style="gathered"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BODIES)
@pytest.mark.parametrize("rows", [1, 4, 7])
def test_rows_anywhere_are_attributed(kind: str, rows: int) -> None:
    """Batch second, attention, and tokens picked for experts agree with per-row autograd."""
    torch.manual_seed(0)
    model = make(BODIES[kind]())
    sketcher = sdi.Sketcher(sdi.Loop(model, "body"), dim=64)
    report = sdi.self_check(sketcher, tokens(rows, 7), names(rows), rows=3)
    assert report.worst < 1e-4 and report.conservation < 1e-4
    assert report.sketch is not None and report.sketch < 1e-4
    assert report.parameters == report.of


def test_batch_with_rows_second() -> None:
    """A batch of (T, B) tensors is split along its second axis."""

    class TimeFirst(LoopedModel):
        def forward(self, input_ids: Tensor) -> Tensor:
            return super().forward(input_ids)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        logits = model(batch["input_ids"])
        each = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
        return each.view_as(batch["labels"]).mean(0)

    torch.manual_seed(0)
    body = Custom(lambda m, x: torch.tanh(m.a(x)) + m.b, a=nn.Linear(16, 16),
               b=nn.Parameter(torch.randn(16)))  # fmt: skip
    ids = torch.randint(0, 23, (7, 4))
    batch = {"input_ids": ids, "labels": ids.roll(-1, 0)}
    sketcher = sdi.Sketcher(sdi.Loop(TimeFirst(body), "body"), dim=64, loss=loss)
    assert sdi.self_check(sketcher, batch, names(4), rows=3).worst < 1e-4


def test_packed_rows() -> None:
    """Rows packed one after the other with cu_seqlens have the sketches they have when padded."""

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(23, 16)
            self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
            self.body = Custom(lambda m, pair: self._step(m, *pair), norm=nn.LayerNorm(16),
                            qkv=self.qkv, out=self.out)  # fmt: skip
            self.head = nn.Linear(16, 23)

        def _step(self, m: Any, x: Tensor, mask: Tensor) -> Tensor:
            q, k, v = m.qkv(m.norm(x)).view(1, x.shape[1], 3, 2, 8).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return x + m.out(mixed.transpose(1, 2).reshape(x.shape))

        def forward(self, input_ids: Tensor, ends: Tensor) -> Tensor:
            place = torch.arange(input_ids.shape[1])
            segment = torch.searchsorted(ends, place, right=True)
            mask = (segment[:, None] == segment) & (place[:, None] >= place)
            x = self.embed(input_ids)
            for _ in range(3):
                x = self.body((x, mask))
            return self.head(x)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        ends = batch["cu_seqlens"]
        logits = model(batch["input_ids"], ends)[0]
        each = F.cross_entropy(logits, batch["labels"][0], reduction="none", ignore_index=-100)
        owner = torch.repeat_interleave(torch.arange(len(ends) - 1), ends.diff())
        return torch.zeros(len(ends) - 1).index_add(0, owner, each) / ends.diff()

    torch.manual_seed(0)
    model = Packed().eval()
    ids = torch.randint(0, 23, (1, 16))
    ends = torch.tensor([0, 5, 6, 13, 16])
    labels = ids.roll(-1, 1)
    labels[0, ends[1:] - 1] = -100
    batch = {"input_ids": ids, "labels": labels, "cu_seqlens": ends}
    sketcher = sdi.Sketcher(sdi.Loop(model, "body"), dim=64, loss=loss)
    assert sdi.self_check(sketcher, batch, names(4), rows=4).worst < 1e-4
    one = {"input_ids": ids[:, 6:13], "labels": labels[:, 6:13], "cu_seqlens": torch.tensor([0, 7])}
    together, alone = sketcher(batch, names(4)), sketcher(one, ["r2"])
    torch.testing.assert_close(together.values[2:3], alone.values, rtol=1e-4, atol=1e-6)


def test_mixed_rows_are_refused() -> None:
    """A parameter that meets a mean over the batch is refused with the reason."""
    body = Custom(lambda m, x: x + m.a(x.mean(0)), a=nn.Linear(16, 16))
    with pytest.raises(CaptureError, match=r"body\.a.*cannot be split.*rows were mixed"):
        sdi.Sketcher(sdi.Loop(make(body), "body"), dim=64)(tokens(), names(4))


def test_a_layout_is_settled_by_the_first_batch() -> None:
    """Where B equals T by chance in a later batch, tensors stay what they were taken for."""

    class Placed(LoopedModel):
        def forward(self, input_ids: Tensor, places: Tensor) -> Tensor:
            x = self.embed(input_ids)
            for _ in range(3):
                x = self.body((x, places))
            return self.head(x)

    def batch(length: int) -> dict[str, Tensor]:
        return {**tokens(4, length), "places": torch.arange(length)}

    torch.manual_seed(0)
    body = Custom(lambda m, pair: torch.tanh(pair[0] + m.a(pair[1])), a=nn.Embedding(9, 16))
    model = Placed(body).eval()
    sketcher = sdi.Sketcher(sdi.Loop(model, "body"), dim=64)
    sdi.self_check(sketcher, batch(7), names(4))
    found = sketcher(batch(4), names(4))
    alone = [
        sketcher({k: v if k == "places" else v[i : i + 1] for k, v in batch(4).items()}, [f"r{i}"])
        for i in range(4)
    ]
    torch.testing.assert_close(
        found.values, torch.cat([one.values for one in alone]), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("kind", ["numpy", "list", "torch"])
def test_rows_in_another_order_are_followed(kind: str) -> None:
    """Rows sorted inside of the body, by an index of any kind, keep their owners."""
    order = {
        "numpy": np.array([1, 0, 3, 2]),
        "list": [1, 0, 3, 2],
        "torch": torch.tensor([1, 0, 3, 2]),
    }

    def run(m: Any, x: Tensor) -> Tensor:
        if len(x) < 4:
            return torch.tanh(m.a(x))
        return torch.tanh(m.a(x[order[kind]]))[order[kind]]

    sketcher = sdi.Sketcher(sdi.Loop(make(Custom(run, a=nn.Linear(16, 16))), "body"), dim=64)
    assert sdi.self_check(sketcher, tokens(4, 5), names(4), rows=4).worst < 1e-4


def test_what_is_written_into_a_new_tensor_keeps_its_owners() -> None:
    """Packed tokens written into new zeros in another order are still their rows'."""
    order = torch.tensor([3, 0, 1, 2, 5, 4, 7, 6, 11, 10, 9, 8, 15, 14, 13, 12])

    def run(m: Any, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 16)
        index = order if len(flat) == 16 else torch.arange(len(flat))
        out = torch.zeros(len(flat), 16).index_add_(0, index, torch.tanh(m.a(flat[index])))
        return x + m.b(out).view_as(x)

    body = Custom(run, a=nn.Linear(16, 16), b=nn.LayerNorm(16))
    sketcher = sdi.Sketcher(sdi.Loop(make(body), "body"), dim=64)
    assert sdi.self_check(sketcher, tokens(4, 4), names(4), rows=4).worst < 1e-4


CONSTANT: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "positions of a type": lambda m, x: x + m.a(torch.arange(x.shape[1]).to(x.device).long()),
    "table of a type": lambda m, x: x + m.a.weight[: x.shape[1]] * torch.ones(16).type_as(x),
    "new zeros": lambda m, x: x + m.a(x.new_zeros(x.shape[1]).long()),
    "empty slice": lambda m, x: x + m.a.weight[: x.shape[1]] + x[:, :0].sum(1, keepdim=True),
}


@pytest.mark.parametrize("kind", CONSTANT)
@pytest.mark.parametrize("length", [7, 8])
def test_constants_of_a_batch_are_no_rows(kind: str, length: int) -> None:
    """What only has the type or the device of rows is a constant, also where B divides T."""
    body = Custom(lambda m, x: torch.tanh(CONSTANT[kind](m, x)), a=nn.Embedding(9, 16))
    sketcher = sdi.Sketcher(sdi.Loop(make(body), "body"), dim=64)
    assert sdi.self_check(sketcher, tokens(4, length), names(4)).worst < 1e-4
