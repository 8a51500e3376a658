"""The model that the loop structures share: an embedding, a way to run the body, a head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import LOOPS, RIGHT, VOCABULARY, WIDTH, Case, Make

RunLoop = Callable[[Any, Tensor, dict[str, Any]], Tensor]


class Looped(nn.Module):
    """(B, T) tokens → (B, T, V) logits; `run` takes (module, x (B, T, d), what else is given)."""

    def __init__(self, run: RunLoop, body: nn.Module, **parts: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.run, self.body = run, body
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, input_ids: Tensor, **rest: Any) -> Tensor:
        return self.head(self.run(self, self.embed(input_ids), rest))


def plain(model: Any, x: Tensor, _rest: Any) -> Tensor:
    """One module called `LOOPS` times."""
    for t in range(LOOPS):
        x = model.body(x, t)
    return x


def row_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """(B,): next-token cross-entropy over each row's own targets, its mean."""
    each = F.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none"
    )
    return each.sum(1) / (labels[:, 1:] != -100).sum(1)


def lm(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """(B,): the row losses of a model that takes everything but the labels."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    return row_losses(model(**inputs), batch["labels"])


@dataclass(frozen=True)
class Structure:
    """A loop structure.

    Attributes:
        name: what the table calls it.
        build: body factory → case.
        token: whether it takes only kinds that treat each token alone.
        expected: "right", or a regular expression of the refusal.
    """

    name: str
    build: Callable[[Make], Case]
    token: bool = False
    expected: str = RIGHT


class Structures(dict[str, Structure]):
    """Structures by name; the decorator `named` adds the function that builds one."""

    def named(
        self, name: str, *, token: bool = False, expected: str = RIGHT
    ) -> Callable[[Callable[[Make], Case]], Callable[[Make], Case]]:
        """Register a function from body factory to case."""

        def register(build: Callable[[Make], Case]) -> Callable[[Make], Case]:
            assert name not in self, name
            self[name] = Structure(name, build, token, expected)
            return build

        return register
