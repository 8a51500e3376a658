"""Learning rates by parameter: mapped where that is certain, refused where not, used everywhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import sdi
from curate.errors import CurateError
from curate.rundir import RunDirectory
from curate.sketching import sketch_run
from sdi.checkpoints import Checkpoint, find_checkpoints, load_weights
from sdi.errors import CheckpointError
from sdi.parameter_rates import parameter_rates, settle_rates
from sdi.sketch.reference import sketch_of_gradient
from tests.looped import LoopedModel, make, names, tokens
from tests.loopedrun import LOOP, OPTIONS, Looped, add_texts, write_texts

DECAYED, PLAIN = 0.25, 0.5


def undecayed(name: str, parameter: nn.Parameter) -> bool:
    """What the Hugging Face trainer does not decay: biases, norms and gains."""
    return parameter.ndim < 2


def split(model: nn.Module, test: Callable[[str, nn.Parameter], bool] = undecayed) -> list[Any]:
    """Two groups of bare parameters, as the Hugging Face trainer makes them."""
    listed = list(model.named_parameters())
    return [
        {"params": [p for n, p in listed if not test(n, p)], "lr": DECAYED},
        {"params": [p for n, p in listed if test(n, p)], "lr": PLAIN},
    ]


def expected(
    loop: sdi.Loop, test: Callable[[str, nn.Parameter], bool] = undecayed
) -> dict[str, float]:
    """The rates of the body after `split`."""
    return {n: PLAIN if test(n, p) else DECAYED for n, p in loop.parameters().items()}


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer with state of every parameter."""
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.01)
    optimizer.step()
    model.zero_grad()
    return optimizer


def saved(path: Path, model: nn.Module, *optimizers: torch.optim.Optimizer) -> Path:
    """A .pt file of a model and one or several optimizers."""
    states = [optimizer.state_dict() for optimizer in optimizers]
    held = {"model": model.state_dict(), "optimizer": states[0] if len(states) == 1 else states}
    torch.save(held, path)
    return path


def looped() -> tuple[LoopedModel, sdi.Loop]:
    model = make()
    return model, sdi.Loop(model, "body")


def test_decayed_and_undecayed_weights(tmp_path: Path) -> None:
    """The two groups of the Hugging Face trainer are told apart by the shapes of Adam's moments."""
    model, loop = looped()
    optimizer = stepped(model, torch.optim.AdamW(split(model)))
    assert parameter_rates(saved(tmp_path / "a.pt", model, optimizer), loop) == expected(loop)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert parameter_rates(tmp_path, loop) == expected(loop)


def test_body_and_the_rest(tmp_path: Path) -> None:
    """Groups by module, the body first and the rest after it, are told apart too."""
    model, loop = looped()
    inside = set(map(id, loop.parameters().values()))
    groups = [
        {"params": list(loop.parameters().values()), "lr": 0.1},
        {"params": [p for p in model.parameters() if id(p) not in inside], "lr": 0.2},
    ]
    optimizer = stepped(model, torch.optim.SGD(groups, momentum=0.9))
    found = parameter_rates(saved(tmp_path / "a.pt", model, optimizer), loop)
    assert found == dict.fromkeys(loop.parameters(), 0.1)
    checkpoint = settle_rates(find_checkpoints(tmp_path / "a.pt")[0], loop)
    assert (checkpoint.weight, checkpoint.rates) == (0.1, ())


def test_two_optimizers(tmp_path: Path) -> None:
    """Matrices in one optimizer and all else in another, saved as a list, are mapped as groups."""
    model, loop = looped()
    first, second = split(model)
    one = stepped(model, torch.optim.SGD([first], momentum=0.9))
    two = stepped(model, torch.optim.AdamW([second]))
    assert parameter_rates(saved(tmp_path / "a.pt", model, one, two), loop) == expected(loop)


