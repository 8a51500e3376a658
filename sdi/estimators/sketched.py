"""Sketches of step gradients, one vector of dimension M per (example, step)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sdi.capture import Loss, Trace, capture
from sdi.errors import LossError, SpecError
from sdi.hashes import SKETCH_VERSION
from sdi.loop import Loop
from sdi.losses import causal_lm_loss, check_losses
from sdi.part import Part
from sdi.sinks import Plans, SketchSink
from sdi.sketch.plan import Hashing
from sdi.sketch.tensorsketch import Method, Products


class Sketcher:
    """Pooled TensorSketch of every step gradient of a loop.

    For the (R, C) gradient G of a matrix, sketch(G)_k is the sum of s_out(i)·s_in(j)·G_ij over
    h_out(i) + h_in(j) ≡ k modulo M (Pham & Pagh 2013); other parameters have a CountSketch; all are
    added. ⟨sketch(u), sketch(v)⟩ estimates ⟨u, v⟩ without bias over seeds, with variance about
    (‖u‖²‖v‖² + ⟨u, v⟩²)/M.

    Args:
        loop: model and body.
        dim: M, at least 2.
        seed: of the hashes.
        checkpoint: name of the weights; hashes of different checkpoints are independent.
        loss: (model, batch) → (B,).
        method: "auto" chooses the cheaper evaluation a use; "outer" and "fourier" force one. Both
            give the same sketch to rounding.
        products: in which type `outer` multiplies δᵀa. "auto" rounds the factors of large matrices
            to bfloat16 where the processor multiplies it and M ≤ 8192, which adds an error of
            about 0.3 % of the gradient's norm to the sketch's own 1/√M; rows whose tokens cancel
            so much that it might be half of that are sketched again without. "float32" never
            rounds, "bfloat16" always does.
        rates: parameter name → learning rate η_p, where groups differ; enters as √(η_p/η̄).
        limit: bytes that the sketch's own buffers may take.

    Attributes:
        rounded: whether a product has been taken in bfloat16 so far.
        narrow: whether a gradient has been in half precision so far, of the model or by autocast.
        repeated: how many rows have been sketched again without rounding.

    Raises:
        SpecError: for a dimension below 2, an unknown method or type of products, or rates of
            unknown parameters.
    """

    def __init__(
        self,
        loop: Loop,
        dim: int = 4096,
        seed: int = 0,
        checkpoint: str = "",
        loss: Loss = causal_lm_loss,
        *,
        method: Method = "auto",
        products: Products = "auto",
        rates: Mapping[str, float] | None = None,
        limit: int = 64 << 20,
    ) -> None:
        if dim < 2:
            raise SpecError(f"the sketch dimension is {dim}: expected at least 2, such as 4096")
        if method not in ("auto", "outer", "fourier"):
            raise SpecError(f"unknown method '{method}': expected auto, outer or fourier")
        if products not in ("auto", "bfloat16", "float32"):
            raise SpecError(f"unknown products '{products}': expected auto, bfloat16 or float32")
        self.loop, self.loss, self._limit = loop, loss, limit
        self.method, self.products = method, products
        self.rounded, self.narrow, self.repeated = False, False, 0
        self.dim, self.seed, self.checkpoint = dim, seed, checkpoint
        self.hashing = Hashing(dim, seed, checkpoint)
        self.shapes = {n: tuple(p.shape) for n, p in loop.parameters().items()}
        self.scales = _scales(rates or {}, self.shapes)
        self.served: dict[str, set[str]] = {}
        self._plans = Plans(self.hashing, self.shapes)

    @property
    def spec(self) -> dict[str, Any]:
        """What two sketches must share to be compared; the checkpoint's name aside."""
        spec: dict[str, Any] = {"version": SKETCH_VERSION, "seed": self.seed, "dim": self.dim}
        if self.scales:
            spec["scales"] = {name: round(s, 9) for name, s in sorted(self.scales.items())}
        return spec

    @property
    def coverage(self) -> dict[str, Any]:
        """Share of the body's parameters that is attributed, and the rules that served them."""
        served = {name: sorted(kinds) for name, kinds in sorted(self.served.items())}
        return {**self.loop.coverage(), "rules": served}

    def __call__(self, batch: Any, ids: Sequence[str]) -> Part:
        """Sketch one batch.

        Args:
            batch: what the loss takes.
            ids: the B examples' own strings, in the order of the batch.

        Returns:
            A `Part` with values (B, S, M) and norms (B, S), float32.

        Raises:
            LossError: for a loss that is no (B,) of finite numbers; names the ids.
            CaptureError: for what cannot be attributed; names the parameter and the remedy.
            LoopError: for a body that is not called, or not looped.
        """
        part, _ = self.traced(batch, ids)
        return part

    def traced(
        self, batch: Any, ids: Sequence[str], products: Products | None = None
    ) -> tuple[Part, Trace]:
        """As a call, and with the trace of what the pass saw; `products` may be others."""
        ids, products = tuple(ids), products or self.products
        if len(set(ids)) != len(ids):
            twice = sorted({i for i in ids if ids.count(i) > 1})
            raise SpecError(f"duplicate ids in one batch: {', '.join(twice[:5])}")
        redraw = _random_state(self.loop)
        values, trace, sink = self._pass(batch, ids, products)
        self.rounded = self.rounded or sink.rounded
        self.narrow = self.narrow or trace.narrow
        if products == "auto" and sink.rounded:
            rough = sink.too_rough(values)
            if bool(rough.any()):
                self.repeated += int(rough.sum())
                redraw()  # a model may draw random numbers
                values[rough] = self._pass(batch, ids, "float32")[0][rough]
        for name, kinds in trace.served.items():
            self.served.setdefault(name, set()).update(kinds)
        norms = values.norm(dim=2)
        bad = [] if bool(norms.isfinite().all()) else _not_finite(values, ids)
        if bad:
            raise LossError(
                f"the gradients of {len(bad)} examples are not finite: {', '.join(bad[:5])}. Their "
                f"losses are, so look for an overflow in the backward pass (bf16 instead of fp16), "
                f"or leave these rows out.",
                bad,
            )
        part = Part(
            ids,
            values,
            norms,
            trace.labels,
            trace.losses,
            trace.detached,
        )
        return part, trace

    def _pass(
        self, batch: Any, ids: tuple[str, ...], products: Products
    ) -> tuple[Tensor, Trace, SketchSink]:
        """(B, S, M) and how it came about."""
        sink = SketchSink(self._plans, len(ids), self.scales, self.method, products, self._limit)

        def check(losses: Tensor) -> None:
            check_losses(losses, ids)

        trace = capture(self.loop, batch, self.loss, sink, ids, check)
        device = next(self.loop.model.parameters()).device
        return sink.result(trace.steps, device), trace, sink


