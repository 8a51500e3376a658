"""What a run is checked on at its start: a model that reads padding is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sdi
from curate.examine import Request, examine
from curate.rundir import RunDirectory
from curate.sketching import LoopOptions, SketchOptions, sketch_run
from sdi.errors import SelfCheckError
from tests.loopedrun import LOOP, OPTIONS, Looped, add_texts, checkpoints, make_run, write_texts


class Averaging(Looped):
    """At each step a token sees the mean over all positions, padding included."""

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, T) to (B, T, 300)."""
        state = self.embed(input_ids)
        for _ in range(self.steps):
            state = state + self.body(state + state.mean(dim=1, keepdim=True))
        return self.head(state)


class MaskedAveraging(Looped):
    """The same over the row's own tokens."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, T) to (B, T, 300)."""
        state, own = self.embed(input_ids), attention_mask[:, :, None].to(self.head.weight.dtype)
        for _ in range(self.steps):
            mean = (state * own).sum(dim=1, keepdim=True) / own.sum(dim=1, keepdim=True)
            state = state + self.body(state + mean)
        return self.head(state)


class Halting(Looped):
    """More steps for wider batches."""

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, T) to (B, T, 300)."""
        state = self.embed(input_ids)
        for _ in range(2 + input_ids.shape[1] // 20):
            state = state + self.body(state)
        return self.head(state)


class HaltingTokens(Looped):
    """Each token runs until its own halt; that of padding is the last, and changes no other."""

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, T) to (B, T, 300)."""
        state = self.embed(input_ids)
        need = torch.where(input_ids == 256, 5, 3)
        for step in range(int(need.max())):
            running = (need > step)[..., None]
            state = torch.where(running, state + self.body(state), state)
        return self.head(state)


