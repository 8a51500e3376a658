"""Sketching a run: every row once, only what is missing, and the same numbers however it went."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal
from torch import Tensor, nn

import sdi
from curate.errors import CurateError
from curate.manifest import Manifest
from curate.rank import rank
from curate.rundir import RunDirectory
from curate.scores import score_run
from curate.shardplan import shard_rows, stored_kinds, tasks
from curate.sketching import Instruments, LoopOptions, SketchOptions, SketchReport, sketch_run
from sdi.errors import LossError, SdiError
from tests.loopedrun import LOOP, OPTIONS, add_texts, checkpoints, factory, make_run, write_texts

ROOT = Path(__file__).parent.parent


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run with 17 training rows and 4 query rows."""
    return make_run(tmp_path)


def sketch(run: RunDirectory, options: SketchOptions = OPTIONS, **keywords: Any) -> SketchReport:
    """Sketch the run at the two checkpoints beside it."""
    given = checkpoints(run.path.parent)
    return sketch_run(run, factory, LOOP, given, options=options, **keywords)


def digests(run: RunDirectory) -> dict[str, str]:
    """Every sketch file that the manifest lists, with its checksum."""
    return {str(p.relative_to(run.path)): d for p, d in run.listed() if "sketches" in p.parts}


def stacked(run: RunDirectory, name: str, checkpoint: str, kind: str) -> np.ndarray:
    """All vectors of a set at a checkpoint, float32."""
    return np.concatenate([s.block() for _, _, s in run.shards(name, checkpoint, kind)])


def test_every_row_is_sketched_at_its_place(run: RunDirectory) -> None:
    """What is on disk at `row` is the sketch of that row, taken alone, to int8's rounding."""
    report = sketch(run)
    assert report.rows == {"train": 34, "test": 8}
    assert run.verify() > 0
    examples = run.example_set("train")
    model = factory()
    given = checkpoints(run.path.parent)
    for checkpoint in given:
        sdi.checkpoints.load_weights(model, checkpoint.path)
        sketcher = sdi.Sketcher(sdi.Loop(model, "body"), dim=64, checkpoint=checkpoint.name)
        steps = stacked(run, "train", checkpoint.name, "steps")
        totals = stacked(run, "train", checkpoint.name, "totals")
        for row in range(17):
            ids, labels = (torch.tensor(a)[None].long() for a in examples.tokens(row))
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
            part = sketcher(batch, ids=["one"])
            largest = part.values.abs().max().item()
            assert np.abs(steps[row] - part.values[0].numpy()).max() < largest / 200
            assert np.abs(totals[row] - part.totals[0].numpy()).max() < largest * 3 / 200
            loss = run.losses("train")[checkpoint.name][row]
            assert loss == pytest.approx(part.losses.item(), rel=1e-4)


def test_manifest_records_what_was_done(run: RunDirectory) -> None:
    """Steps, spec, coverage, self-checks, budget and row ranges stand in the manifest."""
    sketch(run)
    manifest = run.manifest
    assert manifest.steps == ("1", "2", "3")
    assert manifest.sketch is not None
    assert manifest.sketch.dim == 64
    assert manifest.loop is not None
    assert manifest.loop.coverage["share"] == 1
    assert manifest.loop.coverage["rules"]
    assert set(manifest.self_check) == {"early", "late"}
    assert manifest.weights == {"early": 0.1, "late": 0.2}
    assert (manifest.batch_budget, manifest.shard_rows) == (96, 7)
    ranges = [(a, b) for a, b, _ in run.shards("train", "late", "steps")]
    assert ranges == [(0, 7), (7, 14), (14, 17)]
    table = run.examples("train").collect()
    assert table["steps"].to_list() == [3] * 17
    assert table["loss"].to_list() == run.losses("train")["late"].to_list()


def test_nothing_is_done_twice(run: RunDirectory) -> None:
    """A second call finds nothing missing, loads no checkpoint and changes no file."""
    sketch(run)
    before = run.manifest
    assert sketch(run).shards == 0
    assert run.manifest == before


