"""Loop structures that differ in the batch's layout, in precision, in wrapping, in the loss."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from tests.zoo.case import LENGTH, LOOPS, VOCABULARY, WIDTH, Case, Make, pick, tokens
from tests.zoo.loop_structures import Wrapped, case
from tests.zoo.looped import Looped, Structures, lm, plain, row_losses
from tests.zoo.parts import linear

D = WIDTH
LAYOUT = Structures()


@LAYOUT.named("body on flattened tokens", token=True)
def _flattened(make: Make) -> Case:
    return case(lambda m, x, r: plain(m, x.reshape(-1, D), r).view_as(x), make())


@LAYOUT.named("body with the batch second", token=True)
def _second(make: Make) -> Case:
    return case(lambda m, x, r: plain(m, x.transpose(0, 1), r).transpose(0, 1), make())


@LAYOUT.named("body with the batch second, contiguous", token=True)
def _second_contiguous(make: Make) -> Case:
    return case(lambda m, x, r: plain(m, x.transpose(0, 1).contiguous(), r).transpose(0, 1), make())


@LAYOUT.named("body with the batch second, as many rows as tokens", token=True)
def _second_square(make: Make) -> Case:
    batch = tokens(LENGTH, LENGTH)
    run = _second(make).model.run
    return Case(Looped(run, make()), batch, pick(batch), loss=lm, rows=LENGTH)


@LAYOUT.named("body on features first", token=True)
def _features_first(make: Make) -> Case:
    body = Wrapped(lambda m, x, t: m.inner(x.permute(2, 0, 1), t).permute(1, 2, 0), make())
    return case(lambda m, x, r: plain(m, x.permute(1, 2, 0), r).permute(2, 0, 1), body)


@LAYOUT.named("batch of (T, B) tensors", token=True)
def _batch_second(make: Make) -> Case:
    rows_first = tokens()
    batch = {key: value.T.contiguous() for key, value in rows_first.items()}

    def loss(model: nn.Module, given: Any) -> Tensor:
        logits = model(given["input_ids"])
        return row_losses(logits.transpose(0, 1), given["labels"].T)

    def row(i: int) -> Any:
        return {key: value[:, i : i + 1].clone() for key, value in batch.items()}

    return Case(Looped(plain, make()), batch, row, loss=loss)


@LAYOUT.named("batch of flattened tokens", token=True)
def _batch_flat(make: Make) -> Case:
    rows_first = tokens()
    batch = {key: value.reshape(-1) for key, value in rows_first.items()}

    def loss(model: nn.Module, given: Any) -> Tensor:
        logits = model(given["input_ids"]).view(-1, LENGTH, VOCABULARY)
        return row_losses(logits, given["labels"].view(-1, LENGTH))

    def row(i: int) -> Any:
        return {key: value[i].clone() for key, value in rows_first.items()}

    return Case(Looped(plain, make()), batch, row, loss=loss)


def packed(lengths: tuple[int, ...] = (4, 7, 3)) -> tuple[dict[str, Tensor], Any]:
    """A batch packed into one sequence (1, N) with cu_seqlens (B + 1,), and each row's own."""
    whole = tokens(1, sum(lengths))
    ends = torch.tensor([0, *lengths]).cumsum(0)
    batch = {**whole, "cu_seqlens": ends.to(torch.int32)}

    def row(i: int) -> dict[str, Tensor]:
        own = slice(int(ends[i]), int(ends[i + 1]))
        alone = {key: value[:, own].clone() for key, value in whole.items()}
        return {**alone, "cu_seqlens": torch.tensor([0, lengths[i]], dtype=torch.int32)}

    return batch, row


def packed_loss(model: nn.Module, batch: dict[str, Tensor], **inputs: Any) -> Tensor:
    """(B,): each segment's own next-token loss."""
    logits = model(batch["input_ids"], **inputs)[0]
    ends = batch["cu_seqlens"].tolist()
    each = [
        F.cross_entropy(logits[a : b - 1].float(), batch["labels"][0, a + 1 : b])
        for a, b in pairwise(ends)
    ]
    return torch.stack(each)


