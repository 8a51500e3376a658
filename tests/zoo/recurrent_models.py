"""Language models that loop: Ouro, Huginn, depth by row, recursion by token, LoRA per loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import VOCABULARY, WIDTH, Case, pick, tokens
from tests.zoo.literature import RMS, SandwichBlock, SelfAttention, unbiased
from tests.zoo.looped import lm, row_losses

D = WIDTH
RECURRENT: dict[str, Callable[[], Case]] = {}


def _case(model: nn.Module, body: Any, extra: dict[str, Tensor] | None = None, **more: Any) -> Case:
    batch = {**tokens(), **(extra or {})}
    more.setdefault("loss", lm)
    return Case(model, batch, pick(batch), body, **more)


class Ouro(nn.Module):
    """A stack of layers ×4; each loop ends in the final norm, and an exit gate reads it."""

    def __init__(self, layers: int = 2, loops: int = 4) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, D)
        self.layers = nn.ModuleList([SandwichBlock() for _ in range(layers)])
        self.norm, self.early_exit_gate = RMS(), nn.Linear(D, 1)
        self.lm_head, self.loops = unbiased(D, VOCABULARY), loops

    def forward(self, input_ids: Tensor) -> tuple[list[Tensor], Tensor]:
        """Logits of each loop, and the (loops, B, T) probabilities of leaving there."""
        x, states, leave = self.embed_tokens(input_ids), [], []
        for _ in range(self.loops):
            for layer in self.layers:
                x = layer(x)
            x = self.norm(x)
            states.append(x)
            leave.append(self.early_exit_gate(x).squeeze(-1).sigmoid())
        left, shares = torch.ones_like(leave[0]), []
        for gate in leave[:-1]:
            shares.append(left * gate)
            left = left * (1 - gate)
        return [self.lm_head(state) for state in states], torch.stack([*shares, left])


def _expected_loss(model: nn.Module, batch: Any) -> Tensor:
    """Ouro's first stage: the expected loss over exits, less β times their entropy."""
    logits, shares = model(batch["input_ids"])
    each = torch.stack(
        [
            F.cross_entropy(
                logit[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none",
                ignore_index=-100,
            )
            for logit in logits
        ]
    )  # fmt: skip
    shares = shares[:, :, :-1]
    entropy = -(shares * shares.clamp_min(1e-9).log()).sum(0)
    return ((shares * each).sum(0) - 0.05 * entropy).mean(1)


def _last_loss(model: nn.Module, batch: Any) -> Tensor:
    return row_losses(model(batch["input_ids"])[0][-1], batch["labels"])


_OURO = ["layers", "norm", "early_exit_gate"]
RECURRENT["Ouro, expected loss over exits"] = lambda: _case(
    Ouro(), _OURO, loss=_expected_loss, steps=4
)
RECURRENT["Ouro, last exit only"] = lambda: _case(Ouro(), _OURO, loss=_last_loss, steps=4)
RECURRENT["Ouro, the layers alone"] = lambda: _case(Ouro(), "layers", loss=_expected_loss, steps=4)


class Huginn(nn.Module):
    """Prelude; an adapter on [x, e] and a core of four, iterated from a random state; coda."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCABULARY, D)
        self.prelude = nn.ModuleList([SandwichBlock(biased=True)])
        self.adapter = unbiased(2 * D, D)
        self.core_block = nn.ModuleList([SandwichBlock(biased=True) for _ in range(4)])
        self.coda = nn.ModuleList([SandwichBlock(biased=True)])
        self.ln_f, self.lm_head = RMS(), unbiased(D, VOCABULARY)

    def forward(self, input_ids: Tensor, seeds: Tensor | None = None, seed: int = 0) -> Tensor:
        e = self.wte(input_ids)
        for block in self.prelude:
            e = block(e)
        x = self._state(e, seeds)
        without, with_gradient = self._iterations(seed)
        with torch.no_grad():
            for _ in range(without):
                x = self._core(x, e)
        for _ in range(with_gradient):
            x = self._core(x, e)
        for block in self.coda:
            x = block(self.ln_f(x))
        return self.lm_head(self.ln_f(x))

    def _core(self, x: Tensor, e: Tensor) -> Tensor:
        x = self.adapter(torch.cat([x, e], dim=-1))
        for block in self.core_block:
            x = block(x)
        return x

    def _iterations(self, seed: int) -> tuple[int, int]:
        """Poisson around a log-normal mean, at most 4 with gradient, as in training."""
        drawn = torch.Generator().manual_seed(seed)
        rate = torch.exp(torch.randn((), generator=drawn) * 0.5 + 1.3)
        total = int(torch.poisson(rate, generator=drawn)) + 1
        return max(total - 4, 1), max(min(total, 4), 2)

    def _state(self, e: Tensor, seeds: Tensor | None) -> Tensor:
        if seeds is None:
            return torch.randn_like(e)
        made = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        return torch.stack([torch.randn(e.shape[1:], generator=g) for g in made]).to(e.dtype)


def _huginn(seed: int) -> Any:
    return lambda m, b: row_losses(m(b["input_ids"], b.get("seeds"), seed), b["labels"])


_SEEDS = {"seeds": torch.tensor([5, 6, 7])}
for _seed in (0, 1, 2):
    RECURRENT[f"Huginn, a state by row, draw {_seed}"] = lambda s=_seed: _case(
        Huginn(), ["adapter", "core_block"], _SEEDS, loss=_huginn(s)
    )
RECURRENT["Huginn, a state for the batch"] = lambda: _case(
    Huginn(), ["adapter", "core_block"], loss=_huginn(0), expected="random"
)


class RowDepths(nn.Module):
    """Parcae-like: a decaying linear recurrence around a block, to a depth drawn by row."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(VOCABULARY, D), RMS()
        self.recurrence = Recurrence()
        self.head = unbiased(D, VOCABULARY)

    def forward(self, input_ids: Tensor, depth: Tensor, without: Tensor) -> Tensor:
        e = self.norm(self.embed(input_ids))
        h = torch.zeros_like(e)
        for t in range(int(depth.max())):
            moved = self.recurrence(h, e)
            frozen = (t < without)[:, None, None]
            moved = torch.where(frozen, moved.detach(), moved)
            h = torch.where((t < depth)[:, None, None], moved, h)
        return self.head(h)


class Recurrence(nn.Module):
    """h ← exp(−Δ·exp(A))·h + Δ·B e, then a block."""

    def __init__(self) -> None:
        super().__init__()
        self.log_a = nn.Parameter(torch.randn(D) * 0.2)
        self.log_step = nn.Parameter(torch.randn(D) * 0.2)
        self.enter, self.block = unbiased(D, D), SandwichBlock()

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        step = F.softplus(self.log_step)
        return self.block(torch.exp(-step * torch.exp(self.log_a)) * h + step * self.enter(e))


RECURRENT["Parcae-like, depth by row"] = lambda: _case(
    RowDepths(), "recurrence",
    {"depth": torch.tensor([2, 5, 3]), "without": torch.tensor([0, 2, 1])}, steps=5,
)  # fmt: skip


class Recursions(nn.Module):
    """Mixture of recursions: a block applied to fewer tokens in each recursion."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, D)
        self.recursion = Recursion(3)
        self.head = unbiased(D, VOCABULARY)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for t, kept in enumerate((5, 3, 2)):
            x = self.recursion(x, t, kept)
        return self.head(x)


class Recursion(nn.Module):
    """A shared block, and a router for each recursion that picks its top-k tokens."""

    def __init__(self, recursions: int) -> None:
        super().__init__()
        self.block = SandwichBlock()
        self.routers = nn.ModuleList([nn.Linear(D, 1) for _ in range(recursions)])

    def forward(self, x: Tensor, t: int, kept: int) -> Tensor:
        weight = self.routers[t](x).sigmoid().squeeze(-1)
        share, place = weight.topk(kept, dim=1)
        place, order = place.sort(dim=1)
        index = place[..., None].expand(-1, -1, D)
        done = self.block(x.gather(1, index)) * share.gather(1, order)[..., None]
        return x.scatter_add(1, index, done)


class TokenRecursion(Recursion):
    """The recursion that a chosen set of tokens, in one list, goes through."""

    def forward(self, x: Tensor, t: int, kept: int = 0) -> Tensor:
        gate = self.routers[t](x).sigmoid()
        return x + gate * self.block.mlp(self.block.norms[2](x))


class ByToken(Recursions):
    """Token choice: each token has a depth of its own, and later loops see the rest only."""

    def __init__(self) -> None:
        super().__init__()
        self.recursion = TokenRecursion(3)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        depth = x.detach().sum(-1).mul(5).long().remainder(3) + 1
        for t in range(3):
            token = (depth > t).nonzero(as_tuple=True)
            x = x.index_put(token, self.recursion(x[token], t))
        return self.head(x)


RECURRENT["mixture of recursions, top-k tokens"] = lambda: _case(Recursions(), "recursion", steps=3)
RECURRENT["mixture of recursions, depth by token"] = lambda: _case(ByToken(), "recursion", steps=3)


class LoopLoRA(nn.Module):
    """A shared matrix with a low-rank change of its own for each loop."""

    def __init__(self, columns: int, rows: int, loops: int = 3, rank: int = 2) -> None:
        super().__init__()
        self.base = unbiased(columns, rows)
        self.down = nn.ParameterList([torch.randn(rank, columns) * 0.2 for _ in range(loops)])
        self.up = nn.ParameterList([torch.randn(rows, rank) * 0.2 for _ in range(loops)])
        self.loop = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.down[self.loop]), self.up[self.loop])


class Relaxed(nn.Module):
    """Relaxed recursive transformer: two layers looped three times, LoRA chosen by the loop."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, D), unbiased(D, VOCABULARY)
        self.layers = nn.ModuleList([RelaxedLayer() for _ in range(2)])

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for loop in range(3):
            for module in self.modules():
                if isinstance(module, LoopLoRA):
                    module.loop = loop
            for layer in self.layers:
                x = layer(x)
        return self.head(x)


class RelaxedLayer(nn.Module):
    """Attention and an MLP whose matrices are relaxed."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = RMS(), RMS()
        self.attention = SelfAttention(LoopLoRA)
        self.up, self.down = LoopLoRA(D, 24), LoopLoRA(24, D)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


RECURRENT["relaxed recursion, LoRA per loop"] = lambda: _case(Relaxed(), "layers", steps=3)
