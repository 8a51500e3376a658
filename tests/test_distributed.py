"""Distributed checkpoints: as torch and FSDP write them, put together, with no code run."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
)

from sdi.checkpoints import find_checkpoints, fingerprint, load_weights
from sdi.distributed import distributed_files, distributed_tree
from sdi.errors import CheckpointError
from sdi.learning_rates import learning_rate
from sdi.loop import Loop
from sdi.parameter_rates import parameter_rates
from sdi.weight_files import read_weights
from tests.test_checkpoints import Bomb, Tied, same, state_of

pytestmark = pytest.mark.filterwarnings(
    # torch's own, about running without a process group and about how it stores chunks
    "ignore:torch.distributed is disabled",
    "ignore:TypedStorage is deprecated",
)


def trained(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model and an optimizer of two groups, at rates 0.1 and 0.3, after a step."""
    model = Tied(seed)
    groups = [
        {"params": [model.embed.weight], "lr": 0.1},
        {"params": list(model.body.parameters()), "lr": 0.3},
    ]
    optimizer = torch.optim.AdamW(groups)
    model.head(model.body(model.embed(torch.arange(7)))).sum().backward()
    optimizer.step()
    model.zero_grad()
    return model, optimizer


def save(state: dict[str, Any], directory: Path) -> Path:
    """Write a state with the real library, as one process."""
    dcp.save(state, checkpoint_id=str(directory), no_dist=True)
    return directory


def shapes_of(form: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The states that programs hand to dcp.save."""
    if form == "bare":
        return dict(model.state_dict())
    if form == "model":
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 5}
    states, kept = get_state_dict(model, optimizer)
    if form == "app":
        return {"app": {"model": states, "optim": kept, "epoch": 2}}
    flat = get_optimizer_state_dict(
        model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True)
    )
    return {**states, "optimizer": flat, "train_state": {"step": torch.tensor(3)}}


@pytest.mark.parametrize("form", ["bare", "model", "app", "flat"])
def test_every_form_loads(tmp_path: Path, form: str) -> None:
    """Whatever stands around the model, the saved weights come back equal, tied ones tied."""
    saved, optimizer = trained()
    model = Tied(1)
    load_weights(model, save(shapes_of(form, saved, optimizer), tmp_path / "step-5"))
    assert same(model, saved)
    assert model.head.weight is model.embed.weight


@pytest.mark.parametrize(
    ("form", "source"),
    [("model", "'optimizer'"), ("app", "'optim'"), ("flat", "'optimizer'")],
)
def test_learning_rates_inside(tmp_path: Path, form: str, source: str) -> None:
    """The groups of the optimizer inside are found, and averaged by the sizes of its state."""
    path = save(shapes_of(form, *trained()), tmp_path / "step-5")
    rate, where = learning_rate(path)
    assert rate == pytest.approx((28 * 0.1 + 20 * 0.3) / 48)
    assert where.startswith(f"{source} inside step-5, mean of")
    found = find_checkpoints(path)[0]
    assert found.name == "step-5"
    assert found.recorded is not None


def test_a_trainer_s_fsdp_directory(tmp_path: Path) -> None:
    """pytorch_model_fsdp_0 beside optimizer_0 is the checkpoint's model and its optimizer."""
    saved, optimizer = trained()
    root = tmp_path / "checkpoint-500"
    save({"model": saved.state_dict()}, root / "pytorch_model_fsdp_0")
    _, kept = get_state_dict(saved, optimizer)
    save({"optimizer": kept}, root / "optimizer_0")
    for path in (root, root / "pytorch_model_fsdp_0"):
        model = Tied(1)
        load_weights(model, path)
        assert same(model, saved)
        assert find_checkpoints(path)[0].name == "checkpoint-500"
        assert learning_rate(path)[0] == pytest.approx((28 * 0.1 + 20 * 0.3) / 48)
    assert [c.path for c in find_checkpoints(tmp_path)] == [root]


TWO_RANKS = """
import os, sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.fsdp import fully_shard
rank, directory = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
whole = torch.arange(35, dtype=torch.bfloat16).reshape(5, 7)
state = {
    "rows": distribute_tensor(whole, mesh, [Shard(0)]),
    "columns": distribute_tensor(whole.double(), mesh, [Shard(1)]),
    "one": distribute_tensor(torch.ones(1, 3), mesh, [Shard(0)]),
    "both": whole.float(),
    "scalar": torch.tensor(2.5),
}
dcp.save({"model": state}, checkpoint_id=f"{directory}/sharded")
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.LayerNorm(5))
torch.save(model.state_dict(), f"{directory}/whole-{rank}.pt")
fully_shard(model, mesh=mesh)
groups = [{"params": [p for p in model.parameters() if p.ndim == n], "lr": n / 8} for n in (1, 2)]
optimizer = torch.optim.AdamW(groups)
kept = get_state_dict(model, optimizer)
dcp.save(dict(zip(("model", "optim"), kept)), checkpoint_id=f"{directory}/fsdp")
dist.barrier()
os._exit(0)  # gloo's threads do not always survive an orderly exit
"""


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that two processes wrote, each the chunks that it holds."""
    directory = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-W", "ignore", "-c", TWO_RANKS]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(directory)], env=environment, stderr=subprocess.PIPE
        )
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=240)[1].decode() for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), errors
    return directory / "sharded"


def test_shards_are_put_together(sharded: Path) -> None:
    """Tensors that two ranks hold in uneven chunks, by rows and by columns, come back whole."""
    assert len(distributed_files(sharded)) == 3
    whole = torch.arange(35, dtype=torch.bfloat16).reshape(5, 7)
    expected = {
        "rows": whole,
        "columns": whole.double(),
        "one": torch.ones(1, 3),
        "both": whole.float(),
        "scalar": torch.tensor(2.5),
    }
    found = read_weights(sharded)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


def test_fsdp_s_own_checkpoint(sharded: Path) -> None:
    """What fully_shard saves loads into the plain model, and its optimizer's rates have names."""
    model = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5))
    load_weights(model, sharded.parent / "fsdp")
    whole = torch.load(sharded.parent / "whole-0.pt", weights_only=True)
    assert all(torch.equal(value, whole[name]) for name, value in model.state_dict().items())
    rates = parameter_rates(sharded.parent / "fsdp", Loop(model, "0"))
    assert rates == {"0.weight": 0.25, "0.bias": 0.125}


