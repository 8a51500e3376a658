"""One recorded use: an operation in which a body parameter met the activations of a batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sdi.rowtags import FIRST, Tag, is_tagged, split, tag_of
from sdi.sinks import Sink

HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Weight:
    """A body parameter, or something computed from body parameters alone, as an operand.

    Attributes:
        tensor: the operand; on autograd's graph down to the parameters where it is derived.
        name: canonical name where it is a parameter, or a matrix of a 3-D one, else None.
        transposed: whether the last two axes are those of the parameter, swapped.
        parameters: name → parameter, all that it was computed from.
        part: which matrix of the 3-D parameter it is, None where it is the whole parameter.
    """

    tensor: Tensor
    name: str | None
    transposed: bool
    parameters: dict[str, Tensor]
    part: int | None = None

    def turned(self, tensor: Tensor) -> Weight:
        """The same with its last two axes swapped, `tensor`."""
        return replace(self, tensor=tensor, transposed=not self.transposed)

    def matrix(self, number: int, tensor: Tensor) -> Weight:
        """One matrix of a stack, `tensor`."""
        return replace(self, tensor=tensor, part=number)

    def emit(self, sink: Sink, step: int, gradient: Tensor) -> None:
        """Hand on per-example gradients of this operand, (B, *shape), pulled back where derived."""
        if self.name is not None:
            gradient = gradient.transpose(-1, -2) if self.transposed else gradient
            sink.dense(self.name, step, gradient, self.part)
            return
        pulled = torch.autograd.grad(
            self.tensor,
            list(self.parameters.values()),
            gradient.to(self.tensor.dtype),
            is_grads_batched=True,
            retain_graph=True,
            allow_unused=True,
        )
        for name, value in zip(self.parameters, pulled, strict=True):
            if value is not None:
                sink.dense(name, step, value)

    def emit_outer(self, sink: Sink, step: int, left: Tensor, right: Tensor) -> Tensor | None:
        """Hand on Σ_n left (B, n, R) ⊗ right (B, n, C), the gradient of this 2-D operand.

        Returns:
            Σ_n left, (B, R), where the sink had it by the way.
        """
        if self.name is None:
            wide = torch.promote_types(left.dtype, right.dtype)  # they differ under autocast
            self.emit(sink, step, left.to(wide).transpose(1, 2) @ right.to(wide))
        elif self.transposed:
            sink.outer(self.name, step, right, left, self.part)
        else:
            return sink.outer(self.name, step, left, right, self.part)
        return None


@dataclass
class Use:
    """A use and, once the backward pass reached it, the gradient of its output.

    Attributes:
        function: the torch function.
        args, kwargs: its operands, weights detached.
        weights: position or keyword → the weight that stood there; ("args", i) or ("kwargs", key),
            and ("args", (i, j)) for the j-th of a list.
        step: zero-based step.
        batch: B.
        output: shape of the output.
        delta: gradient of Σ_b ℓ_b with respect to the output.
        sink: receives the gradients.
        rows: where the rows lie in the output, and so in delta.
        autocast: (device type, data type) of the autocast that the use ran under, if any.
    """

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    weights: dict[tuple[str, Any], Weight]
    step: int
    batch: int
    sink: Sink
    rows: Tag
    delta: Tensor
    autocast: tuple[str, torch.dtype] | None = None

    @property
    def label(self) -> str:
        """The parameters and the operation, for errors."""
        names = sorted({n for w in self.weights.values() for n in w.parameters})
        return f"{', '.join(names)} in {getattr(self.function, '__name__', self.function)}"

    def argument(self, position: int, keyword: str, default: Any = None) -> Any:
        """An operand by position or keyword."""
        if len(self.args) > position:
            return self.args[position]
        return self.kwargs.get(keyword, default)

    def weight(self, position: int, keyword: str) -> Weight | None:
        """The weight at that operand, if one stood there."""
        return self.weights.get(("args", position)) or self.weights.get(("kwargs", keyword))

    def is_rowwise(self, value: Any) -> bool:
        """Whether an operand carries rows of the batch."""
        return is_tagged(value)

    def split(self, tensor: Tensor, features: int = 1) -> Tensor:
        """An operand as (B, n, *features); refused where its rows cannot be told apart."""
        return split(tensor, tag_of(tensor) or FIRST, self.batch, self.label, features)

    @property
    def wide_delta(self) -> Tensor:
        """`delta`, in float32 where it is half: sums over tokens are, as autograd's own."""
        return self.delta.float() if self.delta.dtype in HALVES else self.delta

    def summed_delta(self, known: Tensor | None = None) -> Tensor:
        """Σ_n δ_n, (B, R); of bfloat16 summed in float32 and rounded once, as by autograd.

        Args:
            known: the sum in float32, where it came with a product.
        """
        if known is not None:
            return known.to(self.delta.dtype) if self.delta.dtype == torch.bfloat16 else known
        whole = self.delta if self.delta.dtype == torch.bfloat16 else self.wide_delta
        return self.split_delta(whole).sum(dim=1)

    def split_delta(self, gradient: Tensor | None = None, features: int = 1) -> Tensor:
        """`delta`, or a tensor of its shape, as (B, n, *features)."""
        tensor = self.delta if gradient is None else gradient
        return split(tensor, self.rows, self.batch, self.label, features)
