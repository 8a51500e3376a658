"""Gradient checkpointing: steps keep their numbers, and memory stays saved."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sdi
from sdi.errors import CaptureError
from tests.looped import Block, LoopedModel, Square, names, tokens


class Checkpointed(LoopedModel):
    """A loop whose passes, or the halves of whose body, run again in the backward pass."""

    def __init__(self, where: str, reentrant: bool, free: int = 0) -> None:
        torch.manual_seed(0)
        super().__init__(Halves(where == "inside", reentrant))
        self.where, self.reentrant, self.free = where, reentrant, free

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        for step in range(4):
            with torch.set_grad_enabled(step >= self.free):
                x = self._pass(x)
        return self.head(x)

    def _pass(self, x: Tensor) -> Tensor:
        if self.where == "around":
            return _again(self.body, x, self.reentrant)
        if self.where == "nested":
            return _again(lambda y: _again(self.body, y, self.reentrant), x, self.reentrant)
        return self.body(x)


class Halves(nn.Module):
    """Two blocks, each checkpointed on request."""

    def __init__(self, each: bool, reentrant: bool) -> None:
        super().__init__()
        self.first, self.second = Block(16), Block(16)
        self.each, self.reentrant = each, reentrant

    def forward(self, x: Tensor) -> Tensor:
        for block in (self.first, self.second):
            x = _again(block, x, self.reentrant) if self.each else block(x)
        return x


def _again(run: Callable[[Tensor], Tensor], x: Tensor, reentrant: bool) -> Tensor:
    found: Tensor = checkpoint(run, x, use_reentrant=reentrant)
    return found


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch's, of no_grad
@pytest.mark.parametrize("where", ["inside", "around", "nested"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("free", [0, 2])
def test_checkpointing_changes_nothing(where: str, reentrant: bool, free: int) -> None:
    """Recomputed from the last step on, reentrant or not, the step sketches are the same."""
    plain = sdi.Sketcher(sdi.Loop(Checkpointed("", False, free), "body"), dim=64)
    model = Checkpointed(where, reentrant, free)
    expected, got = (
        plain(tokens(), names(4)),
        sdi.Sketcher(sdi.Loop(model, "body"), dim=64)(tokens(), names(4)),
    )
    torch.testing.assert_close(got.values, expected.values)
    assert got.steps == expected.steps and got.detached == expected.detached
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("where", ["inside", "around", "nested"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_self_check_passes_under_checkpointing(where: str, reentrant: bool) -> None:
    """Per-row autograd sees checkpointed regions too, so that a run starts."""
    sketcher = sdi.Sketcher(sdi.Loop(Checkpointed(where, reentrant), "body"), dim=64)
    assert sdi.self_check(sketcher, tokens(), names(4)).worst < 1e-4


def test_roles_keep_their_steps_under_reentrant_checkpointing() -> None:
    """A region that runs again leaves the labels of nested cycles as they are."""
    torch.manual_seed(0)
    model = Cycles(True)
    loop = sdi.Loop(model, {"low": "low", "high": "high"})
    sketcher = sdi.Sketcher(loop, dim=64)
    assert sdi.self_check(sketcher, tokens(), names(4)).worst < 1e-4
    assert sketcher(tokens(), names(4)).steps == ("1.low.1", "1.high.1", "2.low.1", "2.high.1")


class Cycles(LoopedModel):
    """Two cycles of a low and a high level, each call checkpointed."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__(nn.Identity())
        self.low, self.high, self.reentrant = Block(16), Block(16), reentrant

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        for _ in range(2):
            x = _again(self.low, x, self.reentrant)
            x = _again(self.high, x, self.reentrant)
        return self.head(x)


