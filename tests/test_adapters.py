"""LoRA adapters: put onto a model that has them, or merged exactly; refused where they cannot be.

What peft writes is tested where peft is installed; the arithmetic of the merge also without it, on
files of the same layout.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sdi
from curate.errors import CurateError, UsageError
from curate.models import build_model
from curate.rundir import RunDirectory
from curate.sketching import sketch_run
from sdi.checkpoints import base_weights, find_checkpoints, fingerprint, load_weights
from sdi.errors import CheckpointError
from tests.looped import make, names, tokens
from tests.loopedrun import LOOP, OPTIONS, Looped, add_texts, write_texts
from tests.test_checkpoints import Bomb

# peft's own, about models that are not transformers'
pytestmark = [
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
    pytest.mark.filterwarnings("ignore:.*fan_in_fan_out"),
    pytest.mark.filterwarnings("ignore:Unable to fetch remote file"),
    # of a bias of B, which it takes for a torn matrix
    pytest.mark.filterwarnings("ignore:Adapter 'default'"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
]


def built(seed: int = 0) -> Looped:
    torch.manual_seed(seed)
    return Looped().eval()


def write(
    directory: Path, tensors: dict[str, Tensor] | None = None, seed: int = 5, **settings: Any
) -> Path:
    """An adapter of rank 2 on body.0 of `Looped`, in peft's layout."""
    directory.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    given = {
        "base_model.model.body.0.lora_A.weight": torch.randn(2, 8),
        "base_model.model.body.0.lora_B.weight": torch.randn(8, 2),
    }
    save_file(given if tensors is None else tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "use_dora": False, "loftq_config": {}}
    (directory / "adapter_config.json").write_text(json.dumps(config | settings))
    return directory


def factors(directory: Path) -> tuple[Tensor, Tensor]:
    held = load_file(directory / "adapter_model.safetensors")
    prefix = "base_model.model.body.0.lora_"
    return held[f"{prefix}A.weight"], held[f"{prefix}B.weight"]


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, 3.0),
        ({"use_rslora": True}, 6 / 2**0.5),
        ({"alpha_pattern": {"body.0": 1}}, 0.5),
        ({"alpha_pattern": {"dy.0": 1}, "r": 4, "rank_pattern": {r".*\.0": 2}}, 3.0),
    ],
)
def test_the_sum_is_w_plus_s_b_a(tmp_path: Path, settings: dict[str, Any], scale: float) -> None:
    """The merged weight is W + (alpha/r) B A, alpha/√r with rslora, and nothing else changes."""
    model, before = built(), base_weights(built())
    path = write(tmp_path / "a", **settings)
    load_weights(model, path)
    left, right = factors(path)
    after = base_weights(model)
    delta = after.pop("body.0.weight") - before.pop("body.0.weight")
    torch.testing.assert_close(delta, scale * right @ left)
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_adapters_in_turn_have_one_base(tmp_path: Path) -> None:
    """A second adapter goes onto the base, not onto the first; without a base it is refused."""
    first, second = write(tmp_path / "1"), write(tmp_path / "2", seed=6)
    model, alone = built(), built()
    base = base_weights(model)
    load_weights(alone, second)
    load_weights(model, first, base=base)
    load_weights(model, second, base=base)
    assert torch.equal(model.body[0].weight, alone.body[0].weight)
    with pytest.raises(CheckpointError, match=r"merged into this model already.*base_weights"):
        load_weights(model, first)
    torch.save(built().state_dict(), tmp_path / "whole.pt")
    load_weights(model, tmp_path / "whole.pt")
    load_weights(model, second)
    assert torch.equal(model.body[0].weight, alone.body[0].weight)


