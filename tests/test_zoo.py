"""Every layer kind, loop structure and model of the zoo is right, or refused as declared."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sdi
from sdi.sinks import ExactSink
from tests.zoo import __main__ as command
from tests.zoo.case import Case, names, pick, tokens
from tests.zoo.entries import Entry, covering, entry, models
from tests.zoo.kinds import KINDS
from tests.zoo.measure import Outcome, measure
from tests.zoo.structures import STRUCTURES

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's imports


def _entries() -> Iterator[Entry]:
    yield from covering()
    yield from models()


def _explained(outcome: Outcome) -> str:
    return f"{outcome.verdict}: {outcome.error} {outcome.worst} {outcome.refused}{outcome.broken}"


@pytest.mark.parametrize("case", [pytest.param(e, id=e.name) for e in _entries()])
def test_zoo(case: Entry) -> None:
    """The entry agrees with per-row autograd, sketch and gradient, or is refused as declared."""
    if case.kind == "model":
        pytest.importorskip("transformers")
    outcome = measure(case.name, case.make)
    assert outcome.passes, _explained(outcome)


def test_the_part_that_is_tested_covers_every_kind_and_structure() -> None:
    """Every kind is tested in several structures, and every structure with several kinds."""
    entries = list(covering())
    kinds = Counter(e.kind for e in entries)
    structures = Counter(e.structure for e in entries)
    assert set(kinds) == set(KINDS) and min(kinds.values()) >= 3
    assert set(structures) == set(STRUCTURES) and min(structures.values()) >= 3


@pytest.mark.parametrize("form", ["outer", "dense", "rows"])
def test_a_wrong_gradient_is_called_wrong(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The measurement can fail: contributions off by a thousandth are neither right nor refused."""
    plain = getattr(ExactSink, form)
    last = {"outer": 3, "rows": 3, "dense": 2}[form]  # of (name, step, ...), the one to bend

    def bent(self: ExactSink, *given: Any, **named: Any) -> None:
        plain(self, *given[:last], given[last] * 1.0005, *given[last + 1 :], **named)

    monkeypatch.setattr(ExactSink, form, bent)
    kind = "embedding of ids by token" if form == "rows" else "nn.Linear"
    outcome = measure("bent", entry(kind, "one module").make)
    assert outcome.verdict == "WRONG" and not outcome.passes
    assert 4e-4 < (outcome.error or 0.0) < 6e-4


def test_a_row_that_leaks_into_another_is_called_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The measurement can fail: rows exchanged in the sketch alone are seen in its error."""
    plain = sdi.Sketcher.traced

    def swapped(self: sdi.Sketcher, batch: object, ids: tuple[str, ...]) -> object:
        part, trace = plain(self, batch, ids)
        part.values[:] = part.values[[1, 0, 2]]
        return part, trace

    monkeypatch.setattr(sdi.Sketcher, "traced", swapped)
    outcome = measure("swapped", entry("nn.Linear", "one module").make)
    assert not outcome.passes and (outcome.error or 0.0) < 1e-4 < (outcome.sketch or 0.0)


def test_the_command_prints_each_entry_and_its_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The command exits 0 where every entry passes and 1 where one does not, naming it."""
    table = tmp_path / "TABLE.md"
    monkeypatch.setattr(command, "TABLE", table)
    arguments = ["--filter", "nn.Linear × one module", "--write", "--json", str(tmp_path / "j")]
    assert command.main(arguments) == 0
    assert "right" in capsys.readouterr().out
    assert "nn.Linear" in table.read_text() and json.loads((tmp_path / "j").read_text())[0]["right"]
    monkeypatch.setattr(ExactSink, "outer", lambda *_: None)
    assert command.main(arguments) == 1
    assert "**REFUSED" in table.read_text() and "REFUSED" in capsys.readouterr().out


def _holds(kind: str, structure: str) -> Outcome:
    outcome = measure(f"{kind} × {structure}", entry(kind, structure).make)
    assert outcome.right, _explained(outcome)
    return outcome


def _refused(kind: str, structure: str, says: str) -> None:
    outcome = measure(f"{kind} × {structure}", entry(kind, structure).make)
    assert outcome.refused and says in outcome.refused, _explained(outcome)


def test_scalar_mean_loss() -> None:
    """A mean over the batch is refused, with the remedy."""
    _refused("nn.Linear", "scalar mean loss", "use reduction='none'")


def test_token_mean_loss_with_padding() -> None:
    """A loss over each row's own tokens is right under padding; over the batch's it is refused."""
    _holds("nn.Linear", "rows padded")
    _refused("nn.Linear", "loss divided by the batch's tokens", "averaged over the batch")


