"""The budget of a run: found, kept, and lowered only where memory is short."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import sdi
from curate import budget, sizing
from curate.errors import CurateError
from curate.examples import load_examples
from curate.manifest import Manifest
from curate.memory import peak_of
from curate.rundir import RunDirectory
from curate.sketching import Instruments, SketchOptions, sketch_run
from curate.sources import DataSpec
from tests.loopedrun import (
    LOOP,
    OPTIONS,
    Looped,
    add_texts,
    checkpoints,
    factory,
    make_run,
    write_texts,
)

FREELY = replace(OPTIONS, budget_tokens=None)
CPU = torch.device("cpu")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """No run is small, and nothing is plenty: the budget is measured and timed."""
    monkeypatch.setattr(sizing, "SMALL", 0)
    monkeypatch.setattr(sizing.Sizing, "_plenty", lambda *_: False)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run with 17 training rows, the longest of 30 tokens."""
    return make_run(tmp_path, queries=0)


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


@pytest.mark.usefixtures("measured")
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
    asked = make_run(run.path.parent / "asked", queries=0)
    monkeypatch.undo()
    sketch(asked, replace(OPTIONS, budget_tokens=found))
    add_texts(asked, "train", write_texts(run.path.parent / "train.jsonl", 20))
    sketch(asked)
    assert digests(run) == digests(asked)