def test_the_base_that_the_adapter_names(tmp_path: Path) -> None:
    """A base directory that is there goes before the model's own weights, and is fingerprinted."""
    (tmp_path / "base").mkdir()
    save_file(built(1).state_dict(), tmp_path / "base" / "model.safetensors")
    path = write(tmp_path / "a", base_model_name_or_path=str(tmp_path / "base"))
    model, other = built(2), built(1)
    for _ in range(2):
        load_weights(model, path)
    load_weights(other, write(tmp_path / "b"))
    assert all(torch.equal(v, other.state_dict()[n]) for n, v in model.state_dict().items())
    before = fingerprint(path)
    save_file(built(3).state_dict(), tmp_path / "base" / "model.safetensors")
    assert fingerprint(path) != before


def test_the_fingerprint_covers_the_base(tmp_path: Path) -> None:
    """Without a base directory, the weights the model was built with are part of it."""
    path = write(tmp_path / "a")
    prints = {fingerprint(path, built(seed)) for seed in (0, 0, 1)} | {fingerprint(path)}
    assert len(prints) == 3
    assert fingerprint(path / "adapter_model.safetensors", built()) in prints
    assert fingerprint(write(tmp_path / "b", lora_alpha=7), built()) not in prints


A, B = "base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight"


def pair(module: str, out: int = 8, width: int = 8) -> dict[str, Tensor]:
    return {A.format(module): torch.ones(2, width), B.format(module): torch.ones(out, 2)}