def test_shuffled_loader_over_several_checkpoints() -> None:
    """Rows met in another order and company at each checkpoint have the influence of their ids."""
    torch.manual_seed(0)
    case = entry("nn.Linear", "one module").make()
    loop = sdi.Loop(case.model, case.body)
    batch = tokens(6)
    orders = ([[0, 1, 2, 3], [4, 5]], [[5, 2], [0, 4, 1, 3]])
    scores, true = torch.zeros(4, 2, 3), torch.zeros(4, 2, 3)
    for checkpoint, order in enumerate(orders):
        with torch.no_grad():
            for parameter in case.model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        sketcher = sdi.Sketcher(loop, 1 << 15, checkpoint=f"c{checkpoint}", loss=case.loss)
        found: dict[str, Tensor] = {}
        for rows in order:
            ids = [f"r{row}" for row in rows]
            part = sketcher({key: value[rows] for key, value in batch.items()}, ids)
            found |= dict(zip(part.ids, part.values, strict=True))
        sketches = torch.stack([found[name] for name in names(6)])
        scores += 0.1 * sdi.influence(sketches[:4], sketches[4:])
        exact = torch.cat(
            [
                sdi.ExactGradients(loop, case.loss)(pick(batch)(i), [f"r{i}"]).values
                for i in range(6)
            ]
        )
        true += 0.1 * sdi.influence(exact[:4], exact[4:])
    assert (scores - true).norm() <= 0.03 * true.norm()


def test_second_forward_inside_the_loss() -> None:
    """A second forward whose loss counts is attributed too; one that is unused changes nothing."""
    _holds("attention, fused qkv", "two forwards in the loss")
    _holds("attention, fused qkv", "a second forward that the loss does not use")
    _holds("attention, fused qkv", "a teacher's forward under no_grad")
    made = [entry("nn.Linear", s).make for s in ("one module", _UNUSED)]
    parts = []
    for make in made:
        torch.manual_seed(0)
        case = make()
        sketcher = sdi.Sketcher(sdi.Loop(case.model, case.body), dim=64, loss=case.loss)
        parts.append(sketcher(case.batch, names(case.rows)).values)
    plain, unused = parts
    torch.testing.assert_close(unused[:, : plain.shape[1]], plain)
    assert (unused[:, plain.shape[1] :] == 0).all()


_UNUSED = "a second forward that the loss does not use"


def test_functionally_tied_head() -> None:
    """A head that borrows the embedding is right; one that borrows the body's weight is refused."""
    _holds("nn.Linear", "head tied to the embedding by function")
    _refused("nn.Linear", "head tied to the body", "used outside of the body")


def test_padding_idx() -> None:
    """The padding id of an embedding has no gradient."""
    _holds("embedding, padding_idx", "one module")
    _holds("embedding, padding_idx", "rows padded")


def test_position_ids_of_one_broadcast_row() -> None:
    """Positions (1, T) broadcast over the batch count for each row on its own."""
    _holds("positions of ids (1, T)", "one module")
    _holds("positions of ids (1, T)", "as many rows as tokens")


def test_body_on_flattened_rows() -> None:
    """A body on (B·T, d) keeps the rows apart, and so does a batch that comes flattened."""
    _holds("addmm", "body on flattened tokens")
    _holds("nn.Linear", "batch of flattened tokens")


def test_batch_axis_second() -> None:
    """A body on (T, B, d) keeps the rows apart, also where there are as many rows as tokens."""
    _holds("nn.Linear", "body with the batch second")
    _holds("nn.Linear", "body with the batch second, contiguous")
    _holds("nn.Linear", "body with the batch second, as many rows as tokens")
    _holds("MultiheadAttention, batch second", "as many rows as tokens")


def test_linear_that_rescales_its_weight() -> None:
    """A linear layer that transforms its weight has the gradient of the weight it stores."""
    _holds("Linear subclass, rows of norm 1", "one module")
    _holds("weight norm", "a list of layers")


def test_steps_under_no_grad() -> None:
    """Steps without gradient are zeros that keep their number, and are named."""
    assert _holds("attention, fused qkv", "first steps under no_grad").steps == 4
    torch.manual_seed(0)
    case = entry("nn.Linear", "first steps under no_grad").make()
    part = sdi.Sketcher(sdi.Loop(case.model, case.body), 64, loss=case.loss)(
        case.batch, names(case.rows)
    )
    assert part.detached == ("1", "2") and (part.norms[:, :2] == 0).all()


