"""From a model and two files to a curated dataset, each number held against exact gradients.

The exact side shares nothing with the tool but the tokens: steps from `sdi.ExactGradients` (step
gradients by capture, no sketch) and totals from plain autograd, one row at a time.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import polars as pl
import pytest
import torch
from torch import nn
from torch.nn import functional

import sdi
from curate.batches import batches
from curate.examples import DataSpec, load_examples
from curate.export import export
from curate.filter import FilterConfig
from curate.filter import filter as select
from curate.rank import rank
from curate.reweight import ReweightConfig, reweight
from curate.rundir import RunDirectory
from curate.scores import score_run
from curate.sketching import LoopOptions, SketchOptions, sketch_run
from sdi.checkpoints import find_checkpoints, load_weights
from tests.loopedrun import Looped

Doubles = npt.NDArray[np.float64]
ROWS, QUERIES, WIDTH, DIM = 200, 10, 20, 512
ETA = {"first": 0.3, "second": 0.1}
STEPS = ("s01", "s02", "s03")
SEEDS = (0, 1)


def factory() -> nn.Module:
    """A looped model whose body has 840 parameters, more than the sketch has buckets."""
    torch.manual_seed(0)
    return Looped(width=WIDTH)


@dataclass
class Case:
    """Runs by seed, and exactly: steps (N, Q, τ), and totals by plain autograd (N, Q)."""

    runs: dict[int, RunDirectory]
    steps: Doubles
    totals: Doubles
    kinds: list[str]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("endtoend")
    random = np.random.default_rng(0)
    for name, count in (("train", ROWS), ("test", QUERIES)):
        rows = [_problem(random, name, n) for n in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = []
    for number, (name, eta) in enumerate(ETA.items()):
        torch.manual_seed(number + 1)
        path = folder / f"{name}.pt"
        torch.save(Looped(width=WIDTH).state_dict(), path)
        paths.append({"path": str(path), "name": name, "weight": eta})
    checkpoints = list(find_checkpoints(paths))
    runs = {seed: _run(folder, seed, checkpoints) for seed in SEEDS}
    steps, totals = _exact(runs[0], checkpoints)
    kinds = runs[0].examples("test").sort("row").collect()["kind"].to_list()
    return Case(runs, steps, totals, kinds)


def _problem(random: np.random.Generator, name: str, number: int) -> dict[str, Any]:
    a, b = (int(x) for x in random.integers(1, 99, 2))
    kind = "sum" if number % 2 else "product"
    prompt = f"{name} {number}: {a} {kind} {b} is"
    answer = str(a + b if number % 2 else a * b) + " so it goes" * int(random.integers(0, 3))
    return {"id": f"{name}-{number}", "prompt": prompt, "answer": answer, "kind": kind}


def _run(folder: Path, seed: int, checkpoints: Any) -> RunDirectory:
    run = RunDirectory.create(folder / f"run{seed}")
    for name, role in (("train", "train"), ("test", "query")):
        spec = DataSpec.of(
            {
                "path": str(folder / f"{name}.jsonl"),
                "prompt": "prompt",
                "response": "answer",
                "mask_prompt": True,
                "id": "id",
                "source": "kind",
                "columns": ["kind"],
                "role": role,
            }
        )
        run.add_set(load_examples(spec, run.stage(name), name=name))
    options = SketchOptions(dim=DIM, seed=seed, budget_tokens=1500, shard_rows=64, device="cpu")
    sketch_run(run, factory, LoopOptions(body=("body",)), checkpoints, options=options)
    score_run(run, "test", group_by="kind", pairs=True, top_k=20)
    return run


def _exact(run: RunDirectory, checkpoints: Any) -> tuple[Doubles, Doubles]:
    model = factory().eval()
    loop = sdi.Loop(model, "body")
    steps, totals = 0.0, 0.0
    for checkpoint in checkpoints:
        load_weights(model, checkpoint.path)
        sides = [_side(loop, run, name) for name in ("train", "test")]
        eta = ETA[checkpoint.name]
        steps = steps + eta * np.einsum("np,qtp->nqt", sides[0][0].sum(axis=1), sides[1][0])
        totals = totals + eta * sides[0][1] @ sides[1][1].T
    return np.asarray(steps), np.asarray(totals)


def _side(loop: sdi.Loop, run: RunDirectory, name: str) -> tuple[Doubles, Doubles]:
    """Step gradients (rows, τ, P) by capture, and gradients (rows, P) by plain autograd."""
    examples = run.example_set(name)
    steps: dict[int, Doubles] = {}
    plain: dict[int, Doubles] = {}
    parameters = list(loop.parameters().values())
    for batch in batches(examples, budget_tokens=2_000):
        part = sdi.ExactGradients(loop)(batch.tensors, batch.ids)
        logits = loop.model(batch.tensors["input_ids"])
        for at, row in enumerate(batch.rows):
            steps[int(row)] = part.values[at].double().numpy()
            loss = functional.cross_entropy(logits[at, :-1], batch.tensors["labels"][at, 1:])
            found = torch.autograd.grad(loss, parameters, retain_graph=True)
            plain[int(row)] = torch.cat([g.flatten() for g in found]).double().numpy()
    order = range(len(examples))
    return np.stack([steps[row] for row in order]), np.stack([plain[row] for row in order])


def _columns(steps: Doubles) -> dict[str, Doubles]:
    """The table's columns of exact influence (N, τ); three steps are one early and two late."""
    early, late = steps[:, 0], steps[:, 1] + steps[:, 2]
    standard = [(x - x.mean()) / x.std() for x in (early, late)]
    own = {name: steps[:, t] for t, name in enumerate(STEPS)}
    return {**own, "total": steps.sum(axis=1), "early": early, "late": late,
            "contrast": standard[1] - standard[0]}  # fmt: skip