@pytest.mark.parametrize(
    ("tensors", "settings", "text"),
    [
        (None, {"use_dora": True}, "uses use_dora"),
        (None, {"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        (None, {"target_parameters": ["w"]}, "uses target_parameters"),
        (None, {"some_new_method": {"k": 1}}, "uses some_new_method"),
        (None, {"peft_type": "IA3"}, "of type IA3; expected LORA"),
        (None, {"r": 3}, "rank 2 on body.0, and its settings rank 3"),
        (None, {"lora_alpha": None}, "alpha None"),
        (None, {"alpha_pattern": {"(": 1}}, "for a pattern"),
        (pair("body.9"), {}, "the model has no body.9"),
        (pair("body"), {}, "body, a Sequential, has lora_A, lora_B"),
        (pair("embed"), {}, "embed, a Embedding, has lora_A, lora_B"),
        (pair("body.0", width=5), {}, r"body.0 is \(8, 8\), not \(8, 5\)"),
        ({A.format("body.0"): torch.ones(2, 8)}, {}, "body.0, a Linear, has lora_A"),
        (pair("body.0") | {"base_model.model.x.weight": torch.ones(1)}, {}, "replaces x.weight"),
        (
            pair("body.0") | {"base_model.model.body.0.lora_magnitude_vector": torch.ones(8)},
            {},
            "lora_magnitude_vector",
        ),
    ],
)
def test_what_cannot_be_merged_is_refused_by_name(
    tmp_path: Path, tensors: dict[str, Tensor] | None, settings: dict[str, Any], text: str
) -> None:
    """Other methods, other initialisations, other targets, other shapes; the model stays."""
    model, before = built(), base_weights(built())
    with pytest.raises(CheckpointError, match=text):
        load_weights(model, write(tmp_path / "a", tensors, **settings))
    assert all(torch.equal(v, before[n]) for n, v in base_weights(model).items())


def test_one_of_two_tied_weights_is_refused(tmp_path: Path) -> None:
    """An adapter on a head that is the embedding unties them, which a plain model cannot show."""
    model = built()
    model.head.weight = model.embed.weight
    with pytest.raises(CheckpointError, match=r"embed\.weight, head\.weight are one tied weight"):
        load_weights(model, write(tmp_path / "a", pair("head", out=300)))


def test_a_convolution_is_refused(tmp_path: Path) -> None:
    """A target that is no matrix is named with its type."""
    model = nn.Sequential(nn.Conv1d(3, 4, 2))
    tensors = {A.format("0"): torch.ones(2, 3, 2), B.format("0"): torch.ones(4, 2, 1)}
    with pytest.raises(CheckpointError, match="0, a Conv1d, has lora_A, lora_B"):
        load_weights(model, write(tmp_path / "a", tensors))


def test_a_directory_with_both_is_refused(tmp_path: Path) -> None:
    """An adapter beside a whole model: which of them is meant cannot be told."""
    path = write(tmp_path / "a")
    save_file(built().state_dict(), path / "model.safetensors")
    with pytest.raises(CheckpointError, match="both a whole model"):
        load_weights(built(), path)


def test_a_malicious_adapter_runs_no_code(tmp_path: Path) -> None:
    """An adapter saved as a pickle is read as plain tensors or refused."""
    path = write(tmp_path / "a")
    (path / "adapter_model.safetensors").unlink()
    torch.save({A.format("body.0"): Bomb(tmp_path / "ran")}, path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="would run code"):
        load_weights(built(), path)
    assert not (tmp_path / "ran").exists()


# -- in a run -------------------------------------------------------------------------------------


def test_a_run_over_adapters_and_a_whole_checkpoint(tmp_path: Path) -> None:
    """In any order each is sketched as it would be alone, and another base is refused."""
    run = RunDirectory.create(tmp_path / "run")
    add_texts(run, "train", write_texts(tmp_path / "train.jsonl", 5))
    torch.save(built(4).state_dict(), tmp_path / "b.pt")
    paths = [write(tmp_path / "a"), tmp_path / "b.pt", write(tmp_path / "c", seed=7)]
    found = find_checkpoints([{"path": path, "weight": 1.0} for path in paths])
    sketch_run(run, built, LOOP, found, options=OPTIONS)
    examples = run.example_set("train")
    for checkpoint in found:
        model = built()
        load_weights(model, checkpoint.path)
        sketcher = sdi.Sketcher(sdi.Loop(model, "body"), dim=64, checkpoint=checkpoint.name)
        shards = run.shards("train", checkpoint.name, "steps")
        stored = np.concatenate([shard.block() for _, _, shard in shards])
        for row in range(5):
            ids, labels = (torch.tensor(a)[None].long() for a in examples.tokens(row))
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
            values = sketcher(batch, ids=["one"]).values[0]
            assert np.abs(stored[row] - values.numpy()).max() < values.abs().max().item() / 200
    with pytest.raises(CurateError, match="checkpoint 'a' = "):
        sketch_run(run, lambda: built(9), LOOP, found, options=OPTIONS)


def test_hf_models_by_their_adapter(tmp_path: Path) -> None:
    """hf:DIR of an adapter builds the base it names, and says so where that is not here."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=13, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    saved = transformers.GPT2LMHeadModel(config)
    saved.save_pretrained(tmp_path / "base")
    path = write(tmp_path / "a", base_model_name_or_path=str(tmp_path / "base"))
    model = build_model(f"hf:{path}", {}, tmp_path)
    assert type(model) is type(saved)
    write(tmp_path / "a", base_model_name_or_path="someone/model")
    with pytest.raises(UsageError, match="adapter on 'someone/model', which is no directory"):
        build_model(f"hf:{path}", {}, tmp_path)


# -- with peft ------------------------------------------------------------------------------------


def peft_on(model: nn.Module, seed: int = 1, **settings: Any) -> Any:
    """The model with an adapter of random factors, B included."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**{"r": 2, "lora_alpha": 6} | settings))
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) * 0.1
    return wrapped.eval()


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=13, n_positions=8, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
        tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


PEFT: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "linear": (built, {"target_modules": ["0", "2"]}),
    "rslora": (built, {"target_modules": ["0"], "use_rslora": True}),
    "patterns": (
        built,
        {"target_modules": ["0", "2"], "rank_pattern": {"0": 3}, "alpha_pattern": {"body.2": 1}},
    ),
    "bias": (built, {"target_modules": ["0"], "bias": "all"}),
    "lora bias": (built, {"target_modules": ["0"], "lora_bias": True}),
    "embedding": (built, {"target_modules": ["embed", "0"]}),
    "saved module": (built, {"target_modules": ["0"], "modules_to_save": ["head"]}),
    "conv1d": (gpt2, {"target_modules": ["c_attn", "wte"], "fan_in_fan_out": True}),
}


