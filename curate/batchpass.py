"""One batch through a sketcher: on its device, with random numbers of its own."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curate.errors import CurateError

if TYPE_CHECKING:
    import sdi
    from curate.batches import Batch

Sketch = Callable[[dict[str, Tensor], Sequence[str]], "sdi.Part"]


def device_named(name: str | None) -> torch.device:
    """The device of a name; None is a GPU where there is one."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def moved(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """The batch's tensors (B, T) on a device."""
    return {name: value.to(device) for name, value in batch.tensors.items()}


@contextmanager
def seeded(row: int) -> Iterator[None]:
    """Fix torch's random numbers for models that draw some (an initial state), and put them back.

    They depend on the batch and not on what ran before, so that a resumed run draws the same.
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices):
        torch.manual_seed(zlib.crc32(f"row {row}".encode()))
        yield


def sketched(sketch: Sketch, batch: Batch, device: torch.device) -> sdi.Part:
    """One batch; an index outside an embedding gets a line that says what to look at."""
    return drawn(sketch, batch, device)[0]


def drawn(sketch: Sketch, batch: Batch, device: torch.device) -> tuple[sdi.Part, bool]:
    """As `sketched`, and whether the pass drew random numbers: then it depends on the batches."""
    try:
        with seeded(int(batch.rows[0])):
            before = _state(device)
            part = sketch(moved(batch, device), batch.ids)
            return part, not torch.equal(before, _state(device))
    except IndexError as error:
        ids = batch.tensors["input_ids"]
        raise CurateError(
            f"the model has no entry for a token or a position of these rows ({error}): the "
            f"longest is {ids.shape[1]} tokens ('{batch.ids[0]}'), the largest token id "
            f"{int(ids.max())}. Give max_tokens as the model's context, and the tokenizer it "
            f"was trained with"
        ) from error


def _state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
