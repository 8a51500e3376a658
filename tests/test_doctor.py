"""`curate doctor MODEL`: what it shows, what it refuses, and classes of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

import sdi
from curate import examine
from curate.candidates import looped, stacks
from curate.cli import main
from sdi.errors import SelfCheckError
from sdi.stepnorms import StepNorms
from tests.looped import tokens

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
