"""Steps of a loop: which calls make one, what it is called, and bodies that have none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sdi
from sdi.errors import LoopError, SelfCheckError
from tests.looped import Block, ListModel, LoopedModel, checked, make, names, tokens


def test_list_of_layers_is_a_body() -> None:
    """Layers looped in Python make one step a pass."""
    torch.manual_seed(0)
    model = ListModel().eval()
    checked(model)
    assert sdi.Sketcher(sdi.Loop(model, "body"), dim=64)(tokens(), names(4)).steps == (
        "1",
        "2",
        "3",
    )


def test_untied_layers_are_steps_of_their_own() -> None:
    """In an ordinary stack, step t is the gradient of the t-th layer."""
    torch.manual_seed(0)
    model = ListModel(layers=3, loops=1).eval()
    checked(model, tied=False)
    exact = sdi.ExactGradients(sdi.Loop(model, "body", tied=False))(tokens(), names(4))
    for name, place in exact.names.items():
        own = int(name.split(".")[1])
        for step in range(3):
            assert bool((exact.values[:, step, place] != 0).any()) == (step == own) or (
                "position" in name and step == own
            )


def test_steps_without_gradient_keep_their_number() -> None:
    """Truncated backpropagation: steps under no_grad are zero and named, not renumbered."""

    class Truncated(LoopedModel):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            x = self.embed(input_ids)
            for step in range(4):
                with torch.set_grad_enabled(step >= 2):
                    x = self.body(x)
            return self.head(x)

    torch.manual_seed(0)
    part = sdi.Sketcher(sdi.Loop(Truncated(Block(16)), "body"), dim=64)(tokens(), names(4))
    assert part.steps == ("1", "2", "3", "4") and part.detached == ("1", "2")
    assert (part.norms[:, :2] == 0).all() and (part.norms[:, 2:] > 0).all()


def test_full_graph_lets_truncated_loops_take_part() -> None:
    """With full_graph the steps under no_grad have the gradients of the same model without it."""

    class Truncated(LoopedModel):
        free = 2

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            x = self.embed(input_ids)
            with torch.no_grad():
                for _ in range(self.free):
                    x = self.body(x)
            for _ in range(4 - self.free):
                x = self.body(x)
            return self.head(x)

    torch.manual_seed(0)
    model = Truncated(Block(16)).eval()
    loop = sdi.Loop(model, "body", full_graph=True)
    sketcher = sdi.Sketcher(loop, dim=64)
    assert sdi.self_check(sketcher, tokens(), names(4), rows=3).worst < 1e-4
    part = sketcher(tokens(), names(4))
    model.free = 0
    plain = sdi.Sketcher(sdi.Loop(model, "body"), dim=64)(tokens(), names(4))
    torch.testing.assert_close(part.values, plain.values)
    assert part.detached == ()
    assert torch.is_grad_enabled() and loop.fingerprint() != sdi.Loop(model, "body").fingerprint()


class Cycles(LoopedModel):
    """Two cycles of two low calls and a high one, the high level a list of layers."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Identity())
        self.low, self.high = Block(16), nn.ModuleList([Block(16), nn.Linear(16, 16)])

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        e = self.embed(input_ids)
        low = high = torch.zeros_like(e)
        for _ in range(2):
            for _ in range(2):
                low = self.low(low + high + e)
            for layer in self.high:
                high = layer(high + low)
        return self.head(high)


@pytest.mark.parametrize(
    "body", [{"low": "low", "high": "high"}, ("low=low", "high=high")], ids=["mapping", "names"]
)
def test_nested_cycles_label_each_step(body: Any) -> None:
    """With a role for each level every call is a step, labelled by cycle and role."""
    model = Cycles()
    checked(model, body)
    exact = sdi.ExactGradients(sdi.Loop(model, body))(tokens(), names(4))
    cycle = ("low.1", "low.2", "high.1")
    assert exact.steps == tuple(f"{n}.{label}" for n in (1, 2) for label in cycle)
    for name, at in exact.names.items():
        used = [label for s, label in enumerate(exact.steps) if exact.values[:, s, at].any()]
        assert all((".low." in label) == name.startswith("low") for label in used) and used


def test_roles_are_for_all_or_none() -> None:
    """A body of which only a part has a role is refused."""
    with pytest.raises(LoopError, match=r"only some of the body has a role.*low=model\.L"):
        sdi.Loop(Cycles(), ["low=low", "high"])


class Drawn(LoopedModel):
    """Starts from a random state, of several kinds."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        e = self.embed(input_ids)
        x = torch.randn_like(e) + 0.5 * torch.rand(e.shape)
        nn.init.trunc_normal_(start := torch.empty_like(e), std=0.3)
        x = x + start
        for _ in range(self.steps):
            x = self.body(x + e)
        return self.head(x)


def test_random_initial_states_are_made_a_function_of_the_row() -> None:
    """With seeded rows a random state is the same in any order, batch and padding."""
    torch.manual_seed(0)
    model = Drawn(Block(16)).eval()
    with pytest.raises(SelfCheckError, match="seeded_rows"):
        sdi.self_check(sdi.Sketcher(sdi.Loop(model, "body"), dim=64), tokens(), names(4))
    sketcher = sdi.Sketcher(sdi.Loop(model, "body", seeded_rows=True), dim=64)
    assert sdi.self_check(sketcher, tokens(), names(4), rows=3).worst < 1e-4
    batch = tokens()
    together = sketcher(batch, names(4)).values
    order = [2, 0]
    some = {key: value[order] for key, value in batch.items()}
    padded = {
        key: F.pad(value, (0, 3), value=-100 if key == "labels" else 0)
        for key, value in some.items()
    }
    found = sketcher(padded, ["r2", "r0"]).values
    torch.testing.assert_close(found, together[order], rtol=1e-4, atol=1e-6)


def test_bodies_that_are_no_loop() -> None:
    """Never called, called once, unknown and frozen bodies each get their own message."""
    model = make()
    model.spare = nn.Linear(2, 2)
    with pytest.raises(LoopError, match="never called"):
        sdi.Sketcher(sdi.Loop(model, "spare"), dim=64)(tokens(), names(4))
    with pytest.raises(LoopError, match="called once"):
        sdi.self_check(sdi.Sketcher(sdi.Loop(model, "head"), dim=64), tokens(), names(4))
    with pytest.raises(LoopError, match="nearest name is 'body'"):
        sdi.Loop(model, "bodi")
    model.spare.requires_grad_(False)
    with pytest.raises(LoopError, match="requires a gradient"):
        sdi.Loop(model, "spare")


def test_find_loops_proposes_the_body() -> None:
    """What is called more than once is found, the outermost module of it only."""
    found = sdi.find_loops(make(), tokens())
    assert [(c.name, c.calls) for c in found] == [("body", 3)]
