"""Fitting stored names to a model: wrappings, prefixes and conversions, or one error that lists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sdi.checkpoints import load_weights
from sdi.errors import CheckpointError
from tests.test_checkpoints import Tied, same, state_of


class Around(nn.Module):
    """A model that holds another one and nothing else."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


WRAPPINGS: dict[str, Any] = {
    "nested": lambda state: {"app": {"model": state}, "epoch": 3},
    "lightning": lambda state: {
        "state_dict": {f"model.{n}": v for n, v in state.items()},
        "callbacks": {"x": {"best": 0.5}},
    },
    "dotted": lambda state: {f"app.model.{n}": v for n, v in state.items()},
    "optimizer beside": lambda state: {"optimizer": {"model": {}}, "model": state},
}


@pytest.mark.parametrize("kind", WRAPPINGS)
def test_wrappings_of_every_depth_come_off(tmp_path: Path, kind: str) -> None:
    """Nested dicts, and prefixes that all names share, are unwrapped like {"model": …}."""
    torch.save(WRAPPINGS[kind](state_of(Tied())), tmp_path / "a.pt")
    model = Tied(1)
    load_weights(model, tmp_path / "a.pt")
    assert same(model, Tied())


def test_a_model_inside_another_one(tmp_path: Path) -> None:
    """A wrapper of one's own takes the checkpoint of the model that it holds."""
    torch.save(state_of(Tied()), tmp_path / "a.pt")
    model = Around(Around(Tied(1)))
    load_weights(model, tmp_path / "a.pt")
    assert same(model.inner.inner, Tied())
    torch.save({"body.weight": torch.ones(4, 4)}, tmp_path / "b.pt")
    with pytest.raises(CheckpointError, match=r"of this Tied: missing: scale, embed\.weight"):
        load_weights(model, tmp_path / "b.pt")


def test_long_lists_are_counted(tmp_path: Path) -> None:
    """The first names are listed and all are counted, missing and unexpected in one error."""
    torch.save({f"other.{n}": torch.ones(1) for n in range(20)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError) as caught:
        load_weights(nn.Sequential(*(nn.Linear(2, 2) for _ in range(10))), tmp_path / "a.pt")
    text = str(caught.value)
    assert re.search(r"missing: 0\.weight, .* and 12 more \(20 in all\)", text)
    assert re.search(r"unexpected: other\.0, .* and 12 more \(20 in all\)", text)


def mixtral(seed: int = 0) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.MixtralConfig(
        vocab_size=13, hidden_size=8, intermediate_size=12, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=3,
        max_position_embeddings=16,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


def one_by_one(directory: Path) -> dict[str, Tensor]:
    """A Mixtral as its checkpoints have it: each expert's matrices by themselves."""
    from safetensors.torch import load_file

    mixtral().save_pretrained(directory)
    state = load_file(directory / "model.safetensors")
    assert any(".experts.2.w3." in name for name in state)
    return state


def test_experts_stored_one_by_one(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Fused experts are made of single ones as transformers does it, from any file, in silence."""
    state = one_by_one(tmp_path / "hf")
    torch.save({"model": state}, tmp_path / "a.pt")
    capfd.readouterr()
    for model, path in [
        (mixtral(1), tmp_path / "hf"),
        (mixtral(1), tmp_path / "a.pt"),
        (Around(mixtral(1)), tmp_path / "hf"),
        (mixtral(1).bfloat16(), tmp_path / "hf"),
    ]:
        load_weights(model, path)
        inner = model.inner if isinstance(model, Around) else model
        assert same(inner, mixtral().to(next(inner.parameters()).dtype))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("model.norm.weight", r"missing: .*unexpected: .*block_sparse_moe"),
        ("extra", r"unexpected: .*\d+ in all"),
        ("model.layers.0.block_sparse_moe.experts.1.w1.weight", "missing: .*gate_up_proj"),
    ],
)
def test_a_conversion_that_does_not_fit_is_refused(tmp_path: Path, change: str, text: str) -> None:
    """One name too few, too many or of another shape: refused with the names, the model as it was.

    transformers itself would go on with random weights in place of what is missing.
    """
    state = one_by_one(tmp_path / "hf")
    if change.endswith("norm.weight"):
        del state[change]
    else:
        state[change] = torch.ones(3, 3)
    save_file(state, tmp_path / "a.safetensors")
    model = mixtral(1)
    with pytest.raises(CheckpointError, match=f"{text}.*experts one by one"):
        load_weights(model, tmp_path / "a.safetensors")
    assert same(model, mixtral(1))


def test_single_experts_in_a_model_of_one_s_own(tmp_path: Path) -> None:
    """Where transformers cannot convert, the names are listed and the remedy is said."""
    model = nn.ModuleDict({"experts": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    torch.save({f"experts.{n}.weight": torch.ones(2, 2) for n in range(2)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"unexpected: experts\.0\.weight.*fused experts"):
        load_weights(model, tmp_path / "a.pt")