def test_only_what_is_missing(run: RunDirectory, tmp_path: Path) -> None:
    """New rows, a new set and a new checkpoint are sketched; what was there stays untouched."""
    sketch(run)
    before = digests(run)
    add_texts(run, "train", write_texts(tmp_path / "train.jsonl", 20))
    add_texts(run, "more", write_texts(tmp_path / "more.jsonl", 3), "query")
    assert sketch(run).rows == {"train": 6, "more": 6}
    three = checkpoints(tmp_path, ("early", "late", "last"))
    report = sketch_run(run, factory, LOOP, three, options=OPTIONS)
    assert report.rows == {"train": 20, "test": 4, "more": 3}
    assert before.items() <= digests(run).items()
    assert list(run.manifest.weights) == ["early", "late", "last"]
    assert stacked(run, "train", "late", "totals").shape == (20, 64)


def test_unfinished_sets_are_not_read_as_whole(run: RunDirectory, tmp_path: Path) -> None:
    """A reader of a set that has rows without sketches is told how many, not given fewer."""
    sketch(run)
    add_texts(run, "train", write_texts(tmp_path / "train.jsonl", 20))
    with pytest.raises(CurateError, match="17 of the 20 rows of set 'train' have totals"):
        run.shards("train", "late", "totals")
    assert len(run.shards("train", "late", "totals", partial=True)) == 3
    table = run.examples("train").collect()
    assert table["loss"].null_count() == table["steps"].null_count() == 3