@pytest.mark.parametrize("reentrant", [False, True])
def test_full_graph_and_checkpointing(reentrant: bool) -> None:
    """A full graph goes with non-reentrant regions, and is refused with reentrant ones."""

    class Free(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Block(16)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = self.inner(x)
            return self.inner(x)

    torch.manual_seed(0)

    class Loops(LoopedModel):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            x = self.embed(input_ids)
            for _ in range(2):
                x = _again(self.body, x, reentrant)
            return self.head(x)

    sketcher = sdi.Sketcher(sdi.Loop(Loops(Free()), "body", full_graph=True), dim=64)
    if reentrant:
        with pytest.raises(CaptureError, match="use_reentrant=False"):
            sketcher(tokens(), names(4))
    else:
        assert sdi.self_check(sketcher, tokens(), names(4)).worst < 1e-4


@pytest.mark.parametrize("reentrant", [False, True])
def test_unseen_uses_in_a_region_are_refused(reentrant: bool) -> None:
    """A custom autograd function inside a checkpointed region is refused, naming the parameter."""

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Linear(16, 16)
            self.gain = nn.Parameter(torch.ones(16))

        def forward(self, x: Tensor) -> Tensor:
            return _again(lambda y: Square.apply(self.line(y), self.gain), x, reentrant)

    with pytest.raises(CaptureError, match=r"body\.gain: used by an operation that cannot be seen"):
        sdi.Sketcher(sdi.Loop(LoopedModel(Hidden()), "body"), dim=64)(tokens(), names(4))


class Wide(nn.Module):
    """A body whose activations inside are 64 times as wide as its input."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 2048), nn.Linear(2048, 32)
        self.mode = mode

    def _run(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "plain":
            return self._run(x)
        return _again(self._run, x, self.mode == "reentrant")


PEAK = """
import sys, torch, sdi
from tests.benchmarks.memory import Watch, anonymous
from tests.looped import LoopedModel, names, tokens
from tests.test_recompute import Wide
model = LoopedModel(Wide(sys.argv[1]), 32, steps=6)
sketcher = sdi.Sketcher(sdi.Loop(model, "body"), dim=256, method="outer")
sketcher(tokens(2, 8), names(2))  # loads and compiles what it needs
before, watch = anonymous(), Watch()
watch.start()
sketcher(tokens(16, 256), names(16))
watch.done = True
watch.join()
print(watch.peak - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_checkpointing_saves_memory_while_sketching() -> None:
    """What checkpointing drops is not held for the sketches: the peak is far below."""
    root = Path(__file__).parent.parent
    peaks = {}
    for mode in ("plain", "again", "reentrant"):
        command = [sys.executable, "-c", PEAK, mode]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        peaks[mode] = int(done.stdout)
    assert peaks["again"] < 0.6 * peaks["plain"], peaks
    assert peaks["reentrant"] < 0.6 * peaks["plain"], peaks


GROWTH = """
import ctypes, sys, torch, sdi
from tests.benchmarks.memory import anonymous
from tests.looped import LoopedModel, names, tokens
from tests.test_recompute import Wide
class Twice(LoopedModel):
    def forward(self, input_ids):
        super().forward(input_ids)  # its loss is not used
        return super().forward(input_ids)
model = Twice(Wide(sys.argv[1]), 32, steps=6)
sketcher = sdi.Sketcher(sdi.Loop(model, "body"), dim=256, method="outer")
def held():
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps for later goes up and down
    return anonymous()
for number in range(24):
    if number == 8:
        before = held()
    sketcher(tokens(8, 64), names(8))
print(held() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="reads /proc, and asks glibc")
@pytest.mark.parametrize("mode", ["plain", "again", "reentrant"])
def test_memory_does_not_grow_from_batch_to_batch(mode: str) -> None:
    """Nothing of a pass outlives it: sixteen more batches take less than one's activations."""
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", GROWTH, mode]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 8 * 64 * 2048 * 4 * 6 // 1024


class Tied(LoopedModel):
    """The head is the embedding, by a product in the model; a norm between the steps."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(Block(16), vocabulary=23)
        self.between = nn.LayerNorm(16)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        for _ in range(self.steps):
            x = self.between(self.body(x))
        return x @ self.embed.weight.T + self.head.bias


def test_prelude_and_coda_have_bins_of_their_own() -> None:
    """A tied head's two uses, and what is used between steps, are held against autograd."""
    model = Tied()
    loop = sdi.Loop(model, "body", outside=True)
    report = sdi.self_check(sdi.Sketcher(loop, dim=64), tokens(), names(4), rows=3)
    assert report.worst < 1e-4 and report.conservation < 1e-4
    exact = sdi.ExactGradients(loop)(tokens(), names(4))
    assert exact.steps == ("prelude", "1", "2", "3", "coda")
    used = {
        name: tuple(label for s, label in enumerate(exact.steps) if exact.values[:, s, at].any())
        for name, at in exact.names.items()
    }
    assert used["embed.weight"] == ("prelude", "coda")
    assert used["body.up.weight"] == ("1", "2", "3")
    assert used["between.weight"] == ("1", "2", "coda")
    assert used["head.bias"] == ("coda",) and used["head.weight"] == ()
    losses = sdi.causal_lm_loss(model, tokens())
    losses[1].backward()
    for name, at in exact.names.items():
        whole = dict(model.named_parameters())[name].grad
        total = exact.values[1, :, at].sum(0)
        torch.testing.assert_close(
            total, torch.zeros_like(total) if whole is None else whole.flatten(),
            rtol=1e-4, atol=1e-6,
        )  # fmt: skip
