"""The budget of a run: found, kept, and lowered only where memory is short."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sdi
from curate import budget, sizing
from curate.errors import CurateError
from curate.manifest import Manifest
from curate.memory import peak_of
from curate.rundir import RunDirectory
from curate.sketching import Instruments, SketchOptions, sketch_run
from tests.loopedrun import LOOP, OPTIONS, Looped, add_texts, checkpoints, factory, write_texts

FREELY = replace(OPTIONS, budget_tokens=None)
CPU = torch.device("cpu")


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run with 17 training rows, the longest of 30 tokens."""
    return make_run(tmp_path)


def make_run(directory: Path) -> RunDirectory:
    """A run in `directory`/run, and its checkpoints beside it."""
    directory.mkdir(exist_ok=True)
    run = RunDirectory.create(directory / "run")
    add_texts(run, "train", write_texts(directory / "train.jsonl", 17))
    return run


def sketch(run: RunDirectory, options: SketchOptions = FREELY, **keywords: Any) -> Manifest:
    """Sketch the run at the checkpoints beside it; its manifest then."""
    made = keywords.pop("factory", factory)
    given = checkpoints(run.path.parent)
    sketch_run(run, made, LOOP, given, options=options, **keywords)
    return run.manifest


def digests(run: RunDirectory) -> dict[str, str]:
    """Every sketch file that the manifest lists, with its checksum."""
    return {str(p.relative_to(run.path)): d for p, d in run.listed() if "sketches" in p.parts}


def details(run: RunDirectory) -> dict[str, Any]:
    """What the manifest says of the batches."""
    found: dict[str, Any] = run.manifest.details[sizing.DETAILS]
    return found


def test_a_budget_is_found_and_kept(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found once, it stands in the manifest with its reasons; a later call looks for none."""
    found = sketch(run).batch_budget
    assert found in dict(details(run)["rates"])
    assert details(run)["need"]["where"] == "cpu float32"

    def never(*arguments: Any, **keywords: Any) -> None:
        raise AssertionError("looked for again")

    monkeypatch.setattr(sizing, "find", never)
    monkeypatch.setattr(sizing, "measure", never)
    add_texts(run, "train", write_texts(run.path.parent / "train.jsonl", 20))
    assert sketch(run, replace(OPTIONS, budget_tokens=1)).batch_budget == found
    asked = make_run(run.path.parent / "asked")
    monkeypatch.undo()
    sketch(asked, replace(OPTIONS, budget_tokens=found))
    add_texts(asked, "train", write_texts(run.path.parent / "train.jsonl", 20))
    sketch(asked)
    assert digests(run) == digests(asked)


def test_what_is_foretold_is_what_a_batch_takes(run: RunDirectory) -> None:
    """What was measured on two rows is within a quarter of what 16 rows take in a real pass."""
    sketch(run)
    rows = sizing.rows_of({"train": run.example_set("train")}, 17, 2)
    model = factory()
    sketcher = sdi.Sketcher(sdi.Loop(model, "body"), dim=64)
    what = sizing.Sizing(run, sketcher, rows, CPU, model)
    need = budget.measure(what._pass, rows, CPU, what.held)
    for length in (rows.lengths[-1], rows.lengths[0]):
        batch = rows.batch(16, length)
        taken = peak_of(lambda batch=batch: what._pass(batch), CPU, what.held)  # type: ignore[misc]
        assert taken <= need.of(16, length) <= 1.25 * taken


class _Limited(sdi.Sketcher):
    """A sketcher on a device that has room for `room` padded tokens."""

    room = 10**9

    def __call__(self, batch: dict[str, Tensor], ids: Sequence[str]) -> sdi.Part:
        if batch["input_ids"].numel() > self.room:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return super().__call__(batch, ids)


def _limited(room: int) -> Instruments:
    return Instruments(sketcher=type("Limited", (_Limited,), {"room": room}))


def test_where_memory_runs_out_the_budget_is_halved(run: RunDirectory, tmp_path: Path) -> None:
    """The shard is begun again with half, which is said and kept: as if it had been asked for."""
    wide = replace(OPTIONS, budget_tokens=200)
    with pytest.warns(UserWarning, match=r"100 padded tokens from here on, not 200: memory ran"):
        manifest = sketch(run, wide, instruments=_limited(150))
    assert manifest.batch_budget == 100
    assert "lowered" in details(run)
    asked = make_run(tmp_path / "asked")
    sketch(asked, replace(OPTIONS, budget_tokens=100))
    assert digests(run) == digests(asked)


def test_one_row_that_runs_out_ends_the_run(run: RunDirectory, tmp_path: Path) -> None:
    """Where the batch was one row, nothing is left to halve: one line says what to do."""
    sketch_run(run, factory, LOOP, checkpoints(tmp_path, ("early",)), options=OPTIONS)
    whole = run.manifest.shards
    longest = int(run.example_set("train").lengths.max())
    expected = rf"ran out on cpu with one row of {longest} tokens .*CUDA out of memory.*max_tokens"
    with (
        pytest.warns(UserWarning, match="memory ran out"),
        pytest.raises(CurateError, match=expected),
    ):
        sketch(run, instruments=_limited(longest - 1))
    assert run.manifest.shards[: len(whole)] == whole


def test_less_free_memory_lowers_the_budget(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run continued with less memory takes smaller batches, or says why it cannot."""
    sketch_run(run, factory, LOOP, checkpoints(tmp_path, ("early",)), options=OPTIONS)
    need = budget.Need("cpu float32", 0, (1, 1000), (100, 100_000))
    noted = {**run.manifest.details, sizing.DETAILS: {"need": asdict(need)}}
    run.note(details=noted)
    monkeypatch.setattr(sizing, "available", lambda _: 20 * 100)
    with pytest.raises(CurateError, match=r"one row of \d+ tokens needs .*Free memory"):
        sketch(run)
    longest = int(run.example_set("train").lengths.max())
    monkeypatch.setattr(sizing, "available", lambda _: 101 * longest)
    with pytest.warns(UserWarning, match=f"have {longest} padded tokens from here on, not 96"):
        assert sketch(run).batch_budget == longest


def test_a_budget_that_cannot_fit_is_refused_before_the_run(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A budget of the recipe's own is held against free memory, and nothing is sketched."""
    monkeypatch.setattr(budget, "available", lambda _: 300_000)
    with pytest.raises(CurateError, match=r"batches of 4000 padded tokens need .*at most \d+"):
        sketch(run, replace(OPTIONS, budget_tokens=4000))
    assert not run.manifest.shards


class _Drawing(Looped):
    """A model whose state begins with random numbers."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids) + torch.rand(1) * 0


def test_timings_do_not_decide_for_a_model_that_draws(run: RunDirectory) -> None:
    """What a model draws depends on the batch, so its budget is the same in every run."""

    def drawing() -> nn.Module:
        torch.manual_seed(0)
        return _Drawing()

    manifest = sketch(run, replace(FREELY, check_rows=0), factory=drawing)
    assert manifest.batch_budget == min(budget.DEFAULT, details(run)["tokens"])
    assert details(run)["rates"] == []


def test_rows_without_a_finite_loss_are_left_to_the_run(run: RunDirectory) -> None:
    """NaN in the longest rows measures nothing; the default is taken and the run names the row."""

    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return sdi.causal_lm_loss(model, batch) / (batch["input_ids"].shape[1] < 20)

    with pytest.raises(sdi.errors.LossError, match="r"):
        sketch(run, replace(FREELY, loss=loss))
    assert run.manifest.batch_budget == budget.DEFAULT
