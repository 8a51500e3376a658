"""A folder with a small recipe, its data and its model, and the runs made from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml
from safetensors.torch import save_file

from curate.cli import main
from curate.rundir import RunDirectory

CODE = """
import time

import sdi
import torch

from torch import nn


class Tiny(nn.Module):
    def __init__(self, width=8, depth=3, layers=0):
        super().__init__()
        self.token, self.place = nn.Embedding(259, width), nn.Embedding(24, width)
        self.head, self.spare, self.depth = nn.Linear(width, 259), nn.Linear(2, 2), depth
        made = [nn.Linear(width, width) for _ in range(max(1, layers))]
        self.body = nn.ModuleList(made) if layers else made[0]

    def forward(self, input_ids):
        hidden = self.token(input_ids) + self.place(torch.arange(input_ids.shape[1]))
        for _ in range(self.depth):
            for layer in self.body if isinstance(self.body, nn.ModuleList) else [self.body]:
                hidden = torch.tanh(layer(hidden)) + hidden
        return self.head(hidden)


def build(**args):
    torch.manual_seed(0)
    return Tiny(**args)


def scalar(model, batch):
    return sdi.causal_lm_loss(model, batch).mean()


def slow(model, batch):
    time.sleep(60)
"""


class Folder:
    """A folder with a recipe of 9 training and 3 query rows, and the run made from it."""

    def __init__(self, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path.mkdir(exist_ok=True)
        self.path, self.into, self._capsys = path, path / "run", capsys
        self.texts = [
            {"id": f"r{n}", "text": f"{n} plus {n * 7 % 5}", "kind": "ab"[n % 2]} for n in range(9)
        ]
        self.write("train", self.texts)
        self.write("query", [{**row, "id": f"q{n}"} for n, row in enumerate(self.texts[:3])])
        (path / "tiny.py").write_text(CODE)
        self.save("step-1.safetensors")
        recipe = {
            "name": "tiny",
            "model": {"source": "tiny.py:build"},
            "loop": {"body": "body"},
            "checkpoints": {"path": "step-1.safetensors", "weight": 0.1},
            "data": {
                "defaults": {"text": "text", "source": "kind", "id": "id"},
                "train": "train.jsonl",
                "query": {"like": "train", "path": "query.jsonl"},
            },
            "sketch": {"dim": 64, "budget_tokens": 64, "shard_rows": 4},
            "score": {"query": "query"},
            "filter": {"query": "query", "top": 4},
            "export": {"directory": "{run}/export"},
        }
        (path / "tiny.yaml").write_text(yaml.safe_dump(recipe))

    def write(self, name: str, rows: list[dict[str, Any]]) -> None:
        """A data file."""
        lines = (json.dumps(row) + "\n" for row in rows)
        (self.path / f"{name}.jsonl").write_text("".join(lines))

    def change(self, row: int, **columns: Any) -> None:
        """The training file, one of its rows changed."""
        self.write("train", [t | (columns if n == row else {}) for n, t in enumerate(self.texts)])

    def save(self, name: str, change: Callable[[dict[str, Any]], object] = lambda _: None) -> Path:
        """A checkpoint of the model, its tensors changed."""
        scope: dict[str, Any] = {}
        exec(compile(CODE, "tiny.py", "exec"), scope)
        tensors = scope["build"]().state_dict()
        change(tensors)
        save_file(tensors, self.path / name)
        return self.path / name

    def command(self, *sets: str, more: tuple[str, ...] = ()) -> list[str]:
        """`curate run` with `--set` for each of `sets`."""
        options = [word for text in sets for word in ("--set", text)]
        recipe = str(self.path / "tiny.yaml")
        return ["run", recipe, "--into", str(self.into), "--trust-code", "-q", *more, *options]

    def run(self, *sets: str, more: tuple[str, ...] = ()) -> None:
        """A run that ends well."""
        self._capsys.readouterr()
        status = main(self.command(*sets, more=more))
        assert status == 0, self._capsys.readouterr().err

    def refused(self, *sets: str, status: int) -> str:
        """A run that ends with `status` and one line on standard error, which is returned."""
        self._capsys.readouterr()
        before = self.listed()
        assert main(self.command(*sets)) == status
        seen = self._capsys.readouterr()
        assert seen.out == ""
        assert seen.err.startswith("curate: ")
        assert seen.err.count("\n") == 1
        assert "CURATE_TRACEBACK" not in seen.err
        assert before.items() <= self.listed().items()
        assert not list(self.into.rglob("*.partial"))
        return seen.err

    def listed(self) -> dict[str, str]:
        """The sketches and tables of the run, with their checksums, which must hold."""
        if not (self.into / "manifest.json").exists():
            return {}
        run = RunDirectory.open(self.into)
        run.verify()
        made = {str(p.relative_to(self.into)): digest for p, digest in run.listed()}
        return {p: digest for p, digest in made.items() if not p.startswith("examples")}

    def tables(self) -> dict[str, pl.DataFrame]:
        """What the run came to."""
        run = RunDirectory.open(self.into)
        return {
            "examples": run.examples("train").collect(),
            "influence": run.influence("query").collect(),
            "tops": run.tops("query").collect(),
            "decisions": run.selection("curated").collect(),
            "export": pl.read_parquet(self.into / "export" / "data" / "*.parquet"),
        }
