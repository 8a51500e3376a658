"""Losses that return one number per example.

A loss is any callable ``(model, batch) -> Tensor (B,)``. Attribution needs the gradient of each
example on its own, and a mean over the batch cannot be undone; so a scalar is refused.

Letters: B examples, T tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from sdi.errors import LossError

Reduce = Literal["mean", "sum"]
Batch = Mapping[str, Tensor]
IGNORED = -100


class Loss(Protocol):
    """What every loss looks like: ``(model, batch) -> Tensor (B,)``."""

    def __call__(self, model: nn.Module, batch: Batch, /) -> Tensor:
        """Return the loss of each of the B examples."""
        ...


def causal_lm_loss(model: nn.Module, batch: Batch, *, reduce: Reduce = "mean") -> Tensor:
    """Next-token cross-entropy of each example, in nats.

    Labels are shifted here, once: the logits at position t are held against the label at t + 1.

    Args:
        model: called with those entries of ``batch`` (labels left out) that its forward names.
        batch: ``input_ids`` (B, T) int64, ``labels`` (B, T) int64 with -100 where no loss is
            wanted, usually ``attention_mask`` (B, T); whatever else the forward takes.
        reduce: ``mean`` over the row's own targets, or their ``sum``.

    Returns:
        (B,) float32 (float64 for a float64 model). A row without a target is NaN, so that
        ``check_losses`` names it instead of a zero passing for a perfect score.

    Raises:
        LossError: no labels, logits that do not fit them, or a batch padded on the left: for a
            model that takes no attention mask; without position_ids for one that takes them; or
            with a target that is predicted from padding.
    """
    labels = _labels(batch)
    logits = _logits(model, batch, labels, causal=True)
    return _per_row(logits[:, :-1], labels[:, 1:], reduce)


def masked_lm_loss(model: nn.Module, batch: Batch, *, reduce: Reduce = "mean") -> Tensor:
    """Cross-entropy of each example at its masked positions, in nats; nothing is shifted.

    Args:
        model: as in ``causal_lm_loss``.
        batch: as in ``causal_lm_loss``; ``labels`` are -100 except at masked positions.
        reduce: ``mean`` over the row's own targets, or their ``sum``.

    Returns:
        (B,) float32 (float64 for a float64 model), NaN for a row without a target.

    Raises:
        LossError: no labels, logits that do not fit them, a padded batch for a model that takes
            no attention mask, or one padded on the left, without position_ids, for a model that
            takes them.
    """
    labels = _labels(batch)
    logits = _logits(model, batch, labels, causal=False)
    return _per_row(logits, labels, reduce)


def check_losses(losses: object, ids: Sequence[str]) -> Tensor:
    """Return ``losses`` if they are one finite number for each id, else refuse.

    Args:
        losses: what a loss returned; expected is a floating (B,) tensor.
        ids: the B examples' ids.

    Raises:
        LossError: wrong type, shape or dtype, or NaN or infinite values (``.ids`` names the rows).
    """
    if not isinstance(losses, Tensor):
        raise LossError(
            f"the loss returned a {type(losses).__name__}; expected a tensor of shape "
            f"({len(ids)},), one loss per example"
        )
    if losses.shape != (len(ids),):
        raise LossError(_shape_message(losses, len(ids)))
    if not losses.is_floating_point():
        raise LossError(
            f"the loss returned {losses.dtype}; expected a floating type. "
            "Return the losses themselves, not counts or predictions"
        )
    _refuse_non_finite(losses.detach(), ids)
    return losses


def _shape_message(losses: Tensor, rows: int) -> str:
    if losses.ndim == 0:
        return (
            f"the loss returned a scalar for {rows} examples; expected shape ({rows},). A mean "
            "over the batch cannot be undone: use reduction='none' and average over each row's "
            "own tokens"
        )
    return (
        f"the loss returned shape {tuple(losses.shape)} for {rows} examples; expected ({rows},). "
        "Average over each row's own tokens, and keep the batch dimension"
    )


def _refuse_non_finite(losses: Tensor, ids: Sequence[str]) -> None:
    finite = torch.isfinite(losses)
    if bool(finite.all()):
        return
    bad = [
        (name, float(value))
        for name, value in zip(ids, losses, strict=True)
        if not torch.isfinite(value)
    ]
    shown = ", ".join(f"{name} ({value})" for name, value in bad[:5])
    more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
    raise LossError(
        f"the loss is not finite for {shown}{more}; expected finite numbers. A row whose labels "
        "are all -100 gives nan; otherwise look at these rows and at the checkpoint's weights, "
        "or drop the rows",
        [name for name, _ in bad],
    )


def _labels(batch: Batch) -> Tensor:
    if "labels" not in batch:
        raise LossError(
            f"the batch has {sorted(batch)} but no 'labels'; expected labels (B, T) with -100 "
            "where no loss is wanted. For plain text use input_ids, with -100 at the padding"
        )
    return batch["labels"]


def _per_row(logits: Tensor, labels: Tensor, reduce: Reduce) -> Tensor:
    """Reduce (B, T, V) logits against (B, T) labels to (B,)."""
    if reduce not in ("mean", "sum"):
        raise LossError(f"reduce is {reduce!r}; expected 'mean' or 'sum'")
    # Half precision would round the log-sum-exp of a large vocabulary to about two digits.
    logits = logits if logits.dtype == torch.float64 else logits.float()
    losses = functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    ).view(labels.shape)
    targets = (labels != IGNORED).sum(dim=1)
    total = losses.sum(dim=1)
    if reduce == "mean":
        return total / targets
    return torch.where(targets > 0, total, torch.nan)


def _logits(model: nn.Module, batch: Batch, labels: Tensor, *, causal: bool) -> Tensor:
    """Call the model and return its (B, T, V) logits, refusing what does not fit the labels."""
    arguments, keywords = _call_arguments(model, batch)
    if "attention_mask" in batch:
        if "attention_mask" in keywords:
            _refuse_left_padding(model, batch, labels, causal=causal)
        else:
            _refuse_padding(batch["attention_mask"], causal=causal)
    output = model(*arguments, **keywords)
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, Mapping):
        logits = output.get("logits")
    if logits is None:
        logits = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != labels.shape:
        seen = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise LossError(
            f"the model returned {seen} where labels are {tuple(labels.shape)}; expected logits "
            "(B, T, V), as a tensor, as .logits, or first in a tuple. Give a loss of your own "
            "if the model's output is something else"
        )
    return logits


def _refuse_padding(mask: Tensor, *, causal: bool) -> None:
    """Refuse padding that a model without an attention mask would take for text."""
    if not causal and not bool((mask != 0).all()):
        raise LossError(
            "the batch is padded but the model's forward takes no attention_mask, so padding "
            "would change the losses; expected a forward with attention_mask, or batches of rows "
            "of one length"
        )
    if causal and bool((mask[:, 1:] > mask[:, :-1]).any()):
        raise LossError(
            "the batch is padded on the left but the model's forward takes no attention_mask, so "
            "padding would be read as text; pad on the right"
        )


def _refuse_left_padding(model: nn.Module, batch: Batch, labels: Tensor, *, causal: bool) -> None:
    """Refuse padding before a row that may move its positions, or that tells its first token."""
    mask = batch["attention_mask"]
    if not isinstance(mask, Tensor) or mask.shape != labels.shape or mask.ndim != 2:
        return
    own = mask != 0
    if bool(own[:, :1].all()):
        return
    padded = own.any(dim=1) & ~own[:, 0]
    start = own.int().argmax(dim=1, keepdim=True)
    told = padded & (labels.gather(1, start)[:, 0] != IGNORED)
    if causal and bool(told.any()):
        raise LossError(
            f"row {int(told.int().argmax())} of the batch is padded on the left and its first "
            "token is a target, predicted from padding; pad on the right, or label it -100"
        )
    if bool(padded.any()) and "position_ids" in _taken(model) and "position_ids" not in batch:
        raise LossError(
            f"row {int(padded.int().argmax())} of the batch is padded on the left and the batch "
            "has no position_ids, so that the model may count positions from the padding on; pad "
            "on the right, or give position_ids that start at the row's first token"
        )


def _taken(model: nn.Module) -> set[str]:
    """Names of what the forward takes."""
    return set(inspect.signature(_unwrapped(model).forward).parameters)


def _call_arguments(model: nn.Module, batch: Batch) -> tuple[list[Tensor], dict[str, object]]:
    """Choose what of the batch the forward takes: positional and keyword arguments."""
    inputs: dict[str, object] = {name: value for name, value in batch.items() if name != "labels"}
    inner = inspect.signature(_unwrapped(model).forward).parameters.values()
    outer = inspect.signature(model.forward).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = {p.name for p in (*inner, *outer) if p.kind in kinds}
    open_ended = any(p.kind is p.VAR_KEYWORD for p in inner)
    if not named and open_ended:
        return [], inputs
    keywords = {name: value for name, value in inputs.items() if name in named}
    if "use_cache" in named:
        # A cache would keep every step's keys and values alive for nothing.
        keywords.setdefault("use_cache", False)
    if "input_ids" in named or "inputs_embeds" in keywords or "input_ids" not in batch:
        return [], keywords
    # Plain torch models often call their first argument `x` or `idx`.
    return [batch["input_ids"]], keywords


def _unwrapped(model: nn.Module) -> nn.Module:
    """See through wrappers that pass on what they are given: data parallel, compiled, of peft."""
    while True:
        adapter = getattr(model, "active_peft_config", None)
        if adapter is not None and not adapter.is_prompt_learning:
            model = model.get_base_model()  # type: ignore[operator]
            continue
        inner = model.__dict__.get("_modules", {})
        wrapped = inner.get("_orig_mod") or (inner.get("module") if len(inner) == 1 else None)
        if not isinstance(wrapped, nn.Module):
            return model
        parameters = inspect.signature(model.forward).parameters.values()
        if any(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters):
            return model
        model = wrapped
