"""Embeddings: the gradient is Σ_n e_id ⊗ δ."""

from __future__ import annotations

from sdi.errors import CaptureError
from sdi.rules.use import Use


def embedding_rule(use: Use) -> bool:
    """`F.embedding(ids (B, ...), weight (V, C), padding_idx)`; a padding id has no gradient."""
    ids, weight = use.argument(0, "input"), use.weight(1, "weight")
    if weight is None or weight.name is None or weight.transposed:
        return False
    if not use.is_rowwise(ids) and use.batch > 1:
        return False  # the same ids for every row: broadcast afterwards, or not a row's at all
    if use.argument(3, "max_norm") is not None or use.argument(5, "scale_grad_by_freq", False):
        raise CaptureError(
            f"{use.label}: max_norm and scale_grad_by_freq couple the rows of a batch, so a "
            f"gradient per example does not exist. Build the embedding without them."
        )
    index, delta = use.split(ids, features=0), use.split_delta()
    padding = use.argument(2, "padding_idx")
    if padding is not None:
        padding = padding if padding >= 0 else weight.tensor.shape[0] + padding
        delta = delta * (index != padding)[..., None]
    use.sink.rows(weight.name, use.step, index.long(), delta)
    return True
