"""Every error that ``sdi`` raises on purpose.

Each message says what was seen, what was expected, and what to do about it.
``exit_code`` is what a command line should return for the error.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar


class SdiError(Exception):
    """Base of all errors raised by ``sdi``."""

    exit_code: ClassVar[int] = 1


class LoopError(SdiError):
    """The loop body could not be found in the model, or cannot be used as given."""


class CaptureError(SdiError):
    """A step's activations or gradients could not be recorded."""


class LossError(SdiError):
    """A loss returned something other than one finite number per example.

    Args:
        message: the sentence shown to the user.
        ids: the examples concerned; empty where the whole batch is.
    """

    def __init__(self, message: str, ids: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.ids: tuple[str, ...] = tuple(ids)


class SelfCheckError(SdiError):
    """The sketches disagree with gradients computed another way."""

    exit_code: ClassVar[int] = 3


class CheckpointError(SdiError):
    """A checkpoint could not be found, read, or matched to the model."""


class ShardError(SdiError):
    """A shard on disk is absent, damaged, or could not be written."""

    exit_code: ClassVar[int] = 3


class DiskError(ShardError):
    """A shard could not be written: the disk is full, or the directory may not be written to."""

    exit_code: ClassVar[int] = 1


class SpecError(SdiError):
    """Two sketches were made with different settings, or a setting is not legal."""