def test_frozen_parameters_are_in_no_group(tmp_path: Path) -> None:
    """Where only what trains was handed to the optimizer, only that is mapped."""
    model, loop = looped()
    model.embed.requires_grad_(False)
    model.head.requires_grad_(False)
    groups = split(model)
    groups = [g | {"params": [p for p in g["params"] if p.requires_grad]} for g in groups]
    optimizer = stepped(model, torch.optim.AdamW(groups))
    assert parameter_rates(saved(tmp_path / "a.pt", model, optimizer), loop) == expected(loop)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_two_optimizers_in_a_distributed_checkpoint(tmp_path: Path) -> None:
    """A list of optimizers, whose items the format numbers, is read as the list it was."""
    model, loop = looped()
    first, second = split(model)
    one = stepped(model, torch.optim.SGD([first], momentum=0.9))
    two = stepped(model, torch.optim.AdamW([second]))
    state = {"model": model.state_dict(), "optimizers": [one.state_dict(), two.state_dict()]}
    dcp.save(state, checkpoint_id=str(tmp_path / "c"), no_dist=True)
    assert parameter_rates(tmp_path / "c", loop) == expected(loop)


def test_equal_rates_need_no_mapping(tmp_path: Path) -> None:
    """Where every group has one rate, it is the rate of each parameter, whatever the groups."""
    model, loop = looped()
    groups = [group | {"lr": 0.3} for group in reversed(split(model))]
    path = saved(tmp_path / "a.pt", model, torch.optim.SGD(groups))
    assert parameter_rates(path, loop) == dict.fromkeys(loop.parameters(), 0.3)
    assert find_checkpoints(path)[0].recorded is None


def by_layer(name: str, parameter: nn.Parameter) -> bool:
    return name.endswith("up.weight") or name.endswith("qkv.bias")


@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod."])
def test_names_in_the_optimizer(tmp_path: Path, wrapper: str) -> None:
    """An optimizer built from named parameters says whose each rate is, wrapped or not."""
    model, loop = looped()
    listed = [(f"{wrapper}{n}", p) for n, p in model.named_parameters()]
    groups = [
        {"params": [(n, p) for n, p in listed if not by_layer(n, p)], "lr": DECAYED},
        {"params": [(n, p) for n, p in listed if by_layer(n, p)], "lr": PLAIN},
    ]
    path = saved(tmp_path / "a.pt", model, torch.optim.SGD(groups))
    assert parameter_rates(path, loop) == expected(loop, by_layer)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_names_in_a_distributed_checkpoint(tmp_path: Path) -> None:
    """Torch's distributed state of an optimizer has names, and they are used."""
    model, loop = looped()
    optimizer = stepped(model, torch.optim.AdamW(split(model, by_layer)))
    state = {"model": model.state_dict(), "optim": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=str(tmp_path / "c"), no_dist=True)
    assert parameter_rates(tmp_path / "c", loop) == expected(loop, by_layer)


def test_rates_by_name_in_training_json(tmp_path: Path) -> None:
    """Names of parameters and modules, the longest first, and learning_rate for the rest."""
    model, loop = looped()
    saved(tmp_path / "a.pt", model, torch.optim.SGD(split(model)))
    named = {"body": 0.5, "body.up": 0.25, "body.up.bias": 0.0, "head": 9.0}
    state = {"learning_rate": 0.125, "learning_rates": named}
    (tmp_path / "a.training.json").write_text(json.dumps(state))
    found = parameter_rates(tmp_path / "a.pt", loop)
    special = {"body.up.weight": 0.25, "body.up.bias": 0.0}
    assert found == {n: special.get(n, 0.5) for n in loop.parameters()}
    (tmp_path / "a.training.json").write_text(json.dumps({"learning_rates": {"bdy": 1, "x": 2}}))
    with pytest.raises(CheckpointError, match="for bdy, x, which the model does not have"):
        parameter_rates(tmp_path / "a.pt", loop)


