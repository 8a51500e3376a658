"""The models that are measured, their rows and their loss; the same in every environment.

A looped GPT: `prelude` blocks, then a body of `blocks` blocks `steps` times with one set of
weights, then `coda` blocks and a head. Or an ordinary Llama of `blocks` layers. Weights and rows
are drawn from a seed on the CPU, so that workers of one torch have the same ones; `digest` is
compared to be sure.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Causal attention and a feed-forward part, each after a norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        split = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(split[0], split[1], split[2], is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class LoopedGPT(nn.Module):
    """Embedding, prelude, body `steps` times, coda, head."""

    def __init__(self, case: dict[str, Any]) -> None:
        super().__init__()
        width, self.steps = case["width"], case["steps"]

        def stack(count: int) -> nn.Sequential:
            return nn.Sequential(*(Block(width, case["heads"]) for _ in range(count)))

        self.embed = nn.Embedding(case["vocabulary"], width)
        self.prelude, self.body = stack(case["prelude"]), stack(case["blocks"])
        self.coda = stack(case["coda"])
        self.head = nn.Linear(width, case["vocabulary"])

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, T) token ids to (B, T, V) logits."""
        return self.above(self.embed(input_ids))

    def above(self, x: Tensor) -> Tensor:
        """From embeddings (B, T, d) to logits."""
        x = self.prelude(x)
        for _ in range(self.steps):
            x = self.body(x)
        return self.head(self.coda(x))


def build(case: dict[str, Any]) -> nn.Module:
    """The case's model in its data type: looped, or an ordinary stack of layers."""
    torch.manual_seed(0)
    model = LoopedGPT(case) if case["looped"] else _llama(case)
    return model.to(getattr(torch, case["dtype"]))


def _llama(case: dict[str, Any]) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=case["vocabulary"],
        hidden_size=case["width"],
        intermediate_size=4 * case["width"],
        num_hidden_layers=case["blocks"],
        num_attention_heads=case["heads"],
        max_position_embeddings=case["tokens"],
        use_cache=False,
    )
    return LlamaForCausalLM(config).eval()


def attributed(model: nn.Module) -> list[nn.Parameter]:
    """The parameters whose gradients are compared: the body's, or every matrix of the layers."""
    if isinstance(model, LoopedGPT):
        return list(model.body.parameters())
    return [p for n, p in model.named_parameters() if ".layers." in n and p.ndim == 2]


def row_losses(model: nn.Module, ids: Tensor, embedded: Tensor | None = None) -> Tensor:
    """(B,) float32: the mean over a row's next tokens, as `sdi.causal_lm_loss`.

    `embedded`: (B, T, d), in place of the ids' embeddings.
    """
    logits = _logits(model, ids, embedded)[:, :-1].float().flatten(0, 1)
    each = F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
    return each.view(len(ids), -1).mean(1)


def embeddings(model: nn.Module, ids: Tensor) -> Tensor:
    """(B, T, d)."""
    table = model.embed if isinstance(model, LoopedGPT) else cast(Any, model).model.embed_tokens
    return cast(Tensor, table(ids))


def _logits(model: nn.Module, ids: Tensor, embedded: Tensor | None) -> Tensor:
    if isinstance(model, LoopedGPT):
        return model.above(model.embed(ids) if embedded is None else embedded)
    given = {"input_ids": ids} if embedded is None else {"inputs_embeds": embedded}
    return cast(Tensor, model(**given).logits)


def tokens(case: dict[str, Any], rows: int) -> Tensor:
    """(rows, T) int64; the first rows are the same however many are asked for."""
    generator = torch.Generator().manual_seed(1)
    drawn = [
        torch.randint(0, case["vocabulary"], (case["tokens"],), generator=generator)
        for _ in range(rows)
    ]
    return torch.stack(drawn)


def batches(rows: Tensor, size: int) -> Iterator[Tensor]:
    """Rows in batches."""
    for begin in range(0, len(rows), size):
        yield rows[begin : begin + size]


def exact_scores(case: dict[str, Any], ids: Tensor) -> list[list[float]]:
    """⟨g_i, g_j⟩ (rows, rows) of whole gradients, by plain autograd one row at a time.

    The weights are the case's, rounded as its data type rounds them; the arithmetic is float32.
    """
    model = build(case).float()
    parameters, found = attributed(model), []
    for row in ids.split(1):
        gradients = torch.autograd.grad(row_losses(model, row).sum(), parameters)
        found.append(torch.cat([g.flatten() for g in gradients]))
    return gram(found)


def gram(vectors: list[Tensor]) -> list[list[float]]:
    """Inner products of vectors, added up in float64 a piece at a time."""
    stacked = torch.stack(vectors)
    total = torch.zeros(len(vectors), len(vectors), dtype=torch.float64)
    for piece in stacked.split(1 << 20, dim=1):
        wide = piece.double()
        total += wide @ wide.T
    found: list[list[float]] = total.tolist()
    return found


def digest(model: nn.Module) -> float:
    """A number that other weights do not have."""
    return float(sum(p.detach().double().abs().sum() for p in model.parameters()))
