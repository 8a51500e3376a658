"""What a sketch pass costs beside a plain training step and beside its floor.

    python -m tests.benchmarks.passes [--case NAME ...] [--rounds N] [--json FILE]

For each case, in one process and interleaved round by round: a training step (forward, backward,
SGD), the floor (forward, and backward to the activations only), and our pass with each evaluation.
Printed are medians as ratios to the training step, their spread (the quartiles), rows per second,
and what a row costs on disk. Threads are torch's own; set OMP_NUM_THREADS to change them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sdi


@dataclass(frozen=True)
class Case:
    """A looped GPT: width d, tokens T, steps τ, sketch dimension m, rows B, data type."""

    name: str
    width: int
    tokens: int
    steps: int
    dim: int
    rows: int
    dtype: str = "float32"


CASES = (
    Case("d128", 128, 64, 8, 4096, 16),
    Case("d256", 256, 256, 8, 4096, 4),
    Case("d512", 512, 256, 4, 4096, 4),
    Case("d256 bf16", 256, 256, 8, 4096, 4, "bfloat16"),
    Case("d512 bf16", 512, 256, 4, 4096, 4, "bfloat16"),
)
VOCABULARY = 256


class Block(nn.Module):
    """Causal attention and a feed-forward part, each after a norm."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        split = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(split[0], split[1], split[2], is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class LoopedGPT(nn.Module):
    """Embedding, one block τ times, head."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, case.width)
        self.body = Block(case.width)
        self.head = nn.Linear(case.width, VOCABULARY)
        self.steps = case.steps

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for _ in range(self.steps):
            x = self.body(x)
        return self.head(x)


def passes(case: Case) -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""
    torch.manual_seed(0)
    model = LoopedGPT(case).to(getattr(torch, case.dtype))
    ids = torch.randint(0, VOCABULARY, (case.rows, case.tokens))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    names = [str(row) for row in range(case.rows)]
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)

    def train() -> None:
        optimizer.zero_grad()
        sdi.causal_lm_loss(model, batch).mean().backward()
        optimizer.step()

    def floor() -> None:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        state = model.embed(ids).requires_grad_()
        x = state
        for _ in range(case.steps):
            x = model.body(x)
        logits = model.head(x)[:, :-1].flatten(0, 1).float()
        torch.autograd.grad(F.cross_entropy(logits, ids[:, 1:].flatten()), state)
        for parameter in model.parameters():
            parameter.requires_grad_(True)

    found: dict[str, Callable[[], Any]] = {"training step": train, "floor": floor}
    for method in ("outer", "fourier", "auto"):
        sketcher = sdi.Sketcher(sdi.Loop(model, "body"), dim=case.dim, method=method)  # type: ignore[arg-type]
        found[method] = lambda sketcher=sketcher: sketcher(batch, names)
    return found


def measured(case: Case, rounds: int) -> list[dict[str, Any]]:
    """A line for each pass: seconds (median, quartiles), ratio to the training step."""
    work = passes(case)
    for run in work.values():
        run()  # compiles, allocates
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, run in work.items():
            begin = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begin)
    base = statistics.median(times["training step"])
    lines = []
    for name, seconds in times.items():
        low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
        lines.append(
            {
                "case": asdict(case),
                "pass": name,
                "seconds": middle,
                "ratio": middle / base,
                "quartiles": [low / base, high / base],
                "rows per second": case.rows / middle,
                "bytes per row": case.steps * (case.dim + 8),
            }
        )
    return lines


def main() -> None:
    """Run the cases and print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.passes", description=__doc__)
    parser.add_argument("--case", action="append", choices=[case.name for case in CASES])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    lines: list[dict[str, Any]] = []
    sys.stdout.write(f"{'case':<12}{'pass':<15}{'ratio':>7}{'quartiles':>15}{'rows/s':>9}\n")
    for case in CASES:
        if given.case and case.name not in given.case:
            continue
        for line in measured(case, given.rounds):
            lines.append(line)
            low, high = line["quartiles"]
            sys.stdout.write(
                f"{case.name:<12}{line['pass']:<15}{line['ratio']:>7.2f}{low:>8.2f}-{high:<6.2f}"
                f"{line['rows per second']:>9.1f}\n"
            )
            sys.stdout.flush()
    if given.json:
        given.json.write_text(json.dumps({"threads": torch.get_num_threads(), "lines": lines}))


if __name__ == "__main__":
    main()