def test_a_missing_rank_is_named(sharded: Path, tmp_path: Path) -> None:
    """Without one rank's file the checkpoint is refused, and the file is named."""
    for file in sharded.iterdir():
        if not file.name.startswith("__1_"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    for read in (read_weights, find_checkpoints):
        with pytest.raises(CheckpointError, match=r"not whole: __1_0\.distcp.*files of every rank"):
            read(tmp_path)


class Evil:
    """Pickles as a call of any function that can be named."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call[0], tuple(self.call[1:])


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (os.system, "system"),
        (eval, "builtins.eval"),
        (getattr, "builtins.getattr"),
        (torch.load, "torch.serialization.load"),
        (Path.touch, "Path.touch"),
        (pickle.loads, "pickle.loads"),
    ],
)
def test_malicious_metadata_runs_no_code(
    tmp_path: Path, function: Callable[..., Any], name: str
) -> None:
    """A pickle that names anything but a checkpoint's description is refused by that name."""
    save(dict(Tied().state_dict()), tmp_path / "evil")
    good = pickle.loads((tmp_path / "evil" / ".metadata").read_bytes())
    good.planner_data = Evil(function, f"touch {tmp_path / 'ran'}")
    (tmp_path / "evil" / ".metadata").write_bytes(pickle.dumps(good))
    with pytest.raises(CheckpointError, match=f"it names .*{name.rpartition('.')[2]}"):
        load_weights(Tied(), tmp_path / "evil")
    with pytest.raises(CheckpointError, match="could run code"):
        fingerprint(tmp_path / "evil")
    assert not (tmp_path / "ran").exists()


class _OfEarly311(pickle.Pickler):
    """Pickles members of enumerations as Python 3.11.2 does."""

    def reducer_override(self, obj: Any) -> Any:
        return (getattr, (type(obj), obj.name)) if isinstance(obj, Enum) else NotImplemented


def test_metadata_that_an_early_python_3_11_wrote(tmp_path: Path) -> None:
    """There a member of an enumeration is pickled as a call of getattr."""
    save(dict(Tied().state_dict()), tmp_path / "c")
    metadata = tmp_path / "c" / ".metadata"
    out = io.BytesIO()
    _OfEarly311(out).dump(pickle.loads(metadata.read_bytes()))
    assert b"getattr" in out.getvalue()
    metadata.write_bytes(out.getvalue())
    load_weights(Tied(), tmp_path / "c")


def test_malicious_paths_in_metadata_are_inert(tmp_path: Path) -> None:
    """The one name with methods of its own, a path, is a stand-in that touches nothing."""
    save(dict(Tied().state_dict()), tmp_path / "c")
    file = tmp_path / "c" / ".metadata"
    good = pickle.loads(file.read_bytes())
    good.planner_data = Evil(type(tmp_path), str(tmp_path / "ran"))
    file.write_bytes(pickle.dumps(good))
    assert set(distributed_tree(tmp_path / "c")) == set(Tied().state_dict())
    assert not (tmp_path / "ran").exists()


def test_malicious_items_run_no_code(tmp_path: Path) -> None:
    """An object in the data, such as the optimizer's rate, is read as plain tensors or refused."""
    optimizer = {"param_groups": [{"lr": Bomb(tmp_path / "ran")}]}
    path = save({"model": Tied().state_dict(), "optimizer": optimizer}, tmp_path / "c")
    with pytest.raises(CheckpointError, match=r"param_groups\.0\.lr.*would run code"):
        learning_rate(path)
    assert not (tmp_path / "ran").exists()
    model = Tied(1)
    load_weights(model, path)
    assert same(model, Tied())


def spoil(directory: Path, change: Callable[[Metadata], None]) -> Path:
    """Write a checkpoint and change its metadata."""
    save({"w": torch.ones(4, 3), "n": 1}, directory)
    file = directory / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    change(metadata)
    file.write_bytes(pickle.dumps(metadata))
    return directory


def _entry(metadata: Metadata) -> Any:
    return metadata.state_dict_metadata["w"]


def _storage(metadata: Metadata) -> Any:
    return next(info for index, info in metadata.storage_data.items() if index.fqn == "w")


def _set(of: Callable[[Metadata], Any], **values: Any) -> Callable[[Metadata], None]:
    def change(metadata: Metadata) -> None:
        for name, value in values.items():
            setattr(of(metadata), name, value)

    return change


def _twice(metadata: Metadata) -> None:
    """Half of the tensor, two times: as large as the whole."""
    chunk = _entry(metadata).chunks[0]
    chunk.sizes = torch.Size([2, 3])
    _entry(metadata).chunks = [chunk, chunk]


SPOILT = {
    "outside": (_set(_storage, relative_path="../x.distcp"), "outside of the directory"),
    "absolute": (_set(_storage, relative_path="/etc/passwd"), "outside of the directory"),
    "huge": (_set(_entry, size=torch.Size([10**12, 3])), "not the whole of it"),
    "partial": (_set(_entry, size=torch.Size([5, 3])), "not the whole of it"),
    "beyond": (_set(_entry, size=torch.Size([3, 3])), "does not fit into it"),
    "negative": (_set(_storage, offset=-1), "stored at bytes -1"),
    "short": (_set(_storage, length=7), "does not fit into it"),
    "past the end": (_set(_storage, offset=10**9), "reach beyond the end"),
    "overlap": (_twice, "two chunks of w overlap"),
    "compressed": (_set(_storage, transform_descriptors=["zstd"]), "written through"),
    "nowhere": (_set(lambda m: m, storage_data={}), "stored nowhere"),
    "empty": (_set(lambda m: m, state_dict_metadata=None), "lists no entries"),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_metadata_that_cannot_be_true_is_refused(tmp_path: Path, kind: str) -> None:
    """Bytes elsewhere, and chunks that leave gaps, overlap or lie outside, are refused."""
    change, text = SPOILT[kind]
    with pytest.raises(CheckpointError, match=text):
        read_weights(spoil(tmp_path / "c", change))


def test_no_metadata_at_all(tmp_path: Path) -> None:
    """Rubbish in place of the metadata gives the same one line."""
    save({"w": torch.ones(2)}, tmp_path / "c")
    for rubbish in (b"", b"hello", pickle.dumps([1]), b"\x80\x04."):
        (tmp_path / "c" / ".metadata").write_bytes(rubbish)
        with pytest.raises(CheckpointError, match="metadata"):
            read_weights(tmp_path / "c")


def test_the_fingerprint_follows_the_data(tmp_path: Path) -> None:
    """It covers the metadata and every file it names, wherever the directory is."""
    one = save(dict(Tied().state_dict()), tmp_path / "one")
    before = fingerprint(one)
    one.rename(tmp_path / "moved")
    assert fingerprint(tmp_path / "moved") == before
    assert fingerprint(save(dict(Tied(1).state_dict()), tmp_path / "two")) != before


def test_two_models_side_by_side_are_refused(tmp_path: Path) -> None:
    """Which of two wrapped states is meant cannot be told, in either format."""
    state: dict[str, Tensor] = state_of(Tied())
    both = {"a": {"model": state}, "b": {"model": state}}
    torch.save(both, tmp_path / "both.pt")
    for path in (save(both, tmp_path / "both"), tmp_path / "both.pt"):
        with pytest.raises(CheckpointError, match=r"several models \(a\.model, b\.model\)"):
            read_weights(path)
    torch.save({"ema": {"model": state}, "net": state}, tmp_path / "ema.pt")
    with pytest.raises(CheckpointError, match=r"several models \(ema\.model, net\)"):
        read_weights(tmp_path / "ema.pt")


def test_deepspeed_is_refused_with_the_command(tmp_path: Path) -> None:
    """ZeRO's partitions need deepspeed to put them together; the message is the command for it.

    The layout is deepspeed's; what is in the files is not looked at.
    """
    inside = tmp_path / "checkpoint-9" / "global_step9"
    inside.mkdir(parents=True)
    torch.save({"module": {}}, inside / "mp_rank_00_model_states.pt")
    torch.save({}, inside / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    command = r"python \S+/checkpoint-9/zero_to_fp32\.py \S+/checkpoint-9 "
    for path in (inside.parent, inside):
        with pytest.raises(CheckpointError, match=f"DeepSpeed checkpoint.*{command}"):
            load_weights(Tied(), path)
    for path in (inside.parent, tmp_path):
        with pytest.raises(CheckpointError, match="DeepSpeed checkpoint"):
            find_checkpoints(path)
    save_file(state_of(Tied(), "head.weight"), inside.parent / "model.safetensors")
    model = Tied(1)
    load_weights(model, inside.parent)
    assert same(model, Tied())


def test_dcp_as_safetensors(tmp_path: Path) -> None:
    """What dcp writes as whole safetensors is read; files of single ranks are refused."""
    state = state_of(Tied())
    for name, sharded in (("whole", False), ("ranks", True)):
        writer = dcp.HuggingFaceStorageWriter(str(tmp_path / name), save_distributed=sharded)
        dcp.save(dict(state), storage_writer=writer, no_dist=True)
    model = Tied(1)
    load_weights(model, tmp_path / "whole")
    assert same(model, Tied())
    with pytest.raises(CheckpointError, match="consolidate_safetensors_files"):
        read_weights(tmp_path / "ranks")


def test_rates_given_by_name_go_first(tmp_path: Path) -> None:
    """training.json beside a distributed checkpoint may give the rates by name."""
    path = save(shapes_of("model", *trained()), tmp_path / "c")
    (path / "training.json").write_text(json.dumps({"learning_rates": {"body": 0.5}}))
    assert learning_rate(path) == (0.5, "training.json")