def test_block_called_twice_per_loop() -> None:
    """Two calls of the block in a loop are two steps; two inside of a body are one."""
    assert _holds("attention, fused qkv", "a block called twice per loop").steps == 4
    assert _holds("attention, fused qkv", "the module twice a step").steps == 3


def test_albert_with_two_groups() -> None:
    """ALBERT's two layer groups, each called twice, are right."""
    pytest.importorskip("transformers")
    _holds("model", "ALBERT, two groups")


def test_random_initial_state() -> None:
    """A state drawn by row is right; one drawn for the whole batch is refused."""
    _holds("nn.Linear", "random state, drawn by row from its seed")
    _refused("nn.Linear", "random state, drawn for the batch", "random")


def test_learning_rates_per_group() -> None:
    """With a rate per parameter an inner product of sketches weighs each by its η."""
    torch.manual_seed(0)
    case = entry("addmm", "one module").make()
    loop, ids = sdi.Loop(case.model, case.body), names(case.rows)
    rates = {"body.a": 0.3, "body.b": 0.01}
    sizes = {name: p.numel() for name, p in loop.parameters().items()}
    mean = sum(rates[n] * sizes[n] for n in rates) / sum(sizes.values())
    part = sdi.Sketcher(loop, 1 << 14, loss=case.loss, rates=rates)(case.batch, ids)
    exact = sdi.ExactGradients(loop, case.loss)(case.batch, ids)
    expected = sum(
        rates[n] / mean * torch.einsum("isp,jtp->ijst", exact.values[..., s], exact.values[..., s])
        for n, s in exact.names.items()
    )
    found = torch.einsum("ism,jtm->ijst", part.values, part.values)
    assert (found - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.parametrize(
    "structure",
    [
        "random depth per batch, seeded",
        "depth per sequence, by mask",
        "depth per sequence, by rows gathered",
        "depth per token, by mask",
        "adaptive halting",
    ],
)
def test_random_depth(structure: str) -> None:
    """A depth that varies by batch, row or token leaves absent steps zero and the others right."""
    _holds("attention, fused qkv", structure)


def test_shared_norm_twice_per_loop() -> None:
    """A norm used twice in a step has one gradient for the step, the sum of both uses."""
    assert _holds("nn.Linear", "a norm shared twice a step").steps == 3


@pytest.mark.parametrize(
    "structure",
    [
        "prelude and coda as bins of their own",
        "head tied to the body, with bins of their own",
        "embedding and head tied, with bins of their own",
        "adaptive halting, with bins of their own",
    ],
)
def test_prelude_and_coda_as_bins(structure: str) -> None:
    """What is outside of the loop has bins of its own before and after the steps."""
    _holds("attention, fused qkv", structure)


def test_exit_gate_outside_the_loss() -> None:
    """A gate that the loss does not use has zero gradient in every step, and breaks nothing."""
    _holds("nn.Linear", "exit gate outside the loss")


def test_relu_in_place_after_a_linear() -> None:
    """An activation that overwrites a linear layer's output does not hide its gradient."""
    _holds("ReLU in place after a linear", "one module")
    _holds("part of an output changed in place", "one module")


def test_model_compiled_before_attribution() -> None:
    """A compiled model, or body, is run eagerly while attributed and is right."""
    _holds("attention, fused qkv", "the model compiled")
    _holds("attention, fused qkv", "the body compiled")


def test_data_parallel_style_wrapper() -> None:
    """A model inside of a wrapper's `module` is right."""
    _holds("attention, fused qkv", "a wrapper with a `module.` prefix")


def test_frozen_parameters() -> None:
    """Frozen parameters outside of the body change nothing."""
    _holds("attention, fused qkv", "everything but the body frozen")


def test_parameter_without_gradient_inside_the_body() -> None:
    """A body's parameter that requires no gradient is left out, and the others are right."""
    _holds("attention, fused qkv", "one parameter of the body frozen")


def test_dropout_left_on() -> None:
    """Dropout that is on is refused, with the remedy."""
    _refused("dropout left on", "one module", "call model.eval()")


def test_case_is_what_it_says() -> None:
    """A row's own batch is the row: its loss alone is its loss in the batch."""
    for structure in (
        "one module",
        "packed with cu_seqlens",
        "batch of (T, B) tensors",
        "rows padded",
    ):
        torch.manual_seed(0)
        case: Case = entry("nn.Linear", structure).make()
        whole = case.loss(case.model, case.batch)
        for i in range(case.rows):
            torch.testing.assert_close(case.loss(case.model, case.row(i))[0], whole[i])
