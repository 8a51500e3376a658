"""`curate doctor MODEL`, and what of a model is covered: on screen, in the manifest, in numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from torch import Tensor, nn

import sdi
from curate import coverage, examine, examtables
from curate.candidates import looped, stacks
from curate.cli import main
from curate.errors import CurateError
from curate.recipe import Recipe
from curate.rundir import RunDirectory
from curate.sketching import LoopOptions, sketch_run
from curate.status import status
from sdi.coverage import _measuring, gradient_share, served
from sdi.errors import LoopError, SelfCheckError
from sdi.stepnorms import StepNorms, step_norms
from tests.looped import Block, ListModel, LoopedModel, make, names, tokens
from tests.loopedrun import OPTIONS, Looped, add_texts, checkpoints, factory, write_texts
from tests.test_cli import make as make_recipe

MODELS = """
import torch
import torch.nn.functional as F
from torch import nn


class Body(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, width)

    def forward(self, x):
        return x + torch.tanh(self.inner(self.norm(x)))


class Dropping(Body):
    def forward(self, x):
        return x + F.dropout(self.inner(self.norm(x)), 0.3, training=True)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, delta):
        x, weight = ctx.saved_tensors
        return delta @ weight, delta.flatten(0, 1).T @ x.flatten(0, 1)


class Fused(Body):
    def forward(self, x):
        return x + torch.tanh(Square.apply(self.norm(x), self.inner.weight))


class Looped(nn.Module):
    def __init__(self, body=Body, width=8, depth=3, blind=0, repeats=1):
        super().__init__()
        torch.manual_seed(0)
        self.token, self.body = nn.Embedding(31, width), body(width)
        self.other = nn.Linear(width, width) if repeats > 1 else None
        self.head, self.depth, self.blind = nn.Linear(width, 31), depth, blind
        self.repeats = repeats

    def forward(self, input_ids):
        hidden = self.token(input_ids)
        for step in range(self.depth):
            with torch.set_grad_enabled(step >= self.blind and torch.is_grad_enabled()):
                hidden = self.body(hidden)
        for _ in range(self.repeats if self.other else 0):
            hidden = self.other(hidden)
        return self.head(hidden)


def build(depth=3, **options):
    return Looped(depth=depth, **options)


def dropping():
    return Looped(Dropping)


def fused():
    return Looped(Fused)


def truncated():
    return Looped(depth=4, blind=2)


def two_loops():
    return Looped(repeats=2)


def once():
    return Looped(depth=1)


def mean_loss(model, batch):
    logits = model(batch["input_ids"])
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with `models.py` in it, where the command runs."""
    (tmp_path / "models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Doctor:
    """The command, in-process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, source: str, *options: str, exits: int = 0) -> tuple[str, str]:
        """Standard output and standard error."""
        self._capsys.readouterr()
        assert main(["doctor", source, "--trust-code", *options]) == exits
        seen = self._capsys.readouterr()
        return seen.out, seen.err

    def rows(self, source: str, *options: str, exits: int = 0) -> list[dict[str, Any]]:
        """The one table of --json."""
        found: list[dict[str, Any]] = json.loads(self(source, "--json", *options, exits=exits)[0])
        return found


@pytest.fixture
def doctor(folder: Path, capsys: pytest.CaptureFixture[str]) -> Doctor:
    return Doctor(capsys)


