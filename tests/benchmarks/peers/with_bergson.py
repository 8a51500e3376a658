"""bergson: the per-row gradients of its hooks, not projected.

Its collectors are run as its own `CollectorComputer` runs them, around a forward and a backward
pass; the rows have one token, since the hooks want (rows, tokens, width).
"""

from __future__ import annotations

from collections.abc import Callable

import cases
import torch
from bergson import GradientCollector, GradientProcessor, IndexConfig
from bergson.collector.collector import HookCollectorBase
from bergson.collector.gradient_collectors import TraceCollector
from cases import Case, Rows
from datasets import Dataset
from judge import Way, drive
from torch import Tensor, nn

NOTE = "each call overwrites the input that the hooks keep, the first backward call deletes it"
Collect = Callable[[nn.Module, int], HookCollectorBase]


def index(model: nn.Module, size: int) -> HookCollectorBase:
    """`GradientCollector`, which builds the index, kept from writing to disk."""
    return GradientCollector(
        model=model,
        data=Dataset.from_dict({"row": list(range(size))}),
        cfg=IndexConfig(run_path="unused"),
        processor=GradientProcessor(projection_dim=None),
        skip_index=True,
    )


def trace(model: nn.Module, size: int) -> HookCollectorBase:
    """`TraceCollector`, which an `Attributor` uses on queries."""
    return TraceCollector(
        model=model, processor=GradientProcessor(projection_dim=None), device="cpu",
        dtype=torch.float32,
    )  # fmt: skip


def scores(collect: Collect) -> Callable[[Case], Tensor]:
    """(N, Q)."""

    def gradients(case: Case, rows: Rows) -> Tensor:
        model = case.make()
        model.device, model.dtype = torch.device("cpu"), torch.float32  # as a PreTrainedModel has
        collector = collect(model, len(rows[0]))
        with collector:
            cases.row_losses(model(rows[0][:, None]), rows[1][:, None]).sum().backward()
        found = [collector.mod_grads[name] for name in sorted(collector.mod_grads)]
        return torch.cat([sum(g) if isinstance(g, list) else g for g in found], dim=1)

    return lambda case: cases.gram(gradients(case, case.train), gradients(case, case.query))


if __name__ == "__main__":
    drive(
        [
            Way("GradientCollector", scores(index), note=NOTE),
            Way("TraceCollector", scores(trace), note=NOTE),
        ],
        [cases.control(), cases.looped(), cases.rescaled()],
        ["bergson"],
    )
