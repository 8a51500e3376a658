"""Our sketch pass; on an ordinary model one vector a row, the sum of its layers' sketches."""

from __future__ import annotations

from typing import Any

from answer import Deed, serve, timed
from models import build, digest, gram, tokens
from torch import Tensor

import sdi
from sdi.sketch.quantize import dequantize, quantize


def make(case: dict[str, Any], kind: str) -> dict[str, Deed]:
    """`kind`: how a sketch is evaluated, as `sdi.Sketcher` takes it."""
    model = build(case)
    if case["looped"]:
        loop = sdi.Loop(model, "body")
    else:
        loop = sdi.Loop(model, "model.layers", tied=False, skip="*layernorm*")
    rows = tokens(case, case["most_rows"])

    def sketcher(dim: int, seed: int) -> sdi.Sketcher:
        return sdi.Sketcher(loop, dim, seed, method=kind)  # type: ignore[arg-type]

    def stored(estimator: sdi.Sketcher, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Int8 and scales: (B, S, M) with every step, or (B, M) of an ordinary model."""
        ids = rows[first : first + count]
        names = [f"row-{first + row}" for row in range(len(ids))]
        part = estimator({"input_ids": ids, "labels": ids}, names)
        return quantize(part.values if case["looped"] else part.totals)

    def scores(count: int, size: int, seed: int, dim: int) -> dict[str, Any]:
        """From what is stored; with a scale there is a norm of four bytes."""
        estimator, found, kept = sketcher(dim, seed), [], 0
        for first in range(0, count, size):
            vectors, scales = stored(estimator, first, min(size, count - first))
            values = dequantize(vectors, scales)
            found.extend(values.sum(1) if case["looped"] else values)
            kept = vectors[0].nbytes + 2 * scales[0].nbytes
        return {"scores": gram(found), "digest": digest(model), "bytes": kept}

    measured = sketcher(case["dim"], 0)
    return {"round": timed(lambda count: stored(measured, 0, count)), "scores": scores}


if __name__ == "__main__":
    serve(make)