def no_state(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(split(model))


def alike(model: nn.Module) -> torch.optim.Optimizer:
    """Two weights of one shape apart: which of them is in which group, no shape can say."""
    return stepped(model, torch.optim.AdamW(split(model, lambda n, _: n == "body.norm1.weight")))


def of_another(model: nn.Module) -> torch.optim.Optimizer:
    other = make(width=8)
    return stepped(other, torch.optim.AdamW(split(other)))


def of_fewer(model: nn.Module) -> torch.optim.Optimizer:
    groups = split(model)
    groups[0]["params"].pop()
    return torch.optim.AdamW(groups)


@pytest.mark.parametrize(
    ("make_optimizer", "text"),
    [
        (no_state, "cannot be told whose is that of body"),
        (alike, r"cannot be told whose is that of body\.\S*norm"),
        (of_another, "are of another model"),
        (of_fewer, r"2 groups of \d+ parameters.*cannot be told whose each rate is"),
    ],
)
def test_what_cannot_be_mapped_is_refused(
    tmp_path: Path, make_optimizer: Callable[[nn.Module], torch.optim.Optimizer], text: str
) -> None:
    """No names and no shapes that decide: the checkpoint is refused, with three remedies."""
    model, loop = looped()
    path = saved(tmp_path / "a.pt", model, make_optimizer(model))
    with pytest.raises(CheckpointError, match=text) as caught:
        parameter_rates(path, loop)
    assert all(w in str(caught.value) for w in ("named parameters", "training.json", "a weight"))
    given = find_checkpoints({"path": path, "weight": 0.5})[0]
    assert settle_rates(given, loop) == given


def test_names_that_leave_a_parameter_out(tmp_path: Path) -> None:
    """A trained parameter of the body that no group names is refused by name."""
    model, loop = looped()
    listed = [(n, p) for n, p in model.named_parameters() if n != "body.gain"]
    groups = [{"params": listed[:3], "lr": 0.1}, {"params": listed[3:], "lr": 0.2}]
    path = saved(tmp_path / "a.pt", model, torch.optim.SGD(groups))
    with pytest.raises(CheckpointError, match=r"none for body\.gain\. Freeze what was not"):
        parameter_rates(path, loop)
    model.body.get_parameter("gain").requires_grad_(False)
    assert "body.gain" not in parameter_rates(path, loop)


def test_the_weight_is_the_mean_by_size(tmp_path: Path) -> None:
    """η̄ is the mean over the body's parameters by their sizes, the one that the sketch divides by.

    So η̄ times the square of the sketch's factor is each parameter's own rate.
    """
    model, loop = looped()
    optimizer = stepped(model, torch.optim.AdamW(split(model)))
    checkpoint = find_checkpoints(saved(tmp_path / "a.pt", model, optimizer))[0]
    settled = settle_rates(checkpoint, loop)
    sizes = {n: p.numel() for n, p in loop.parameters().items()}
    total = sum(expected(loop)[n] * size for n, size in sizes.items())
    assert settled.weight == pytest.approx(total / sum(sizes.values()))
    assert settled.weight_source == "'optimizer' inside a.pt, mean over the body of 2 rates"
    sketcher = sdi.Sketcher(loop, dim=64, rates=dict(settled.rates))
    for name, rate in expected(loop).items():
        assert settled.weight * sketcher.scales.get(name, 1.0) ** 2 == pytest.approx(rate)


def totals(model: nn.Module, loop: sdi.Loop, batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Each row's gradient of the body, by plain autograd."""
    rows = len(batch["input_ids"])
    alone = [{key: value[r : r + 1] for key, value in batch.items()} for r in range(rows)]
    parameters = loop.parameters()
    return [
        dict(
            zip(
                parameters,
                torch.autograd.grad(
                    sdi.causal_lm_loss(model, row).sum(), list(parameters.values())
                ),
                strict=True,
            )
        )
        for row in alone
    ]


def test_conservation_with_a_rate_per_parameter(tmp_path: Path) -> None:
    """The steps add up to TracIn of plain autograd with η per parameter.

    Exactly in the sketch: Σ_t of a row is the sketch of √(η_p/η̄) times autograd's gradient. And
    within four standard errors in the scores: η̄ Σ_t⟨…⟩ is Σ_p η_p ⟨∇_p z, ∇_p z'⟩.
    """
    model, loop = looped()
    optimizer = stepped(model, torch.optim.AdamW(split(model)))
    path = saved(tmp_path / "a.pt", model, optimizer)
    checkpoint = settle_rates(find_checkpoints(path)[0], loop)
    load_weights(model, path)
    rates = expected(loop)
    assert dict(checkpoint.rates) == rates and checkpoint.weight is not None
    sketcher = sdi.Sketcher(loop, dim=4096, checkpoint="a", rates=dict(checkpoint.rates))
    batch = tokens(rows=4)
    sdi.self_check(sketcher, batch, names(4))
    part = sketcher(batch, names(4))
    true = totals(model, loop, batch)
    for row, gradient in enumerate(true):
        wanted = sum(
            sketch_of_gradient(sketcher.hashing, n, g * (rates[n] / checkpoint.weight) ** 0.5)
            for n, g in gradient.items()
        )
        error = (part.values[row].sum(dim=0).double() - wanted).norm() / wanted.norm()
        assert error < 1e-5
    scores = sdi.influence(part, part, weight=checkpoint.weight).sum(dim=2)
    inner = torch.tensor(
        [[sum(rates[n] * float((g[n] * q[n]).sum()) for n in rates) for q in true] for g in true]
    )
    norms = inner.diagonal().sqrt()
    errors = torch.sqrt((norms[:, None] * norms[None]) ** 2 + inner**2) / 4096**0.5
    assert ((scores - inner).abs() < 4 * errors).all()
    one_rate = sdi.Sketcher(loop, dim=4096, checkpoint="a")(batch, names(4))
    plain = sdi.influence(one_rate, one_rate, weight=checkpoint.weight).sum(dim=2)
    assert ((plain - inner).abs() > 4 * errors).any()


# -- in a run -------------------------------------------------------------------------------------


def run_with_groups(directory: Path, rates: Sequence[float]) -> Path:
    """A checkpoint whose optimizer has the body's matrices at one rate and all else at another."""
    torch.manual_seed(3)
    model = Looped()
    listed = list(model.named_parameters())
    groups = [
        {"params": [(n, p) for n, p in listed if p.ndim == 2], "lr": rates[0]},
        {"params": [(n, p) for n, p in listed if p.ndim == 1], "lr": rates[1]},
    ]
    return saved(directory / "step-1.pt", model, torch.optim.SGD(groups))


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory.create(tmp_path / "run")
    add_texts(run, "train", write_texts(tmp_path / "train.jsonl", 9))
    return run


def test_a_run_takes_the_rates_from_the_optimizer(run: RunDirectory, tmp_path: Path) -> None:
    """What is stored is the sketch with explicit rates; η̄ and the factors are in the manifest."""
    path = run_with_groups(tmp_path, (0.1, 0.4))
    sketch_run(run, Looped, LOOP, find_checkpoints(path), options=OPTIONS)
    model = Looped().eval()
    load_weights(model, path)
    loop = sdi.Loop(model, "body")
    rates = {n: 0.1 if p.ndim == 2 else 0.4 for n, p in loop.parameters().items()}
    sketcher = sdi.Sketcher(loop, dim=64, checkpoint="step-1", rates=rates)
    stored = np.concatenate([s.block() for _, _, s in run.shards("train", "step-1", "steps")])
    examples = run.example_set("train")
    for row in range(9):
        ids, labels = (torch.tensor(a)[None].long() for a in examples.tokens(row))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        values = sketcher(batch, ids=["one"]).values[0]
        assert np.abs(stored[row] - values.numpy()).max() < values.abs().max().item() / 200
    entry = run.manifest.checkpoints[0]
    assert entry.weight == pytest.approx((128 * 0.1 + 16 * 0.4) / 144)
    assert entry.weight_source == "'optimizer' inside step-1.pt, mean over the body of 2 rates"
    assert entry.scales == sketcher.spec["scales"]
    assert sketch_run(run, Looped, LOOP, find_checkpoints(path), options=OPTIONS).shards == 0


def test_another_ratio_of_rates_is_refused(run: RunDirectory, tmp_path: Path) -> None:
    """Sketches with other factors are not mixed; rates scaled alike are another weight only."""
    path = run_with_groups(tmp_path, (0.1, 0.4))
    found = find_checkpoints(path)
    sketch_run(run, Looped, LOOP, found, options=OPTIONS)
    assert found[0].recorded is not None

    def at(*rates: float) -> list[Checkpoint]:
        recorded = found[0].recorded
        assert recorded is not None
        groups = tuple(replace(g, rate=r) for g, r in zip(recorded.groups, rates, strict=True))
        return [replace(found[0], recorded=replace(recorded, groups=groups))]

    with pytest.raises(CurateError, match=r"√\(η_p/η̄\) of body\.0\.bias at checkpoint 'step-1'"):
        sketch_run(run, Looped, LOOP, at(0.1, 0.2), options=OPTIONS)
    given = find_checkpoints({"path": path, "weight": 0.5})
    with pytest.raises(CurateError, match=r"√\(η_p/η̄\) of body\.0\.bias"):
        sketch_run(run, Looped, LOOP, given, options=OPTIONS)
    assert sketch_run(run, Looped, LOOP, at(0.2, 0.8), options=OPTIONS).shards == 0
    assert run.manifest.checkpoints[0].weight == pytest.approx(2 * (128 * 0.1 + 16 * 0.4) / 144)