def _not_finite(values: Tensor, ids: Sequence[str]) -> list[str]:
    """Ids of the rows with a value that is not; a norm may overflow where no value does."""
    rows = (~values.isfinite().flatten(1).all(dim=1)).nonzero().flatten().tolist()
    return [ids[i] for i in rows]


def _random_state(loop: Loop) -> Callable[[], None]:
    """Note the state of the random numbers; the result goes back to it."""
    device = next(loop.model.parameters()).device
    state = torch.get_rng_state()
    on_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore() -> None:
        torch.set_rng_state(state)
        if on_gpu is not None:
            torch.cuda.set_rng_state(on_gpu, device)

    return restore


def _scales(rates: Mapping[str, float], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, float]:
    """√(η_p/η̄) by parameter, η̄ the mean over parameters weighted by their size."""
    unknown = sorted(set(rates) - set(shapes))
    if unknown:
        raise SpecError(f"learning rates for parameters not in the body: {', '.join(unknown[:5])}")
    if not rates:
        return {}
    missing = sorted(set(shapes) - set(rates))
    if missing:
        raise SpecError(f"no learning rate for the body's {', '.join(missing[:5])}")
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    mean = sum(rates[n] * sizes[n] for n in shapes) / sum(sizes.values())
    if mean <= 0:
        raise SpecError("every learning rate is 0: influence would be zero everywhere")
    return {name: (rates[name] / mean) ** 0.5 for name in shapes if rates[name] != mean}