@pytest.mark.parametrize("method", ["outer", "fourier"])
@pytest.mark.parametrize("limit", [1 << 12, 1 << 20, 64 << 20])
def test_what_is_foretold_is_what_a_batch_takes(
    run: RunDirectory, method: str, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few rows tell what 64 take in a real pass, whether their buffers are full or not."""
    sketch(run)
    monkeypatch.setattr(sizing, "LIMIT", limit)
    model = Looped(width=256)
    loop = sdi.Loop(model, "body")

    def made(limit: int = limit) -> sdi.Sketcher:
        return sdi.Sketcher(loop, dim=64, method=method, limit=limit)  # type: ignore[arg-type]

    rows = sizing.rows_of({"train": run.example_set("train")}, 17, 2)
    what = sizing.Sizing(run, made, rows, CPU, model)
    need = what._measured()
    what._pass(rows.batch(1, rows.lengths[0]))  # makes the hashes
    for length in (rows.lengths[-1], rows.lengths[0]):
        for count in (1, 2, 64):
            batch = rows.batch(count, length)
            taken = peak_of(lambda batch=batch: what._pass(batch), CPU, what.held)  # type: ignore[misc]
            assert 0.9 * taken <= need.of(count, length) <= 1.15 * taken + need.buffers


class _Counted(sdi.Sketcher):
    """A sketcher that counts the rows of its passes."""

    seen: ClassVar[list[int]] = []

    def __call__(self, batch: dict[str, Tensor], ids: Sequence[str]) -> sdi.Part:
        self.seen.append(len(ids))
        return super().__call__(batch, ids)


@pytest.mark.parametrize("budget_tokens", [None, 96])
def test_a_small_run_begins_at_once(run: RunDirectory, budget_tokens: int | None) -> None:
    """Where memory is plenty and little is to be won, two passes of one row come before the check.

    That is so of a run of few tokens, and of any run whose budget was asked for.
    """

    def stop(*arguments: Any, **keywords: Any) -> None:
        raise sdi.errors.SelfCheckError("far enough")

    _Counted.seen.clear()
    with pytest.raises(sdi.errors.SelfCheckError, match="far enough"):
        sketch(
            run,
            replace(OPTIONS, budget_tokens=budget_tokens),
            instruments=Instruments(sketcher=_Counted, check=stop),
        )
    assert _Counted.seen == [1, 1]
    assert run.manifest.batch_budget == (budget_tokens or budget.DEFAULT)


class _Packed(Looped):
    """A model that takes rows of whole blocks of 16 tokens, and no others."""

    def forward(self, input_ids: Tensor) -> Tensor:
        blocks = input_ids.view(input_ids.shape[0], input_ids.shape[1] // 16, 16)
        return super().forward(blocks.flatten(1))


def packed() -> nn.Module:
    """The model, with the weights of the tests' other."""
    torch.manual_seed(0)
    return _Packed()


def _needs_an_answer(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """A user's loss that raises an error of its own for a row without a last token "!"."""
    if not bool((batch["labels"] == ord("!")).any(dim=1).all()):
        raise ValueError("this row has no answer")
    return sdi.causal_lm_loss(model, batch)


@pytest.mark.parametrize("budget_tokens", [None, 96])
@pytest.mark.parametrize("case", ["packed", "answers"])
@pytest.mark.usefixtures("measured")
def test_models_and_losses_that_take_whole_rows_only(
    tmp_path: Path, case: str, budget_tokens: int | None
) -> None:
    """Rows are tried as they are, so that what the run itself can sketch does not end it before."""
    run = RunDirectory.create(tmp_path / "run")
    file = tmp_path / "rows.jsonl"
    texts = [f"{n:06} " * 8 if case == "packed" else "1 + " * (n % 5) + "1!" for n in range(9)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    most = {"max_tokens": 32} if case == "packed" else {}
    spec = DataSpec.of({"path": str(file), "text": "text", **most})
    run.add_set(load_examples(spec, run.stage("train"), name="train"))
    if case == "packed":
        assert set(run.example_set("train").lengths.tolist()) == {32}
        manifest = sketch(run, replace(OPTIONS, budget_tokens=budget_tokens), factory=packed)
    else:
        given = replace(OPTIONS, budget_tokens=budget_tokens, loss=_needs_an_answer)
        manifest = sketch(run, given)
    assert manifest.shards
    if budget_tokens is None:
        assert manifest.batch_budget in dict(details(run)["rates"])


class _Limited(sdi.Sketcher):
    """A sketcher on a device that has room for `room` padded tokens."""

    room = 10**9

    def __call__(self, batch: dict[str, Tensor], ids: Sequence[str]) -> sdi.Part:
        if batch["input_ids"].numel() > self.room:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return super().__call__(batch, ids)


def _limited(room: int) -> Instruments:
    return Instruments(sketcher=type("Limited", (_Limited,), {"room": room}))


@pytest.mark.parametrize("budget_tokens", [None, 96])
@pytest.mark.parametrize("shortest", [True, False])
@pytest.mark.usefixtures("measured")
def test_memory_that_ends_at_the_first_passes_is_told(
    run: RunDirectory, budget_tokens: int | None, shortest: bool
) -> None:
    """The row that tells the depth, and those that tell the memory, end in one clear line."""
    lengths = run.example_set("train").lengths
    length = int(lengths.min() if shortest else lengths.max())
    with pytest.raises(CurateError, match=rf"with one row of {length} tokens .*CUDA out of memory"):
        sketch(
            run,
            replace(OPTIONS, budget_tokens=budget_tokens if shortest else None),
            instruments=_limited(length - 1),
        )
    assert not run.manifest.shards


def test_where_memory_runs_out_the_budget_is_halved(run: RunDirectory, tmp_path: Path) -> None:
    """The shard is begun again with half, which is said and kept: as if it had been asked for."""
    wide = replace(OPTIONS, budget_tokens=200)
    with pytest.warns(UserWarning, match=r"100 padded tokens from here on, not 200: memory ran"):
        manifest = sketch(run, wide, instruments=_limited(150))
    assert manifest.batch_budget == 100
    assert "lowered" in details(run)
    asked = make_run(tmp_path / "asked", queries=0)
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
    """A budget of the recipe's own is tried against free memory, and nothing is sketched."""
    for module in (budget, sizing):
        monkeypatch.setattr(module, "available", lambda _: 200_000)
    with pytest.raises(CurateError, match=r"7 rows of 36 tokens.*budget_tokens = 4000 .*smaller"):
        sketch(run, replace(OPTIONS, budget_tokens=4000))
    assert not run.manifest.shards
    sketch(run, replace(OPTIONS, budget_tokens=36))
    assert run.manifest.shards


@pytest.mark.usefixtures("measured")
def test_a_run_without_a_measure_is_measured_when_it_goes_on(run: RunDirectory) -> None:
    """A budget that was asked for is held against memory, once, where a run is continued."""
    sketch_run(run, factory, LOOP, checkpoints(run.path.parent, ("early",)), options=OPTIONS)
    assert "need" not in details(run)
    assert sketch(run).batch_budget == OPTIONS.budget_tokens
    assert details(run)["need"]["where"] == "cpu float32"


class _Drawing(Looped):
    """A model whose state begins with random numbers."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids) + torch.rand(1) * 0


@pytest.mark.usefixtures("measured")
def test_timings_do_not_decide_for_a_model_that_draws(run: RunDirectory) -> None:
    """What a model draws depends on the batch, so its budget is the same in every run."""

    def drawing() -> nn.Module:
        torch.manual_seed(0)
        return _Drawing()

    manifest = sketch(run, replace(FREELY, check_rows=0), factory=drawing)
    assert manifest.batch_budget == min(budget.DEFAULT, details(run)["tokens"])
    assert details(run)["rates"] == []


@pytest.mark.parametrize("budget_tokens", [None, 96])
@pytest.mark.usefixtures("measured")
def test_an_error_of_a_row_is_left_to_the_run(run: RunDirectory, budget_tokens: int | None) -> None:
    """Whatever a loss raises for the longest row comes from the run, when it gets there."""
    longest = int(run.example_set("train").lengths.max())
    raised = []

    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        if batch["input_ids"].shape[1] == longest:
            raised.append(len(run.manifest.details))
            raise KeyError("no such row")
        return sdi.causal_lm_loss(model, batch)

    with pytest.raises(KeyError, match="no such row"):
        sketch(run, replace(OPTIONS, loss=loss, budget_tokens=budget_tokens))
    assert raised[0] == 0  # tried before the budget was noted, and passed over
    assert raised[-1] == 1
    assert run.manifest.batch_budget == (budget_tokens or budget.DEFAULT)


@pytest.mark.usefixtures("measured")
def test_rows_without_a_finite_loss_are_left_to_the_run(run: RunDirectory) -> None:
    """NaN in the longest rows measures nothing; the default is taken and the run names the row."""

    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return sdi.causal_lm_loss(model, batch) / (batch["input_ids"].shape[1] < 20)

    with pytest.raises(sdi.errors.LossError, match="r"):
        sketch(run, replace(FREELY, loss=loss))
    assert run.manifest.batch_budget == budget.DEFAULT
