"""The letters in which every tensor argument states its shape, defined once.

    B   examples of a batch            N   training rows
    T   tokens of a padded row         Q   queries
    S   loop steps, also written τ     K   checkpoints
    M   sketch dimension               D   parameters of a loop body, also written P
    R,C rows and columns of one weight matrix as the parameter stores it
    n   tokens of one row that meet one use of a parameter

Rows of a batch come first, `(B, n, d)`, flattened `(B·n, d)`, or broadcast; `rows_first` undoes
the flattening. Nothing here guesses: a leading size that is no multiple of B raises.
"""

from __future__ import annotations

from torch import Tensor

from sdi.errors import CaptureError


def rows_first(tensor: Tensor, batch: int, what: str, feature_dims: int = 1) -> Tensor:
    """View `tensor` as (B, n, *features), n being whatever lies between rows and features.

    Args:
        tensor: (B, ..., *features) or flattened (B·n, *features).
        batch: B.
        what: how to name it in an error.
        feature_dims: how many trailing dimensions belong to the features.

    Raises:
        CaptureError: if the leading dimension is not a multiple of B.
    """
    features = tuple(tensor.shape[tensor.ndim - feature_dims :])
    lead = tuple(tensor.shape[: tensor.ndim - feature_dims])
    if not lead or lead[0] == 0 or lead[0] % batch:
        raise CaptureError(
            f"{what}: a tensor of shape {tuple(tensor.shape)} cannot be split into the {batch} "
            f"rows of the batch. Expected the row axis first (B, ..., d) or flattened (B·T, d). "
            f"Put the batch axis first, or sketch with batches of one row."
        )
    return tensor.reshape(batch, -1, *features)