@pytest.mark.parametrize("kind", PEFT)
def test_a_merge_is_peft_s_own(tmp_path: Path, kind: str) -> None:
    """What peft saves, merged into a plain model, computes what peft's model computes."""
    factory, settings = PEFT[kind]
    wrapped = peft_on(factory(), **settings)
    wrapped.save_pretrained(tmp_path)
    model = factory()
    load_weights(model, tmp_path)
    ids = torch.arange(12).reshape(2, 6)
    outputs = [m(ids) if kind != "conv1d" else m(ids).logits for m in (model, wrapped)]
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    merged = wrapped.merge_and_unload().state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, merged[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [*PEFT, "dora"])
def test_an_adapter_onto_a_model_that_has_it(tmp_path: Path, kind: str) -> None:
    """A model built with peft gets the saved factors (and biases, and modules), each in place."""
    factory, settings = PEFT.get(kind, (built, {"target_modules": ["0"], "use_dora": True}))
    saved = peft_on(factory(), **settings)
    saved.save_pretrained(tmp_path)
    model = peft_on(factory(), seed=2, **settings)
    load_weights(model, tmp_path)
    ours, theirs = model.state_dict(), saved.state_dict()
    same = {name for name, value in theirs.items() if torch.equal(value, ours[name])}
    # With modules_to_save peft keeps the base's copy too, which the adapter does not hold.
    assert {n for n in theirs if n not in same} <= {n for n in theirs if "original_module" in n}


def test_the_base_below_a_model_that_has_the_adapter(tmp_path: Path) -> None:
    """A base directory fills the weights below the factors, whatever the model was built from."""
    (tmp_path / "base").mkdir()
    save_file(built(1).state_dict(), tmp_path / "base" / "model.safetensors")
    saved = peft_on(built(1), target_modules=["0"])
    saved.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    saved.save_pretrained(tmp_path / "a")
    model = peft_on(built(3), seed=2, target_modules=["0"])
    load_weights(model, tmp_path / "a")
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in saved.state_dict().items())


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ({"lora_alpha": 7}, r"scales the adapter on body\.0 by 3\.5 and .* trained with 3;"),
        ({"use_rslora": True}, "by 4.24264"),
        ({"r": 4, "lora_alpha": 12}, "its settings rank 2"),
        ({"target_modules": ["0", "2"]}, r"missing: body\.2\.lora_A\.weight, body\.2\.lora_B"),
        ({"target_modules": ["2"]}, r"missing: .*unexpected: body\.0\.lora_A\.weight"),
    ],
)
def test_another_adapter_s_settings_are_refused(
    tmp_path: Path, other: dict[str, Any], text: str
) -> None:
    """A factor that is no tensor is compared too, and names are listed as for any checkpoint."""
    peft_on(built(), target_modules=["0"]).save_pretrained(tmp_path)
    model = peft_on(built(), **({"target_modules": ["0"]} | other))
    with pytest.raises(CheckpointError, match=text):
        load_weights(model, tmp_path)


def test_only_the_factors_are_attributed(tmp_path: Path) -> None:
    """On a model built with peft the sketch is of A and B alone, and agrees with autograd."""
    settings = {"target_modules": ["qkv", "up", "down"]}
    saved = peft_on(make(), **settings)
    saved.save_pretrained(tmp_path)
    model = peft_on(make(), seed=2, **settings)
    load_weights(model, tmp_path)
    loop = sdi.Loop(model, "base_model.model.body")
    assert len(loop.parameters()) == 6
    assert all(".lora_" in name for name in loop.parameters())
    sketcher = sdi.Sketcher(loop, dim=256)
    check = sdi.self_check(sketcher, tokens(), names(4))
    assert check.worst < 1e-4 and check.sketch is not None