@LAYOUT.named("packed with cu_seqlens", token=True)
def _packed(make: Make) -> Case:
    batch, row = packed()
    return Case(Looped(plain, make()), batch, row, loss=packed_loss)


@LAYOUT.named("packed, without the leading axis", token=True)
def _packed_flat(make: Make) -> Case:
    batch, row = packed()
    run = lambda m, x, r: plain(m, x[0], r)[None]  # noqa: E731
    return Case(Looped(run, make()), batch, row, loss=packed_loss)


@LAYOUT.named("rows padded", token=True)
def _padded(make: Make) -> Case:
    lengths, batch = (5, 3, 4), tokens()
    keep = torch.arange(LENGTH)[None] < torch.tensor(lengths)[:, None]
    batch = {
        "input_ids": batch["input_ids"].where(keep, torch.zeros(())),
        "labels": batch["labels"].where(keep, torch.tensor(-100)),
    }

    def row(i: int) -> Any:
        return {key: value[i : i + 1, : lengths[i]].clone() for key, value in batch.items()}

    batch = {key: value.long() for key, value in batch.items()}
    return Case(Looped(plain, make()), batch, row, loss=lm)


@LAYOUT.named("one row")
def _one_row(make: Make) -> Case:
    batch = tokens(1)
    return Case(Looped(plain, make()), batch, pick(batch), loss=lm, rows=1)


@LAYOUT.named("as many rows as tokens")
def _square(make: Make) -> Case:
    batch = tokens(LENGTH, LENGTH)
    return Case(Looped(plain, make()), batch, pick(batch), loss=lm, rows=LENGTH)


@LAYOUT.named("every row three times in the body", token=False)
def _repeated(make: Make) -> Case:
    def run(m: Any, x: Tensor, r: Any) -> Tensor:
        wide = torch.cat([x, x.flip(1), -x], dim=1).reshape(-1, *x.shape[1:])
        return plain(m, wide, r).view(x.shape[0], 3, *x.shape[1:]).mean(1)

    return case(run, make())


@LAYOUT.named("two views of the batch stacked before the body")
def _stacked(make: Make) -> Case:
    def run(m: Any, x: Tensor, r: Any) -> Tensor:
        first, second = plain(m, torch.cat([x, x.flip(1)]), r).chunk(2)
        return first + second

    return case(run, make(), expected="row")


@LAYOUT.named("autocast")
def _autocast(make: Make) -> Case:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return lm(model, batch)

    return case(plain, make(), loss=loss, bound=1e-2)


@LAYOUT.named("bf16 weights")
def _bf16(make: Make) -> Case:
    built = case(plain, make(), bound=1e-2)
    built.model.to(torch.bfloat16)
    return built


@LAYOUT.named("float64 weights")
def _float64(make: Make) -> Case:
    built = case(plain, make())
    built.model.double()
    return built