class Drawing(Looped):
    """Starts from noise."""

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, T) to (B, T, 300)."""
        state = self.embed(input_ids)
        state = state + 0.1 * torch.randn_like(state)
        for _ in range(self.steps):
            state = state + self.body(state)
        return self.head(state)


def sketch(
    run: RunDirectory,
    model: Callable[[], nn.Module],
    options: SketchOptions = OPTIONS,
    loss: Any = sdi.causal_lm_loss,
    loop: LoopOptions = LOOP,
) -> dict[str, Any]:
    """What the manifest has of each checkpoint's check of padding."""
    given = checkpoints(run.path.parent)
    sketch_run(run, model, loop, given, options=replace(options, loss=loss))
    return {name: check.get("padding") for name, check in run.manifest.self_check.items()}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """Rows of unequal lengths."""
    return make_run(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model", [Looped, MaskedAveraging])
def test_padding_that_changes_nothing_is_noted(
    run: RunDirectory, model: type[Looped], dtype: torch.dtype
) -> None:
    """The widths compared and the difference stand in the manifest, for each checkpoint."""
    found = sketch(run, lambda: model().to(dtype))
    lengths = run.example_set("train").lengths
    assert set(found) == {"early", "late"}
    for noted in found.values():
        assert noted["widths"] == [min(lengths), max(lengths)]
        assert noted["loss"] <= (1e-5 if dtype == torch.float32 else 1e-2)
        assert noted["sketch"] <= (1e-4 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_reads_padding_is_refused(run: RunDirectory, dtype: torch.dtype) -> None:
    """The rows of a batch do not mix, so that per-row autograd agrees; yet nothing is stored."""
    with pytest.raises(SelfCheckError, match=r"row 'r\d+' of \d+ tokens has, padded to \d+,"):
        sketch(run, lambda: Averaging().to(dtype))
    assert not run.manifest.shards


def test_a_depth_that_depends_on_padding_is_refused(run: RunDirectory) -> None:
    """The steps of a row alone and padded are both named."""
    with pytest.raises(SelfCheckError, match=r"it runs 2 and 3 steps alone and padded"):
        sketch(run, Halting)


def test_steps_that_padding_adds_may_be_zero(run: RunDirectory) -> None:
    """Tokens that halt by themselves are not moved by padding that halts later."""
    found = sketch(run, HaltingTokens)
    assert run.example_set("train").pad_id == 256
    assert run.manifest.steps == ("1", "2", "3", "4", "5")
    assert all(noted["sketch"] < 1e-4 for noted in found.values())


def test_a_negative_loss_is_compared_too(run: RunDirectory) -> None:
    """A reward, or a loss that is shifted, says as much of padding as any other."""
    with pytest.raises(SelfCheckError, match="reads padding"):
        sketch(run, Averaging, loss=lambda model, batch: sdi.causal_lm_loss(model, batch) - 20)


def test_rows_that_are_never_padded_need_not_agree(run: RunDirectory, tmp_path: Path) -> None:
    """Each row in a batch of its own, or all of one length: there is no padding to read."""
    assert sketch(run, Averaging, replace(OPTIONS, budget_tokens=1)) == {
        "early": None,
        "late": None,
    }
    equal = RunDirectory.create(tmp_path / "equal" / "run")
    lines = "".join(f'{{"id": "r{n}", "text": "text {n}"}}\n' for n in range(9))
    (tmp_path / "equal.jsonl").write_text(lines)
    add_texts(equal, "train", tmp_path / "equal.jsonl")
    assert sketch(equal, Averaging) == {"early": None, "late": None}


def test_random_numbers_of_the_row_are_those_of_the_padded_row(run: RunDirectory) -> None:
    """A random initial state is compared too, where it is a function of the row."""
    found = sketch(run, Drawing, loop=replace(LOOP, seeded_rows=True))
    assert all(noted["loss"] < 1e-5 and noted["sketch"] < 1e-4 for noted in found.values())


def test_rows_without_a_loss_worth_speaking_of_are_not_compared_by_their_gradient(
    run: RunDirectory, tmp_path: Path
) -> None:
    """Where the loss is next to nothing its gradient is rounding, and says nothing of padding."""

    def rounding(model: nn.Module, batch: Any) -> Tensor:
        losses = sdi.causal_lm_loss(model, batch)
        return losses * 1e-7 * batch["input_ids"].shape[1]

    add_texts(run, "more", write_texts(tmp_path / "more.jsonl", 3))
    found = sketch(run, Looped, loss=rounding)
    assert all(noted["sketch"] is None and noted["loss"] > 0 for noted in found.values())


MODELS = '''
from types import SimpleNamespace

import torch
from tests.test_startcheck import Averaging, MaskedAveraging


class Fixed(MaskedAveraging):
    def forward(self, input_ids, attention_mask):
        if input_ids.shape[1] != 16:
            raise ValueError("rows have sixteen tokens")
        return super().forward(input_ids, attention_mask)


class Own(Averaging):
    """Tells padding by its id."""

    config = SimpleNamespace(pad_token_id=7, vocab_size=256)

    def forward(self, input_ids):
        state, own = self.embed(input_ids), (input_ids != 7)[..., None].float()
        for _ in range(self.steps):
            state = state + self.body(state + (state * own).sum(1, True) / own.sum(1, True))
        return self.head(state)


def build(kind):
    torch.manual_seed(0)
    return {"reads": Averaging, "obeys": MaskedAveraging, "fixed": Fixed, "own": Own}[kind]()
'''


@pytest.mark.parametrize(
    ("kind", "verdict", "said"),
    [
        ("reads", "refused", "the model or its loss reads padding"),
        ("obeys", "ok", "a row of 8 and padded to 16 tokens differs by"),
        ("own", "ok", "a row of 8 and padded to 16 tokens differs by"),
        ("fixed", "note", "cannot read half a row: rows have sixteen tokens"),
    ],
)
def test_the_doctor_looks_at_padding(tmp_path: Path, kind: str, verdict: str, said: str) -> None:
    """Before anything is trained or sketched; what reads rows of one width only is let through."""
    (tmp_path / "models.py").write_text(MODELS)
    source, arguments = f"{tmp_path / 'models.py'}:build", (f"kind={kind}",)
    found = examine(Request(source, ("body",), arguments=arguments, trust_code=True))
    noted = {finding.check: finding for finding in found.findings}
    if verdict == "refused":
        assert said in found.verdict
    else:
        assert noted["padding"].verdict == verdict
        assert said in noted["padding"].detail
        assert found.refused is None


def test_the_doctor_needs_no_target_in_the_half_that_it_pads(tmp_path: Path) -> None:
    """A prompt without targets may be the first half of a row."""
    (tmp_path / "models.py").write_text(MODELS)
    row = f'{{"input_ids": {list(range(10, 30))}, "labels": {[-100] * 15 + list(range(25, 30))}}}\n'
    (tmp_path / "rows.jsonl").write_text(row + row.replace("[10,", "[9,"))
    source, data = f"{tmp_path / 'models.py'}:build", str(tmp_path / "rows.jsonl")
    request = Request(source, ("body",), arguments=("kind=obeys",), trust_code=True, data=data)
    found = examine(request)
    assert found.refused is None
    assert "ok" in {finding.verdict for finding in found.findings if finding.check == "padding"}
