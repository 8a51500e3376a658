"""The published package on the looped GPT: `featurize_loader`, which is its pass over rows."""

from __future__ import annotations

from typing import Any

import torch
from answer import Deed, serve, timed
from models import batches, build, digest, gram, row_losses, tokens

from sdi import ProjectedTracInSDI


def make(case: dict[str, Any], kind: str) -> dict[str, Deed]:
    """`kind` is not used: there is one way."""
    model: Any = build(case)
    rows = tokens(case, case["most_rows"])

    def estimator(dim: int, seed: int) -> ProjectedTracInSDI:
        return ProjectedTracInSDI(
            model=model, target_modules=model.body, projection_size=dim, seed=seed
        )

    measured = estimator(case["dim"], 0)

    def featurize(count: int) -> None:
        measured.featurize_loader(loader=[rows[:count]], loss_fn=row_losses)

    def scores(count: int, size: int, seed: int, dim: int) -> dict[str, Any]:
        """As its `compute_tracin`: totals over steps, parameter beside parameter."""
        one = estimator(dim, seed)
        found = one.featurize_loader(loader=batches(rows[:count], size), loss_fn=row_losses)
        one.close()
        totals = [phi.float().sum(1) for _, phi in sorted(found.phi.items())]
        kept = sum(phi[0].nbytes for phi in found.phi.values())
        vectors = list(torch.cat(totals, dim=1))
        return {"scores": gram(vectors), "digest": digest(model), "bytes": kept}

    return {"round": timed(featurize), "scores": scores}


if __name__ == "__main__":
    serve(make)