def _spearman(a: Doubles, b: Doubles) -> float:
    ranks = [np.argsort(np.argsort(x)) for x in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def test_exact_totals_agree_with_plain_autograd(case: Case) -> None:
    """The two exact sides agree, so that what is compared below is TracIn itself."""
    np.testing.assert_allclose(case.steps.sum(axis=2), case.totals, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("table", ["test", "test:sum", "test:product"])
def test_tables_are_exact_influence_within_their_errors(case: Case, table: str) -> None:
    """Each column of a mean is exact within what its error says, and orders rows alike."""
    members = [q for q, kind in enumerate(case.kinds) if table in ("test", f"test:{kind}")]
    exact = _columns(case.steps[:, members].mean(axis=1))
    for run in case.runs.values():
        frame = run.influence(table).collect()
        for name, values in exact.items():
            got = frame[name].to_numpy().astype(float)
            # Early and late are nearly collinear here, so that little of contrast is not noise.
            assert _spearman(got, values) > (0.6 if name == "contrast" else 0.9), name
            if name not in STEPS:
                z = (got - values) / frame[f"{name}_se"].to_numpy()
                assert np.abs(z).max() < 6, name


def test_errors_are_as_large_as_they_say(case: Case) -> None:
    """Over all pairs, z-scores have mean square one, for total, early, late and contrast."""
    scores: dict[str, list[Doubles]] = {}
    for run in case.runs.values():
        pairs = run.pairs("test").collect().sort("query_row", "row")
        for query in range(QUERIES):
            own = pairs.filter(pl.col("query_row") == query)
            exact = {**_columns(case.steps[:, query]), "total": case.totals[:, query]}
            exact["contrast"] = exact["late"] - exact["early"]  # raw in a table of pairs
            for name in ("total", "early", "late", "contrast"):
                z = (own[name].to_numpy() - exact[name]) / own[f"{name}_se"].to_numpy()
                scores.setdefault(name, []).append(z)
    for name, z in scores.items():
        size = float(np.sqrt(np.mean(np.square(z))))
        assert 0.7 < size < 1.3, (name, size)


def test_decisions_weights_and_export_are_those_of_the_table(case: Case, tmp_path: Path) -> None:
    """Ranks, kept rows and weights are recounted; the export has each kept row's own text."""
    run = case.runs[0]
    table = run.influence("test").collect().sort("row")
    late = table["late"].to_numpy().astype(float)
    order = np.argsort(-late, kind="stable")
    assert rank(run, "test", by="late")["row"].to_list() == order.tolist()
    select(run, "test", "best", FilterConfig(by="late", where="total > 0", top=50))
    reweight(run, "best", ReweightConfig(method="softmax"))
    kept = [int(row) for row in order if table["total"][int(row)] > 0][:50]
    z = (late[kept] - late[kept].mean()) / late[kept].std()
    weights = dict(zip(kept, np.exp(z) / np.exp(z).mean(), strict=True))

    path = export(run, "best", tmp_path / "curated")
    data = datasets.load_dataset(str(path), split="train", cache_dir=str(tmp_path / "cache"))
    lines = (run.path.parent / "train.jsonl").read_text().splitlines()
    texts = [json.loads(line) for line in lines]
    assert data["sdi_row"] == sorted(kept)
    for line in data:
        truth = texts[line["sdi_row"]]
        assert {key: line[key] for key in truth} == truth and line["sdi_id"] == truth["id"]
        assert line["weight"] == pytest.approx(weights[line["sdi_row"]], rel=1e-6)
        assert line["sdi_score"] == pytest.approx(late[line["sdi_row"]])
    decisions = pl.read_parquet(path / "provenance" / "decisions.parquet")
    assert len(decisions) == ROWS and decisions["kept"].sum() == len(kept)
    assert decisions.filter(~pl.col("kept"))["weight"].sum() == 0


def test_weighted_training_on_the_export(case: Case, tmp_path: Path) -> None:
    """A loop shaped like a trainer's: batches of text and weight, and a loss that falls."""
    run = case.runs[0]
    select(run, "test", "train", FilterConfig(by="total", fraction=0.25))
    reweight(run, "train", ReweightConfig(method="rank", low=0.5, high=1.5))
    path = export(run, "train", tmp_path / "curated")
    data = datasets.load_dataset(str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert np.mean(data["weight"]) == pytest.approx(1.0)
    model, losses = factory(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for epoch in range(3):
        for lines in data.shuffle(seed=epoch).iter(batch_size=10):
            rows = [list(p.encode() + a.encode()) for p, a in
                    zip(lines["prompt"], lines["answer"], strict=True)]  # fmt: skip
            ids = nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True)
            each = sdi.causal_lm_loss(
                model, {"input_ids": ids, "labels": ids.masked_fill(ids == 0, -100)}
            )
            loss = (each * torch.tensor(lines["weight"])).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])
