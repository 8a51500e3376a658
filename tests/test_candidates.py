"""Which body is meant: what `curate.candidates` finds called again and again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import sdi
from curate.candidates import looped
from tests.looped import ListModel, LoopedModel, make, tokens


def test_a_list_is_one_body() -> None:
    """Layers looped in Python, called in turn, are one candidate under the list's name."""
    torch.manual_seed(0)
    found = looped(ListModel().eval(), tokens(), sdi.causal_lm_loss)
    assert [(c.names, c.calls) for c in found] == [(("body",), 3)]


def test_what_runs_between_the_passes_belongs_to_them() -> None:
    """A norm after the list in every pass is a member; one with other calls is not."""

    class Normed(ListModel):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.gate = nn.LayerNorm(16), nn.Linear(16, 1)

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            x = self.embed(input_ids)
            for step in range(self.steps):
                for layer in self.body:  # type: ignore[attr-defined]
                    x = layer(x)
                x = self.norm(x)
                if step:
                    x = x * torch.sigmoid(self.gate(x))
            return self.head(x)

    found = looped(Normed().eval(), tokens(), sdi.causal_lm_loss)
    assert [c.names for c in found] == [("body", "norm"), ("gate",)]


def test_a_model_run_twice_is_not_its_own_body() -> None:
    """A loss that runs the whole model again makes no body of the model or of its ends."""

    def supervised(model: nn.Module, batch: Any) -> Tensor:
        return sdi.causal_lm_loss(model, batch) + sdi.causal_lm_loss(model, batch)

    found = looped(make(steps=4), tokens(), supervised)
    assert [(c.names, c.calls) for c in found] == [(("body",), 8)]


def test_wrapped_models_have_the_same_body() -> None:
    """torch.compile and DataParallel change neither the names nor what is found."""
    for wrap in (lambda m: torch.compile(m, backend="eager"), nn.DataParallel):
        found = looped(wrap(make()), tokens(), sdi.causal_lm_loss)
        assert [(c.names, c.calls) for c in found] == [(("body",), 3)]


def test_a_module_around_another_is_no_second_use() -> None:
    """Nested containers have the same parameters, and that alone makes no loop."""
    nested = make(nn.Sequential(nn.Sequential(nn.Linear(16, 16))), steps=1)
    assert looped(nested, tokens(), sdi.causal_lm_loss) == []


def test_loops_one_after_the_other_are_two() -> None:
    """Modules called as often, but not in turn, are not taken for one body."""

    class Twice(LoopedModel):
        def __init__(self) -> None:
            super().__init__(nn.Linear(16, 16))
            self.second = nn.Linear(16, 16)

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            x = self.embed(input_ids)
            for layer in (self.body, self.second):
                for _ in range(3):
                    x = torch.tanh(layer(x))
            return self.head(x)

    found = looped(Twice().eval(), tokens(), sdi.causal_lm_loss)
    assert sorted(c.names for c in found) == [("body",), ("second",)]