class Holder(nn.Module):
    """A wrapper as DataParallel's: the model is its `module`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **named: Any) -> Any:
        return self.module(*args, **named)


@LAYOUT.named("a wrapper with a `module.` prefix")
def _wrapped(make: Make) -> Case:
    built = case(plain, make())
    return replace(built, model=Holder(built.model))


@LAYOUT.named("the model compiled")
def _compiled(make: Make) -> Case:
    built = case(plain, make())
    return replace(built, model=torch.compile(built.model, backend="eager"))


@LAYOUT.named("the body compiled")
def _body_compiled(make: Make) -> Case:
    return case(plain, torch.compile(make(), backend="eager"))


@LAYOUT.named("one parameter of the body frozen")
def _one_frozen(make: Make) -> Case:
    body = Wrapped(lambda m, x, t: m.inner(m.a(x), t), make(), a=linear())
    next(body.inner.parameters()).requires_grad_(False)
    return case(plain, body)


@LAYOUT.named("everything but the body frozen")
def _rest_frozen(make: Make) -> Case:
    built = case(plain, make())
    for name, parameter in built.model.named_parameters():
        parameter.requires_grad_(name.startswith("body") and parameter.is_floating_point())
    return built


@LAYOUT.named("head tied to the embedding by function")
def _tied_head(make: Make) -> Case:
    model = Looped(plain, make())
    model.head = None
    body = Wrapped(
        lambda m, ids: F.linear(m.inner.run(m.inner, m.inner.embed(ids), {}), m.inner.embed.weight),
        model,
    )
    batch = tokens()
    return Case(
        body,
        batch,
        pick(batch),
        body="inner.body",
        loss=lambda m, b: row_losses(m(b["input_ids"]), b["labels"]),
    )


@LAYOUT.named("head tied to the body", expected="used outside of the body")
def _body_head(make: Make) -> Case:
    body = Wrapped(lambda m, x, t: m.inner(F.linear(x, m.a.weight), t), make(), a=linear())
    return case(lambda m, x, r: F.linear(plain(m, x, r), m.body.a.weight.T), body)


@LAYOUT.named("head tied to the body, with bins of their own")
def _body_head_bins(make: Make) -> Case:
    return replace(_body_head(make), options={"outside": True}, steps=LOOPS + 2)


@LAYOUT.named("embedding and head tied, with bins of their own")
def _tied_bins(make: Make) -> Case:
    return replace(_tied_head(make), options={"outside": True}, steps=LOOPS + 2)


@LAYOUT.named("two forwards in the loss")
def _two_forwards(make: Make) -> Case:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        first = row_losses(model(batch["input_ids"]), batch["labels"])
        second = row_losses(model(batch["input_ids"].flip(1)), batch["labels"].flip(1))
        return first + 0.5 * second

    return case(plain, make(), loss=loss)


@LAYOUT.named("a second forward that the loss does not use")
def _unused(make: Make) -> Case:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        first = lm(model, batch)
        model(batch["input_ids"].flip(1))
        return first

    return case(plain, make(), loss=loss)


@LAYOUT.named("a teacher's forward under no_grad")
def _teacher(make: Make) -> Case:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        with torch.no_grad():
            target = model((batch["input_ids"] + 3) % VOCABULARY).softmax(-1)
        return -(target * model(batch["input_ids"]).log_softmax(-1)).sum((1, 2))

    return case(plain, make(), loss=loss)


@LAYOUT.named("the model through functional_call")
def _functional(make: Make) -> Case:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        logits = functional_call(model, dict(model.named_buffers()), (batch["input_ids"],))
        return row_losses(logits, batch["labels"])

    return case(plain, make(), loss=loss)


@LAYOUT.named("scalar mean loss", expected="scalar for 3 examples")
def _scalar(make: Make) -> Case:
    return case(plain, make(), loss=lambda m, b: lm(m, b).mean())


@LAYOUT.named("loss divided by the batch's tokens", expected="averaged over the batch")
def _token_mean(make: Make) -> Case:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        targets = (batch["labels"][:, 1:] != -100).sum(1)
        return lm(model, batch) * targets / targets.sum()

    return case(plain, make(), loss=loss)


@LAYOUT.named("contrast between rows", expected="influence each other")
def _contrast(make: Make) -> Case:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        pooled = F.normalize(model(batch["input_ids"]).mean(1), dim=-1)
        return -(pooled @ pooled.T).log_softmax(-1).diagonal() + lm(model, batch)

    return case(plain, make(), loss=loss)


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grads[0] * w, (grads[0] * x).sum((0, 1))


@LAYOUT.named("a custom autograd function", expected="cannot be seen")
def _custom(make: Make) -> Case:
    body = Wrapped(
        lambda m, x, t: _Scaled.apply(m.inner(x, t), m.a.weight), make(), a=nn.RMSNorm(D)
    )
    return case(plain, body)


@LAYOUT.named("a gradient taken inside", expected="differentiated during the forward|no gradient")
def _inner_gradient(make: Make) -> Case:
    def step(m: Any, x: Tensor, t: int) -> Tensor:
        y = x.detach().requires_grad_()
        return x - torch.autograd.grad(m.inner(y, t).square().sum(), y, create_graph=True)[0]

    return case(plain, Wrapped(step, make()))
