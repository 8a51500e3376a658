"""A run small enough for tests: a looped model of two matrices, its checkpoints, its examples."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from curate.examples import load_examples
from curate.rundir import RunDirectory
from curate.sketching import LoopOptions, SketchOptions
from curate.sources import DataSpec
from sdi.checkpoints import Checkpoint, find_checkpoints

LOOP = LoopOptions(body=("body",))
OPTIONS = SketchOptions(dim=64, budget_tokens=96, shard_rows=7, device="cpu")


class Looped(nn.Module):
    """Bytes to logits through one body, used three times."""

    def __init__(self, width: int = 8, steps: int = 3) -> None:
        super().__init__()
        self.steps = steps
        self.embed = nn.Embedding(300, width)
        self.body = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
        self.head = nn.Linear(width, 300)

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, T) token ids to (B, T, 300) logits."""
        state = self.embed(input_ids)
        for _ in range(self.steps):
            state = state + self.body(state)
        return self.head(state)


def factory() -> Looped:
    """A model of the test's shape."""
    torch.manual_seed(0)
    return Looped()


def checkpoints(directory: Path, names: tuple[str, ...] = ("early", "late")) -> list[Checkpoint]:
    """Checkpoints of weights of their own, saved beside each other with weights η."""
    directory.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        torch.manual_seed(number + 1)
        save_file(Looped().state_dict(), directory / f"{name}.safetensors")
    listed = [
        {"path": str(directory / f"{name}.safetensors"), "weight": 0.1 * (number + 1)}
        for number, name in enumerate(names)
    ]
    return list(find_checkpoints(listed))


def write_texts(path: Path, rows: int) -> Path:
    """A JSONL file of texts of unequal lengths, each with an id."""
    lines = (
        json.dumps({"id": f"r{n}", "text": f"{n} plus " * (1 + n % 4) + str(n)})
        for n in range(rows)
    )
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def add_texts(run: RunDirectory, name: str, path: Path, role: str = "train") -> None:
    """Load a file of texts into the run as a set."""
    spec = DataSpec.of({"path": str(path), "text": "text", "id": "id", "role": role})
    run.add_set(load_examples(spec, run.stage(name), name=name, known_ids=run.ids(name)))


def make_run(directory: Path, *, queries: int = 4) -> RunDirectory:
    """A run in `directory`/run of 17 training rows, the longest of 30 tokens, and of queries."""
    directory.mkdir(exist_ok=True)
    run = RunDirectory.create(directory / "run")
    add_texts(run, "train", write_texts(directory / "train.jsonl", 17))
    if queries:
        add_texts(run, "test", write_texts(directory / "test.jsonl", queries), "query")
    return run
