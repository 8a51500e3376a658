"""What of a model is covered: in numbers, in the manifest, in `curate status`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from torch import Tensor, nn

import sdi
from curate import coverage, examtables
from curate.cli import main
from curate.errors import CurateError
from curate.recipe import Recipe
from curate.rundir import RunDirectory
from curate.sketching import LoopOptions, sketch_run
from curate.status import status
from sdi.coverage import _measuring, gradient_share, served
from sdi.errors import LoopError
from sdi.stepnorms import step_norms
from tests.looped import Block, make, names, tokens
from tests.loopedrun import OPTIONS, Looped, add_texts, checkpoints, factory, write_texts
from tests.test_cli import make as make_recipe

# -- the numbers ----------------------------------------------------------------------------------


def test_share_of_the_gradient_is_that_of_autograd() -> None:
    """Shares are ratios of squared norms, row by row, and the model is left as it was."""
    model = make().double()
    loop = sdi.Loop(model, "body", skip=["body.up.*", "body.gain"])
    batch, ids = tokens(3), names(3)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    found = gradient_share(loop, batch, ids, sdi.causal_lm_loss, rows=["r0", "r2"])
    assert bool((model.head.weight.grad == 1).all()) and model.body.raw.grad is None
    whole = inside = attributed = up = 0.0
    losses = sdi.causal_lm_loss(model, batch)
    for row in (0, 2):
        for name, parameter in model.named_parameters():
            (g,) = torch.autograd.grad(losses[row], parameter, retain_graph=True)
            square = float(g.square().sum())
            whole += square
            inside += square * name.startswith("body.")
            attributed += square * (name in loop.parameters())
            up += square * (name == "body.up.weight")
    assert found.rows == ("r0", "r2")
    assert found.of_model == pytest.approx(attributed / whole, rel=1e-9)
    assert found.of_body == pytest.approx(attributed / inside, rel=1e-9)
    assert found.skipped["body.up.weight"] == pytest.approx(up / inside, rel=1e-9)
    assert found.norms["body.up.weight"] == pytest.approx((up / 2) ** 0.5, rel=1e-9)


def test_only_one_gradient_is_held() -> None:
    """A gradient is dropped once it is measured: none is left when the backward pass ends."""
    model = make()
    named = dict(model.named_parameters())
    squares = dict.fromkeys(named, 0.0)
    with _measuring(named, squares):
        sdi.causal_lm_loss(model, tokens()).sum().backward()
        assert all(parameter.grad is None for parameter in named.values())
    assert min(squares.values()) > 0


def test_frozen_and_skipped_are_told_apart() -> None:
    """Frozen weights have no gradient to attribute; skipped ones have, and it is missing."""
    model = make()
    model.body.down.weight.requires_grad_(False)
    loop = sdi.Loop(model, "body", skip="body.norm1")
    seen = loop.coverage()
    assert seen["frozen"] == ["body.down.weight"]
    assert set(seen["skipped"]) == {"body.norm1.weight", "body.norm1.bias"}
    missing = (model.body.down.weight.numel() + 32) / seen["parameters"]
    assert seen["share"] == pytest.approx(1 - missing)
    whole = sum(p.numel() for p in model.parameters())
    assert seen["share_of_model"] == pytest.approx(seen["attributed"] / whole)
    found = gradient_share(loop, tokens(), names(4), sdi.causal_lm_loss)
    assert found.of_body == pytest.approx(1 - sum(found.skipped.values()))
    assert 0 < sum(found.skipped.values()) < 1
    with pytest.raises(LoopError, match="skip fewer"):
        sdi.Loop(model, "body", skip="*")


def test_skipping_changes_nothing_beside_it() -> None:
    """What is attributed has the same gradients with and without a skipped neighbour."""
    model, batch = make(), tokens()
    whole = sdi.ExactGradients(sdi.Loop(model, "body"))(batch, names(4))
    part = sdi.ExactGradients(sdi.Loop(model, "body", skip="body.attention.*"))(batch, names(4))
    assert not any("attention" in name for name in part.names)
    for name, at in part.names.items():
        assert torch.equal(part.values[..., at], whole.values[..., whole.names[name]])
    assert all(p.requires_grad for p in model.parameters())


def test_step_norms_are_those_of_exact_gradients() -> None:
    """Norms are root mean squares of exact step gradients, whatever the memory of a group."""
    loop, batch, ids = sdi.Loop(make(), "body"), tokens(), names(4)
    exact = sdi.ExactGradients(loop)(batch, ids)
    moved: list[tuple[int, int]] = []
    given = (loop, batch, ids, sdi.causal_lm_loss, 3)
    small = list(step_norms(*given, memory=1, progress=lambda *at: moved.append(at)))
    assert [row.norms for row in small] == [row.norms for row in step_norms(*given)]
    assert moved == [(place, len(small)) for place in range(len(small))]
    for row in small:
        values = exact.values[..., exact.names[row.name]].double()
        expected = values.square().sum(dim=2).mean(dim=0).sqrt()
        assert row.norms == pytest.approx(expected.tolist(), rel=1e-5)
        assert row.error < 1e-4


def test_rules_are_counted_in_parameters() -> None:
    """Every attributed parameter is counted once, under the rules that served it."""
    loop = sdi.Loop(make(), "body")
    sketcher = sdi.Sketcher(loop, dim=32)
    assert set(served(loop, sketcher.coverage["rules"])) == {"unused"}
    sketcher(tokens(), names(4))
    counts = served(loop, sketcher.coverage["rules"])
    assert "unused" not in counts and counts["linear"]["tensors"] >= 4
    assert sum(c["parameters"] for c in counts.values()) == loop.coverage()["attributed"]


def test_many_steps_are_grouped() -> None:
    """Steps that do not fit side by side are joined in order, each once, as a root of squares."""
    assert [list(span) for span in examtables.grouped(3, 12)] == [[0], [1], [2]]
    spans = examtables.grouped(50, 12)
    assert len(spans) == examtables.GROUPS
    assert [step for span in spans for step in span] == list(range(50))
    assert examtables._in_spans([3.0, 4.0, 1.0], [range(2), range(2, 3)]) == [5.0, 1.0]


def test_percentages_do_not_round_to_all_or_nothing() -> None:
    """99.96 % is not shown as 100 %, nor a small share as 0 %; an unknown one is a dash."""
    shown = [coverage.percent(share) for share in (1, 0, 0.982, 0.9996, 0.00001, None)]
    assert shown == ["100 %", "0 %", "98.2 %", "99.960 %", "0.001 %", "–"]


# -- the manifest and `curate status` -------------------------------------------------------------


def made_run(folder: Path, skip: tuple[str, ...] = ()) -> RunDirectory:
    """A sketched run of two checkpoints."""
    run = RunDirectory.open_or_create(folder / "run")
    if not run.manifest.sets:
        add_texts(run, "train", write_texts(folder / "train.jsonl", 6))
    loop = LoopOptions(("body",), skip=skip)
    sketch_run(run, factory, loop, checkpoints(folder), options=OPTIONS)
    return run


def test_the_manifest_says_what_is_covered(tmp_path: Path) -> None:
    """Shares of parameters and gradient, per checkpoint, with what was skipped, rules and steps."""
    run = made_run(tmp_path, ("*.bias",))
    assert run.manifest.loop is not None
    seen = run.manifest.loop.coverage
    assert seen["skipped"] == pytest.approx({"body.0.bias": 8 / 144, "body.2.bias": 8 / 144})
    assert seen["share"] == pytest.approx(128 / 144)
    assert seen["served"] == {"linear": {"tensors": 2, "parameters": 128}}
    assert seen["detached"] == []
    shares = {name: check["gradient"] for name, check in run.manifest.self_check.items()}
    assert set(shares) == {"early", "late"} and shares["early"] != shares["late"]
    for share in shares.values():
        assert 0 < share["of_model"] < share["of_body"] < 1
        assert share["of_body"] + sum(share["skipped"].values()) == pytest.approx(1)


def test_status_shows_what_is_covered(tmp_path: Path) -> None:
    """`curate status` has a line for each part of the coverage, none of it empty."""
    run = made_run(tmp_path, ("body.0.bias",))
    table = status(run.path).filter(pl.col("what") == "coverage")
    lines = dict(zip(table["name"], table["state"], strict=True))
    assert set(lines) == {"parameters", "gradient @ early", "gradient @ late",
                          "skipped body.0.bias", "rule linear", "steps"}  # fmt: skip
    assert lines["parameters"].startswith("136 of 144 of the body attributed (94.4 %)")
    assert lines["gradient @ late"].count("%") == 2
    assert lines["skipped body.0.bias"].count("%") == 3


def test_sketches_of_other_parameters_do_not_mix(tmp_path: Path) -> None:
    """A run that skipped a parameter refuses to go on without skipping it."""
    made_run(tmp_path, ("body.0.bias",))
    with pytest.raises(CurateError, match=r"skip = \['body.0.bias'\]"):
        made_run(tmp_path)


def test_detached_steps_of_earlier_processes_stay(tmp_path: Path) -> None:
    """Steps that an earlier call saw without a gradient are kept, in the order of time."""
    run = made_run(tmp_path)
    run.update(lambda m: m.model_copy(update={"loop": m.loop.model_copy(  # type: ignore[union-attr]
        update={"coverage": {**m.loop.coverage, "detached": ["2"]}})}))  # type: ignore[union-attr]  # fmt: skip
    assert coverage.with_detached(run.manifest, ("1", "2", "3"), {"1"}) == ["1", "2"]
    lines = dict(coverage.lines({"detached": ["1", "2"]}, {}))
    assert lines["steps"] == "ran without a gradient: 1, 2"


def test_a_run_reports_detached_steps(tmp_path: Path) -> None:
    """Steps that ran without a gradient while sketching stand in the manifest and in the status."""

    class Truncated(Looped):
        def forward(self, input_ids: Tensor) -> Tensor:
            state = self.embed(input_ids)
            for step in range(self.steps):
                with torch.set_grad_enabled(step > 0 and torch.is_grad_enabled()):
                    state = state + self.body(state)
            return self.head(state)

    run = RunDirectory.create(tmp_path / "run")
    add_texts(run, "train", write_texts(tmp_path / "train.jsonl", 3))
    given = checkpoints(tmp_path)[:1]
    sketch_run(run, Truncated, LoopOptions(("body",)), given, options=OPTIONS)
    assert run.manifest.loop is not None
    assert run.manifest.loop.coverage["detached"] == ["1"]
    assert "ran without a gradient: 1" in status(run.path)["state"].to_list()


def test_skipping_through_a_recipe(tmp_path: Path) -> None:
    """`--set loop.skip=…` reaches the sketches, and the run records it."""
    recipe, into = make_recipe(tmp_path, steps=["train", "sketch"]), tmp_path / "run"
    words = ["run", str(recipe), "--into", str(into), "--trust-code", "-q"]
    assert main([*words, "--set", "loop.skip=body.bias"]) == 0
    manifest = RunDirectory.open(into).manifest
    assert manifest.loop is not None and manifest.sketch is not None
    assert list(manifest.loop.coverage["skipped"]) == ["body.bias"]
    assert manifest.sketch.options["skip"] == ["body.bias"]
    assert main([*words, "--set", "loop.skip=bodi.bias"]) != 0


def test_a_recipe_can_skip() -> None:
    """loop.skip takes one name or several, and a recipe without it keeps its hash."""
    raw: dict[str, Any] = {"name": "r", "model": {"source": "hf:m"}, "data": {"train": "t.jsonl"}}
    plain = Recipe.model_validate({**raw, "loop": {"body": "b"}})
    assert "skip" not in plain.resolved()["loop"]
    one = Recipe.model_validate({**raw, "loop": {"body": "b", "skip": "*.bias"}})
    assert one.loop.skip == ("*.bias",) and one.hash() != plain.hash()


def test_a_zero_gradient_has_no_share() -> None:
    """Where nothing has a gradient the shares are unknown, not zero and not an error."""

    def constant(model: nn.Module, batch: Any) -> Tensor:
        with torch.no_grad():
            return sdi.causal_lm_loss(model, batch)

    found = gradient_share(sdi.Loop(make(Block(16)), "body"), tokens(), names(4), constant)
    assert found.of_model is None and found.of_body is None
    assert math.isclose(sum(found.norms.values()), 0.0)
    assert coverage.gradient_text(found.as_dict()).count("–") == 2