def test_losses_of_some_rows_are_read_from_their_shards(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever wants a few rows is given theirs, and the other shards are left alone."""
    sketch(run)
    first, last = min(shard.rows for shard in run.manifest.find_shards("train", "late", "rows"))
    whole = run.examples("train").collect()
    read: list[str] = []
    load = np.load

    def noted(path: Path, **more: Any) -> Any:
        read.append(Path(path).name)
        return load(path, **more)

    monkeypatch.setattr(np, "load", noted)
    rows = [last - 1, first]
    found = run.examples("train", rows).filter(pl.col("row").is_in(rows)).collect()
    assert set(read) == {"loss-00000.npy", "depth-00000.npy"}
    assert_frame_equal(found, whole.filter(pl.col("row").is_in(rows)))
    read.clear()
    assert run.examples("train", ()).collect_schema() == whole.schema
    assert not read


def test_ranked_rows_come_with_their_losses(run: RunDirectory) -> None:
    """The best few are those of a ranking of all, whatever columns go by the losses."""
    sketch(run)
    score_run(run, "test")
    middle = run.examples("train").select(pl.col("loss").median()).collect().item()
    for by, where in (
        ("total", None),
        ("loss", None),
        ("total - loss", None),
        ("total", f"loss > {middle}"),
        ("steps * total", "steps > 0"),
    ):
        best, every = (rank(run, by=by, where=where, top=top) for top in (3, None))
        assert_frame_equal(best, every.head(3))
        assert best.height == 3
        assert best["loss"].null_count() == best["steps"].null_count() == 0


def test_totals_alone_then_steps(run: RunDirectory) -> None:
    """store="totals" keeps no steps of training rows; asking for steps later adds them."""
    sketch(run, replace(OPTIONS, store="totals"))
    assert not run.manifest.find_kind("train", "steps")
    assert run.manifest.find_kind("test", "steps")
    before = digests(run)
    sketch(run)
    assert run.shards("train", "late", "steps")
    assert before.items() <= digests(run).items()


def test_the_budget_of_the_first_call_stays(run: RunDirectory) -> None:
    """Batches are a function of the manifest: another budget later changes nothing."""
    first = checkpoints(run.path.parent, ("early",))
    sketch_run(run, factory, LOOP, first, options=OPTIONS)
    sketch(run, replace(OPTIONS, budget_tokens=10_000, shard_rows=3))
    whole = make_run(run.path.parent / "whole")
    sketch(whole)
    assert digests(run) == digests(whole)


def test_another_batch_size_gives_the_same_sketches(run: RunDirectory) -> None:
    """Batch and shard sizes change the stored sketches by no more than one int8 step."""
    sketch(run)
    other = make_run(run.path.parent / "other")
    sketch(other, replace(OPTIONS, budget_tokens=10_000, shard_rows=100))
    for kind in ("steps", "totals"):
        ours, theirs = (stacked(r, "train", "late", kind) for r in (run, other))
        assert np.abs(ours - theirs).max() <= np.abs(ours).max() / 100


def test_another_spec_is_refused(run: RunDirectory) -> None:
    """Another dimension or another checkpoint under the same name is refused by both values."""
    sketch(run)
    before = run.manifest
    with pytest.raises(CurateError, match=r"sketch\.dim = 64, not 32"):
        sketch(run, replace(OPTIONS, dim=32))
    given = checkpoints(run.path.parent)
    swapped = [replace(given[0], path=given[1].path), given[1]]
    with pytest.raises(CurateError, match="checkpoint 'early' = "):
        sketch_run(run, factory, LOOP, swapped, options=OPTIONS)
    assert run.manifest == before


def test_untied_models_keep_steps_only(tmp_path: Path) -> None:
    """Layers as steps: the store has no totals, which would be of no use."""
    run = make_run(tmp_path)
    loop = LoopOptions(body=("body.0", "body.2"), tied=False)
    sketch_run(run, factory_once, loop, checkpoints(tmp_path), options=OPTIONS)
    assert {shard.kind for shard in run.manifest.shards} == {"steps", "rows"}
    assert stacked(run, "train", "late", "steps").shape == (17, 2, 64)


def factory_once() -> nn.Module:
    """The model of the tests, its body used once."""
    model = factory()
    model.steps = 1
    return model


def test_index_outside_the_model(run: RunDirectory) -> None:
    """A token that the model has no entry for gives one line: the row and what to look at."""

    def small() -> nn.Module:
        model = factory()
        model.embed.register_forward_pre_hook(_out_of_range)
        return model

    with pytest.raises(CurateError, match=r"no entry for a token or a position.*max_tokens"):
        sketch_run(run, small, LOOP, checkpoints(run.path.parent), options=OPTIONS)


def _out_of_range(module: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
    return (given[0] + 1000,)


def test_losses_that_are_not_finite_are_named(run: RunDirectory) -> None:
    """NaN losses stop the run and name the row; the shards before it are kept."""

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        losses = sdi.causal_lm_loss(model, batch)
        worst = (batch["input_ids"] == ord("9")).any(dim=1) & (losses > 0)
        return torch.where(worst, torch.nan, losses)

    with pytest.raises(LossError) as caught:
        sketch(run, replace(OPTIONS, loss=loss))
    assert caught.value.ids == ("r9",)
    assert [s.rows for s in run.manifest.find_shards("train", "early", "rows")] == [(0, 7)]


def test_a_failed_check_stops_the_run(run: RunDirectory) -> None:
    """Where the self-check refuses, nothing is stored."""

    def refuse(*arguments: Any, **keywords: Any) -> Any:
        raise sdi.errors.SelfCheckError("body.0.weight is off by 0.5")

    with pytest.raises(SdiError, match="off by"):
        sketch(run, instruments=Instruments(check=refuse))
    assert not run.manifest.shards


@dataclass
class _Deepening:
    """A sketcher whose depth is the longest row's length modulo 3, plus 1."""

    loop: sdi.Loop
    dim: int
    keywords: dict[str, Any] = field(default_factory=dict)
    coverage: dict[str, Any] = field(default_factory=dict)
    repeated: int = 0

    @property
    def spec(self) -> dict[str, Any]:
        return {"version": 1, "seed": 0, "dim": self.dim}

    def __call__(self, batch: dict[str, Tensor], ids: Sequence[str]) -> sdi.Part:
        depth = batch["input_ids"].shape[1] % 3 + 1
        values = torch.ones(len(ids), depth, self.dim)
        labels = tuple(str(step + 1) for step in range(depth))
        self.repeated += len(ids)
        return sdi.Part(tuple(ids), values, values.norm(dim=2), labels, torch.ones(len(ids)))


def test_depth_may_vary(run: RunDirectory) -> None:
    """τ is the largest of the shard; absent steps have norm 0, and each row has its depth."""

    def make(loop: sdi.Loop, dim: int, **keywords: Any) -> _Deepening:
        return _Deepening(loop, dim, keywords)

    options = replace(OPTIONS, check_rows=0, budget_tokens=1)
    report = sketch(run, options, instruments=Instruments(make))
    assert report.repeated == sum(report.rows.values()) > 0  # the trial that fixed the plan aside
    depths = run.depths("train")
    assert depths.tolist() == [n % 3 + 1 for n in run.example_set("train").lengths]
    assert len(set(depths.tolist())) > 1
    for first, last, shard in run.shards("train", "late", "steps"):
        present = shard.norm > 0
        assert (present.sum(axis=1) == depths[first:last]).all()
        assert shard.values.shape[1] == depths[first:last].max()
    assert len(run.manifest.steps) == depths.max()


def test_progress_counts_every_token_once(run: RunDirectory) -> None:
    """Progress ends at the total, and a resumed call starts from what was done."""
    seen: list[tuple[int, int]] = []
    sketch(run, progress=lambda _, done, total: seen.append((done, total)))
    lengths = [run.example_set(name).lengths.sum() for name in ("train", "test")]
    assert seen[0] == (0, 2 * sum(lengths))
    assert seen[-1] == (2 * sum(lengths), 2 * sum(lengths))
    assert seen == sorted(seen)


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """Killed with SIGKILL around every rename and at random, a run ends with the same files."""
    whole, broken = make_run(tmp_path / "whole"), make_run(tmp_path / "broken")
    sketch(whole)
    checkpoints(tmp_path / "broken")
    command = [sys.executable, "-m", "tests.killedrun", str(tmp_path / "broken")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) >= 20
    assert digests(broken) == digests(whole)
    assert broken.verify() == whole.verify()
    assert not list(broken.path.rglob("*.partial"))
    assert broken.examples("train").collect().equals(whole.examples("train").collect())


def test_plan_covers_every_row_once() -> None:
    """Shards are contiguous, end at multiples of their size, and go on where a set ended."""
    manifest = Manifest.model_validate(
        {
            "created": "now",
            "sets": {"t": {"role": "train", "rows": 25, "fingerprint": "f"}},
            "shards": [
                {"set": "t", "checkpoint": "c", "kind": kind, "number": 0, "rows": [0, 4],
                 "steps": 2, "files": {}}
                for kind in ("rows", "totals")
            ],
        }
    )  # fmt: skip
    planned = tasks(manifest, "t", "c", ["totals"], 10)
    assert [(t.number, t.first, t.last) for t in planned] == [(1, 4, 10), (2, 10, 20), (3, 20, 25)]
    again = tasks(manifest, "t", "c", ["totals", "steps"], 10)
    assert (again[0].number, again[0].first, again[0].last) == (0, 0, 4)


def test_shard_size_is_bounded() -> None:
    """A shard's steps fit into 64 MiB, down to the fewest rows worth a file."""
    assert shard_rows(8, 1024) == 2048
    assert shard_rows(16, 8192) == 512
    assert shard_rows(1000, 100_000) == 64
    assert stored_kinds("train", tied=True, store="totals") == ("totals",)
    assert stored_kinds("query", tied=True, store="totals") == ("steps", "totals")
    assert stored_kinds("query", tied=False, store="steps") == ("steps",)


def test_levels_of_nested_cycles_are_steps(run: RunDirectory) -> None:
    """With roles a run records "cycle.role" labels, and its scores have a column for each."""
    roles = LoopOptions(body=("low=body.0", "high=body.2"))
    sketch_run(run, factory, roles, checkpoints(run.path.parent), options=OPTIONS)
    loop = run.manifest.loop
    assert loop is not None and loop.body == ("low=body.0", "high=body.2")
    assert loop.steps == tuple(f"{n}.{role}.1" for n in (1, 2, 3) for role in ("low", "high"))
    score_run(run, "test")
    frame = run.influence("test").collect()
    columns = [f"s{n:02d}" for n in range(1, 7)]
    np.testing.assert_allclose(
        frame.select(columns).to_numpy().sum(axis=1), frame["total"], rtol=1e-4, atol=1e-6
    )
    with pytest.raises(CurateError, match=r"loop\.body|model\.fingerprint"):
        sketch(run)
