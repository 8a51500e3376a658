"""Checkpoints: found, weighed and loaded strictly, from every usual form, with no code run."""

from __future__ import annotations

import hashlib
import json
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sdi.checkpoints import (
    Checkpoint,
    canonical_name,
    find_checkpoints,
    fingerprint,
    learning_rate,
    load_weights,
    settle_weights,
)
from sdi.errors import CheckpointError


class Tied(nn.Module):
    """A model whose head shares the embedding's weight."""

    def __init__(self, seed: int = 0, tied: bool = True, width: int = 4) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(7, width)
        self.body = nn.Linear(width, width)
        self.head = nn.Linear(width, 7, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.rand(1))


def state_of(model: nn.Module, *without: str) -> dict[str, Tensor]:
    return {
        name: value.detach().clone()
        for name, value in model.state_dict().items()
        if name not in without
    }


def same(model: nn.Module, other: nn.Module) -> bool:
    left, right = model.state_dict(), other.state_dict()
    return all(torch.equal(value, right[name]) for name, value in left.items())


def write_sharded(directory: Path, state: dict[str, Tensor]) -> Path:
    names = sorted(state)
    parts = {"model-1.safetensors": names[:2], "model-2.safetensors": names[2:]}
    directory.mkdir()
    for file, inside in parts.items():
        save_file({name: state[name] for name in inside}, directory / file)
    weight_map = {name: file for file, inside in parts.items() for name in inside}
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return directory


def write_as(form: str, root: Path, model: nn.Module) -> Path:
    """Write the model's weights in one of the forms that must be readable."""
    state, path = state_of(model), root / "step-5.pt"
    if form == "safetensors":
        save_file(state_of(model, "head.weight"), root / "step-5.safetensors")
        return root / "step-5.safetensors"
    if form == "directory":
        save_file(state_of(model, "head.weight"), root / "model.safetensors")
        return root
    if form == "sharded":
        return write_sharded(root / "sharded", state)
    if form == "odd name":
        save_file(state, root / "weights.safetensors")
        torch.save({"param_groups": []}, root / "optimizer.pt")
        return root
    if form == "trainer":
        torch.save({"model": state, "optimizer": {"state": {}}, "step": 5}, path)
    elif form == "wrapped":
        torch.save({f"module._orig_mod.{name}": value for name, value in state.items()}, path)
    elif form == "legacy":
        torch.save(state, path, _use_new_zipfile_serialization=False)
    else:
        torch.save(state, path)
    return path


FORMS = [
    "safetensors", "directory", "sharded", "odd name", "pt", "trainer", "wrapped", "legacy",
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_loads(tmp_path: Path, form: str) -> None:
    """Each form of checkpoint brings a differently initialised model to the saved weights."""
    saved, model = Tied(0), Tied(1)
    load_weights(model, write_as(form, tmp_path, saved))
    assert same(model, saved)
    assert model.head.weight is model.embed.weight
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_a_wrapped_model_loads_a_plain_checkpoint(tmp_path: Path) -> None:
    """Names match whichever side carries the wrapper's prefix."""
    model = nn.Sequential()
    model.add_module("module", Tied(1))
    load_weights(model, write_as("pt", tmp_path, Tied(0)))
    assert same(model.get_submodule("module"), Tied(0))


def test_dtype_and_buffers_are_the_model_s_own(tmp_path: Path) -> None:
    """A float32 checkpoint goes into a bf16 model as bf16, buffers included."""
    model = Tied(1).bfloat16()
    load_weights(model, write_as("pt", tmp_path, Tied(0)))
    assert model.body.weight.dtype == torch.bfloat16
    assert same(model, Tied(0).bfloat16())


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (state_of(Tied(), "body.bias"), "missing: body.bias"),
        (state_of(Tied(), "head.weight", "embed.weight"), "missing: embed.weight, head.weight"),
        (state_of(Tied()) | {"extra": torch.ones(1)}, "unexpected: extra"),
        (state_of(Tied(width=5)), r"shape: embed.weight is \(7, 5\), expected \(7, 4\)"),
        (state_of(Tied(tied=False)), "different here: .*head.weight"),
    ],
)
def test_another_model_s_checkpoint_is_refused(
    tmp_path: Path, other: dict[str, Tensor], text: str
) -> None:
    """Missing, unexpected, misshapen and wrongly tied tensors are listed; the model stays."""
    torch.save(other, tmp_path / "other.pt")
    model = Tied(1)
    with pytest.raises(CheckpointError, match=f"not a checkpoint of this Tied: .*{text}"):
        load_weights(model, tmp_path / "other.pt")
    assert same(model, Tied(1))


