"""bergson on an ordinary transformer: every module's gradient projected to `side` × `side`.

Its `GradientCollector` inside the forward and backward pass of its own `CollectorComputer`, kept
from writing to disk. As its `setup_model_and_peft` does, only the embeddings ask for a gradient,
so that the backward pass makes no weight gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from answer import Deed, serve, timed
from bergson import GradientCollector, GradientProcessor, IndexConfig
from bergson.collector.collector import fwd_bwd_factory
from datasets import Dataset
from models import build, digest, gram, tokens
from torch import Tensor


def make(case: dict[str, Any], kind: str) -> dict[str, Deed]:
    """`kind` is not used: there is one way."""
    model: Any = build(case)
    model.requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)
    rows = tokens(case, case["most_rows"])
    config = IndexConfig(run_path="unused", loss_reduction="mean")
    run = fwd_bwd_factory(config)

    def collector(seed: int) -> GradientCollector:
        return GradientCollector(
            model=model,
            data=Dataset.from_dict({"row": list(range(case["most_rows"]))}),
            cfg=config,
            processor=GradientProcessor(projection_dim=case["side"], projection_seed=seed),
            filter_modules="lm_head",
            skip_index=True,
        )

    def collect(one: GradientCollector, ids: Tensor) -> Tensor:
        """(B, floats)."""
        with one.with_batch(torch.ones(ids.shape, dtype=torch.bool)):
            losses = run(model, ids, ids, {})
        found = torch.cat([one.mod_grads[name] for name in sorted(one.mod_grads)], dim=1)
        one.process_batch(list(range(len(ids))), losses=losses)
        return found

    def scores(count: int, size: int, seed: int, dim: int) -> dict[str, Any]:
        one = collector(seed)
        found = torch.cat([collect(one, ids) for ids in rows[:count].split(size)])
        kept = found[0].nbytes
        return {"scores": gram(list(found.float())), "digest": digest(model), "bytes": kept}

    measured = collector(0)
    return {"round": timed(lambda count: collect(measured, rows[:count])), "scores": scores}


if __name__ == "__main__":
    serve(make)