def parameters(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The rows of parameters by name."""
    return {row["detail"]: row for row in rows if row["check"] == "parameter"}


def detail(rows: list[dict[str, Any]], check: str) -> str:
    """The detail of the one row with that check."""
    (found,) = [row["detail"] for row in rows if row["check"] == check]
    return str(found)


# -- the command --------------------------------------------------------------------------------


def test_a_model_is_examined(doctor: Doctor) -> None:
    """Every parameter has its shape, its rule and its norm at each step, then comes the verdict."""
    rows = doctor.rows("models.py:build", "--arg", "depth=5")
    assert "5 times" in detail(rows, "loop body")
    assert "--body body confirms it" in detail(rows, "choice")
    found = parameters(rows)
    assert set(found) == {f"body.{n}" for n in ("norm.weight", "norm.bias", "inner.weight",
                                                 "inner.bias")}  # fmt: skip
    inner = found["body.inner.weight"]
    assert inner["shape"] == [8, 8] and inner["rule"] == "linear"
    assert len(inner["norms"]) == 5 and min(inner["norms"]) > 0
    assert max(row["error"] for row in found.values()) < 1e-5
    verdict = detail(rows, "verdict")
    assert verdict.startswith("attributable: worst error")
    assert "over 2 rows × 5 steps; 100 % of the body's squared gradient norm" in verdict


def test_a_person_sees_tables_and_one_line(doctor: Doctor) -> None:
    """The printed output ends with coverage and the verdict; nothing is on standard error."""
    out, err = doctor("models.py:build", "--body", "body", "--rows", "3", "--tokens", "5")
    lines = out.splitlines()
    (header,) = [line for line in lines if line.startswith("parameter ")]
    assert header.split() == ["parameter", "shape", "rule", "error", *["step", "1", "step", "2"],
                              "step", "3"]  # fmt: skip
    assert "3 made-up rows of 5 random tokens, causal loss" in out
    assert any(line.startswith("rule linear") and "72 parameters" in line for line in lines)
    assert lines[-1].startswith("attributable: ") and "3 rows × 3 steps" in lines[-1]
    assert err == ""


def test_a_wrong_body_is_named(doctor: Doctor) -> None:
    """A body that the model does not have is wrong usage, with the nearest name."""
    out, err = doctor("models.py:build", "--body", "bodi", exits=2)
    assert out == "" and "no module named 'bodi'; the nearest name is 'body'" in err


def test_two_loops_are_not_guessed(doctor: Doctor) -> None:
    """Where two bodies could be meant both are listed, and the user is asked to name one."""
    out, err = doctor("models.py:two_loops", exits=2)
    assert "loop body" in out and "loop other" in out
    assert "--body body (3 calls)" in err and "--body other (2 calls)" in err
    rows = doctor.rows("models.py:two_loops", "--body", "other")
    assert "2 rows × 2 steps" in detail(rows, "verdict")


def test_no_loop_says_what_to_do(doctor: Doctor) -> None:
    """A model that runs everything once is refused with exit status 3, and the remedy."""
    _, err = doctor("models.py:once", exits=3)
    assert "no module is called more than once" in err and "--untied" in err
    _, err = doctor("models.py:once", "--body", "body", exits=3)
    assert "called once" in err


def test_dropout_left_on_is_refused(doctor: Doctor) -> None:
    """Random steps fail the self-check; the table shows which parameters disagree."""
    rows = doctor.rows("models.py:dropping", exits=3)
    assert "dropout left on (call model.eval())" in detail(rows, "verdict")
    assert any(row["verdict"] == "bad" for row in parameters(rows).values())
    assert rows[-1]["verdict"] == "bad"


def test_a_custom_function_is_refused_by_name(doctor: Doctor) -> None:
    """What capture cannot see is named; the gradient's share is measured all the same."""
    rows = doctor.rows("models.py:fused", exits=3)
    verdict = detail(rows, "verdict")
    assert "body.inner.weight" in verdict and "custom autograd function" in verdict
    inner = parameters(rows)["body.inner.weight"]
    assert inner["norms"] is None and inner["gradient"] > 0
    assert "of the body's squared gradient norm" in detail(rows, "coverage gradient")
    out, _ = doctor("models.py:fused", exits=3)
    assert "by plain autograd" in out and out.splitlines()[-1].startswith("refused: ")


def test_a_custom_function_can_be_skipped(doctor: Doctor) -> None:
    """With the parameter that is used unseen left out, the rest is attributable, and it is said."""
    rows = doctor.rows("models.py:fused", "--skip", "body.inner.*")
    assert set(parameters(rows)) >= {"body.norm.weight"}
    assert parameters(rows)["body.inner.weight"]["norms"] is None
    assert "by request" in detail(rows, "coverage skipped body.inner.weight")
    assert "100 % of the body's" not in detail(rows, "verdict")


def test_an_unknown_skip_is_refused(doctor: Doctor) -> None:
    """A name that no parameter of the body has is wrong usage, with the nearest."""
    _, err = doctor("models.py:build", "--skip", "body.iner.weight", exits=2)
    assert "no parameter of the body matches 'body.iner.weight'" in err
    assert "the nearest is 'body.inner.weight'" in err


def test_steps_without_gradient_are_reported(doctor: Doctor) -> None:
    """Truncated steps keep their numbers, have norm 0, and are named."""
    rows = doctor.rows("models.py:truncated")
    norms = parameters(rows)["body.inner.weight"]["norms"]
    assert norms[:2] == [0, 0] and min(norms[2:]) > 0
    assert detail(rows, "coverage steps") == "ran without a gradient: 1, 2"
    assert "2 of 4 steps ran without a gradient" in detail(rows, "verdict")


def test_the_table_can_refuse_too() -> None:
    """Where the self-check saw no difference and the table did, the model is random: refused."""
    fine = StepNorms("body.a", (2,), (1.0, 1.0), 1e-6)
    examine._refuse_disagreement([fine])
    with pytest.raises(SelfCheckError, match=r"body\.b differs from per-row autograd by 0\.5"):
        examine._refuse_disagreement([fine, StepNorms("body.b", (2,), (1.0, 1.0), 0.5)])


def test_a_scalar_loss_is_refused(doctor: Doctor) -> None:
    """A loss of one's own is taken, and one that averages over the batch is refused."""
    _, err = doctor("models.py:build", "--loss", "models.py:mean_loss", exits=3)
    assert "scalar" in err
    _, err = doctor("models.py:build", "--loss", "hinge", exits=2)
    assert "expected causal, masked or file.py:callable" in err


def test_rows_and_weights_of_the_users(doctor: Doctor, folder: Path) -> None:
    """Rows come from a data file and weights from a checkpoint, and both change the norms."""
    from safetensors.torch import save_file

    (folder / "rows.jsonl").write_text('{"input_ids": [1, 2, 3, 4, 5]}\n{"input_ids": [6, 7, 8]}\n')
    plain = parameters(doctor.rows("models.py:build"))
    read = doctor.rows("models.py:build", "--data", "rows.jsonl")
    assert "2 rows of rows.jsonl, at most 5 tokens" in detail(read, "rows")
    scope: dict[str, Any] = {}
    exec(MODELS, scope)
    model = scope["build"]()
    with torch.no_grad():
        model.body.inner.weight.mul_(3)
    save_file(model.state_dict(), folder / "late.safetensors")
    late = parameters(
        doctor.rows("models.py:build", "--data", "rows.jsonl", "--checkpoint", "late.safetensors")
    )
    name = "body.inner.weight"
    seen = {tuple(rows[name]["norms"]) for rows in (plain, parameters(read), late)}
    assert len(seen) == 3


def test_rows_that_the_model_cannot_read(doctor: Doctor, folder: Path) -> None:
    """Tokens outside of the vocabulary are one line that says what was given and what to change."""
    (folder / "rows.jsonl").write_text('{"input_ids": [1, 99]}\n{"input_ids": [6, 7]}\n')
    _, err = doctor("models.py:build", "--data", "rows.jsonl", exits=2)
    assert "failed on 2 rows of rows.jsonl" in err and "--data" in err
    assert err.count("\n") == 1
    (folder / "rows.jsonl").write_text('{"input_ids": [1, 9]}\n')
    assert "expected two or more" in doctor("models.py:build", "--data", "rows.jsonl", exits=2)[1]


def test_code_needs_trust(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without --trust-code no model file of the user's runs."""
    assert main(["doctor", "models.py:build"]) == 2
    assert "--trust-code" in capsys.readouterr().err


def test_every_format(doctor: Doctor, folder: Path) -> None:
    """CSV and Parquet hold the same table as JSON, with one row per parameter."""
    rows = doctor.rows("models.py:build")
    assert len(doctor("models.py:build", "--csv")[0].splitlines()) == len(rows) + 1
    doctor("models.py:build", "--parquet", "found.parquet")
    table = pl.read_parquet(folder / "found.parquet")
    assert table["check"].to_list() == [row["check"] for row in rows]


def test_the_shipped_model(doctor: Doctor) -> None:
    """The model of the shipped recipes is attributable, and needs no trust."""
    rows = doctor.rows("looped_gpt.py:build", "--arg", "width=16", "--arg", "depth=3")
    assert detail(rows, "verdict").startswith("attributable")


# -- classes of transformers ----------------------------------------------------------------------


def small(kind: str, folder: Path) -> str:
    """`hf:` and a directory with a tiny model of that kind."""
    transformers = pytest.importorskip("transformers")
    common = {"vocab_size": 40, "max_position_embeddings": 32, "hidden_size": 16}
    common |= {"num_attention_heads": 2, "intermediate_size": 24}
    made = {
        "Albert": ("ForMaskedLM", {"num_hidden_layers": 3, "embedding_size": 8}),
        "HrmText": ("ForCausalLM", {"head_dim": 8, "num_layers_per_stack": 1,
                                    "num_hidden_layers": 8, "embedding_scale": 4.0}),
        "Mixtral": ("ForCausalLM", {"num_hidden_layers": 2, "num_key_value_heads": 1,
                                    "num_local_experts": 3}),
        "Llama": ("ForCausalLM", {"num_hidden_layers": 2}),
        "Zamba2": ("ForCausalLM", {
            "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2,
            "num_mem_blocks": 1, "mamba_d_state": 4, "mamba_d_conv": 3, "n_mamba_heads": 4,
            "mamba_headdim": 8, "chunk_size": 4, "adapter_rank": 2,
        }),
    }  # fmt: skip
    suffix, more = made[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**common, **more)
    getattr(transformers, f"{kind}{suffix}")(config).save_pretrained(folder / kind)
    return f"hf:{folder / kind}"


def test_albert(doctor: Doctor, folder: Path) -> None:
    """ALBERT's group is found and attributable, with the masked loss that its class asks for."""
    rows = doctor.rows(small("Albert", folder))
    assert "masked loss" in detail(rows, "rows")
    assert "3 times" in detail(rows, "loop albert.encoder.albert_layer_groups.0")
    assert "2 rows × 3 steps" in detail(rows, "verdict")


def test_hrm(doctor: Doctor, folder: Path) -> None:
    """HRM-Text has two nested loops: both are listed, and the low one is attributable."""
    source = small("HrmText", folder)
    _, err = doctor(source, exits=2)
    assert "--body model.L_module (6 calls)" in err and "--body model.H_module (2 calls)" in err
    rows = doctor.rows(source, "--body", "model.L_module")
    assert "steps ran without a gradient" in detail(rows, "verdict")


def test_mixture_of_experts_as_a_stack(doctor: Doctor, folder: Path) -> None:
    """Mixtral's layers are steps of an untied body; its experts agree with autograd."""
    rows = doctor.rows(small("Mixtral", folder), "--untied")
    experts = parameters(rows)["model.layers.1.mlp.experts.down_proj"]
    assert experts["shape"] == [3, 16, 24] and experts["error"] < 1e-5
    assert experts["norms"][0] == 0 < experts["norms"][1]


def test_an_ordinary_transformer(doctor: Doctor, folder: Path) -> None:
    """A Llama is refused as a loop with the option that works, which then shows layers as steps."""
    source = small("Llama", folder)
    _, err = doctor(source, exits=3)
    assert "--untied --body model.layers" in err
    out, _ = doctor(source, "--untied", "--body", "model.layers")
    (row,) = [line for line in out.splitlines() if line.startswith("*.mlp.down_proj.weight")]
    assert all(float(cell) > 0 for cell in row.split()[-2:])


def test_weights_used_again_by_other_modules(doctor: Doctor, folder: Path) -> None:
    """Zamba2's shared block is found, though each module that has its weights is called once."""
    from curate.models import build_model

    source = small("Zamba2", folder)
    assert "2 rows × 2 steps" in detail(doctor.rows(source), "verdict")
    model = build_model(source, {}, folder)
    batch = {key: value % 40 for key, value in tokens(2).items() if key != "labels"}
    batch["labels"] = batch["input_ids"]
    found = looped(model, batch, sdi.causal_lm_loss)
    places = tuple(f"model.layers.{place}.shared_transformer" for place in (1, 3))
    assert [(c.names, c.calls) for c in found] == [(places, 2)]
    assert stacks(model)[0].names == ("model.layers",)


# -- which body is meant --------------------------------------------------------------------------


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