class Bomb:
    """Writes a file when unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("name", ["evil.pt", "optimizer.pt"])
def test_a_pickle_runs_no_code(tmp_path: Path, name: str) -> None:
    """A malicious .pt is refused with the remedy, as weights and as optimizer, and nothing ran."""
    save_file(state_of(Tied(), "head.weight"), tmp_path / "model.safetensors")
    torch.save({"model": Bomb(tmp_path / "ran")}, tmp_path / name)
    read = learning_rate if name == "optimizer.pt" else partial(load_weights, Tied())
    path = tmp_path if name == "optimizer.pt" else tmp_path / name
    with pytest.raises(CheckpointError, match="would run code: save the weights as safetensors"):
        read(path)
    assert not (tmp_path / "ran").exists()


def test_damaged_files_are_named(tmp_path: Path) -> None:
    """Truncated files, indexes that point elsewhere and non-checkpoints give one clear error."""
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0")
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04rubbish")
    (tmp_path / "notes.txt").write_text("hello")
    torch.save([1, 2], tmp_path / "list.pt")
    for name, text in {
        "cut.safetensors": "not a whole safetensors file",
        "cut.pt": "cannot be read as plain tensors",
        "notes.txt": "is not a checkpoint",
        "list.pt": "holds a list; expected a state dict",
        "absent.pt": "does not exist",
    }.items():
        with pytest.raises(CheckpointError, match=text):
            load_weights(Tied(), tmp_path / name)
    sharded = write_sharded(tmp_path / "sharded", state_of(Tied()))
    index = sharded / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../cut.safetensors"}}))
    with pytest.raises(CheckpointError, match="outside its directory"):
        load_weights(Tied(), sharded)


def test_canonical_names() -> None:
    """Wrappers' parts go, wherever they stand; the model's own submodule ``module`` stays."""
    cases = {
        "module._orig_mod.layers.0.weight": "layers.0.weight",
        "_orig_mod.module.weight": "weight",
        "layers.0._orig_mod.weight": "layers.0.weight",
        "layers.module.weight": "layers.module.weight",
        "weight": "weight",
    }
    assert {name: canonical_name(name) for name in cases} == cases


def groups(*rates: Any) -> dict[str, Any]:
    return {"state": {}, "param_groups": [{"lr": rate, "params": []} for rate in rates]}


def test_learning_rates_from_each_source(tmp_path: Path) -> None:
    """Optimizer file, trainer state, training.json: each is read, the first of them first."""
    save_file(state_of(Tied(), "head.weight"), tmp_path / "model.safetensors")
    assert learning_rate(tmp_path) == (None, "absent")
    (tmp_path / "training.json").write_text('{"learning_rate": 0.5, "step": 3}')
    assert learning_rate(tmp_path) == (0.5, "training.json")
    log = [
        {"step": 10, "learning_rate": 0.3},
        {"step": 20, "learning_rate": 0.2},
        {"step": 20, "eval_loss": 1},
        {"step": 30, "learning_rate": 0.1},
    ]
    state = {"global_step": 20, "log_history": log}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    assert learning_rate(tmp_path) == (0.2, "trainer_state.json")
    torch.save(groups(torch.tensor(0.25)), tmp_path / "optimizer.pt")
    assert learning_rate(tmp_path) == (0.25, "optimizer.pt")
    torch.save(groups(0.25, 0.75), tmp_path / "optimizer.pt")
    assert learning_rate(tmp_path) == (0.5, "optimizer.pt, mean of 2 parameter groups")


def test_learning_rates_beside_and_inside_a_file(tmp_path: Path) -> None:
    """A .pt file's own optimizer, or x.training.json, goes before what the directory shares."""
    path = tmp_path / "step-5.pt"
    torch.save({"model": state_of(Tied()), "optimizer": groups(0.125)}, path)
    (tmp_path / "training.json").write_text('{"learning_rate": 0.5}')
    assert learning_rate(path) == (0.125, "'optimizer' inside step-5.pt")
    torch.save(state_of(Tied()), path)
    assert learning_rate(path) == (0.5, "training.json")
    (tmp_path / "step-5.training.json").write_text('{"learning_rate": 0.25}')
    assert learning_rate(path) == (0.25, "step-5.training.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"learning_rate": -1}', "learning rate -1"),
        ('{"learning_rate": NaN}', "learning rate nan"),
        ('{"learning_rate": "fast"}', "'fast'; expected a number"),
        ("{", "not JSON"),
        ("[]", "holds a list"),
    ],
)
def test_impossible_learning_rates_are_refused(tmp_path: Path, text: str, message: str) -> None:
    """Negative, NaN and non-numeric rates and broken files raise and say where."""
    save_file(state_of(Tied(), "head.weight"), tmp_path / "model.safetensors")
    (tmp_path / "training.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        learning_rate(tmp_path)


def make_steps(root: Path, *steps: int, rate: float | None = 0.5) -> None:
    for step in steps:
        (root / f"step-{step}").mkdir(parents=True)
        save_file(state_of(Tied(), "head.weight"), root / f"step-{step}" / "model.safetensors")
        if rate is not None:
            text = json.dumps({"learning_rate": rate * step})
            (root / f"step-{step}" / "training.json").write_text(text)


def test_checkpoints_are_found_in_natural_order(tmp_path: Path) -> None:
    """A directory of checkpoints and a glob give the same ones, step 200 before step 1000."""
    make_steps(tmp_path, 1000, 200)
    (tmp_path / "logs").mkdir()
    found = find_checkpoints(tmp_path)
    assert [c.name for c in found] == ["step-200", "step-1000"]
    assert [c.weight for c in found] == [100.0, 500.0]
    assert {c.weight_source for c in found} == {"training.json"}
    assert find_checkpoints(str(tmp_path / "step-*")) == found
    files = find_checkpoints(str(tmp_path / "*" / "model.safetensors"))
    assert [c.name for c in files] == ["step-200", "step-1000"]


@pytest.mark.filterwarnings("ignore:no learning rate was found")
def test_a_new_file_beside_the_first_renames_nothing(tmp_path: Path) -> None:
    """A checkpoint file alone in its directory has the name it has beside later ones."""
    save_file(state_of(Tied(), "head.weight"), tmp_path / "step-1.safetensors")
    alone = find_checkpoints(tmp_path)
    save_file(state_of(Tied(), "head.weight"), tmp_path / "step-2.safetensors")
    assert [c.name for c in alone] == ["step-1"]
    assert find_checkpoints(tmp_path)[0] == alone[0]


def test_entries_may_set_weight_and_name(tmp_path: Path) -> None:
    """A mapping's weight wins over what the checkpoint says; names become safe for files."""
    make_steps(tmp_path, 1)
    entry = {"path": str(tmp_path / "step-1"), "weight": 3, "name": "a b/c"}
    assert find_checkpoints([entry]) == (Checkpoint("a-b-c", tmp_path / "step-1", 3.0, "given"),)


def test_equal_names_are_told_apart_or_refused(tmp_path: Path) -> None:
    """The directory tells equal names apart; the same checkpoint twice is refused."""
    make_steps(tmp_path / "a", 1)
    make_steps(tmp_path / "b", 1)
    assert [c.name for c in find_checkpoints(str(tmp_path / "*"))] == ["a-step-1", "b-step-1"]
    with pytest.raises(CheckpointError, match="two checkpoints are named a-step-1"):
        find_checkpoints([tmp_path / "a", tmp_path / "a" / "step-1"])


@pytest.mark.parametrize(
    ("paths", "text"),
    [
        ([], "no checkpoints were given"),
        ("nowhere/*", "no checkpoint at nowhere.*expected a .safetensors"),
        ({"file": "x"}, r"has \['file'\]; expected path"),
        ({"path": "{root}", "name": "x"}, "2 checkpoints; one name"),
        ({"path": "{root}", "weight": "high"}, "weight 'high'; expected a number"),
        ({"path": "{root}", "weight": -1.0}, "has weight -1.0"),
    ],
)
def test_entries_that_cannot_be_meant_are_refused(tmp_path: Path, paths: Any, text: str) -> None:
    """Nothing found, unknown keys, one name for two, and bad weights each have their message."""
    make_steps(tmp_path, 1, 2)
    if isinstance(paths, dict):
        paths = {k: str(tmp_path) if v == "{root}" else v for k, v in paths.items()}
    with pytest.raises(CheckpointError, match=text):
        find_checkpoints(paths)


def with_weights(*weights: float | None, source: str = "optimizer.pt") -> list[Checkpoint]:
    return [Checkpoint(f"c{i}", Path(f"c{i}"), w, source) for i, w in enumerate(weights)]


def test_an_absent_weight_is_one_said_aloud() -> None:
    """With no learning rate anywhere every weight is 1, and a warning says so."""
    with pytest.warns(UserWarning, match="no learning rate was found for c0, c1.*taken as 1"):
        settled = settle_weights(with_weights(None, None))
    assert [c.weight for c in settled] == [1.0, 1.0]
    assert settled[0].weight_source == "absent: taken as 1"


def test_absent_beside_known_learning_rates_is_refused() -> None:
    """A weight of 1 beside learning rates of 1e-4 would be all that counts: refused."""
    with pytest.raises(CheckpointError, match=r"found for c1, but c0 has 0\.0001.*drown"):
        settle_weights(with_weights(1e-4, None))


def test_zero_weights_warn_and_all_zero_is_refused() -> None:
    """η = 0 warns and names the checkpoint; nothing but zeros raises."""
    with pytest.warns(UserWarning, match="count for nothing: c1"):
        settle_weights(with_weights(1.0, 0.0))
    with pytest.raises(CheckpointError, match="every checkpoint has weight 0"):
        settle_weights(with_weights(0.0, 0.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        settle_weights(with_weights(1.0, 0.5))


def test_fingerprints_are_of_the_weights_only(tmp_path: Path) -> None:
    """A file's is its sha256; a directory's follows its weights, not its logs or place."""
    make_steps(tmp_path / "a", 1)
    make_steps(tmp_path / "b", 1, rate=None)
    file = tmp_path / "a" / "step-1" / "model.safetensors"
    assert fingerprint(file) == hashlib.sha256(file.read_bytes()).hexdigest()
    assert fingerprint(tmp_path / "a" / "step-1") == fingerprint(tmp_path / "b" / "step-1")
    save_file(state_of(Tied(1), "head.weight"), file)
    assert fingerprint(tmp_path / "a" / "step-1") != fingerprint(tmp_path / "b" / "step-1")
    with pytest.raises(CheckpointError, match="does not exist"):
        fingerprint(tmp_path / "c")


def test_a_hugging_face_model_round_trips(tmp_path: Path) -> None:
    """save_pretrained's directory, tied head and all, loads into a fresh model of its class."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=13, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    torch.manual_seed(0)
    saved = transformers.GPT2LMHeadModel(config)
    saved.save_pretrained(tmp_path)
    torch.manual_seed(1)
    model = transformers.GPT2LMHeadModel(config)
    load_weights(model, tmp_path)
    assert same(model, saved)
    # Older checkpoints on the hub lack the base model's prefix.
    bare = {
        name.removeprefix("transformer."): value
        for name, value in state_of(saved, "lm_head.weight").items()
    }
    torch.save(bare, tmp_path / "bare.bin")
    model = transformers.GPT2LMHeadModel(config)
    load_weights(model, tmp_path / "bare.bin")
    assert same(model, saved)
