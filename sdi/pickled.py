"""Read ``torch.save`` data without letting it run code.

Everything goes through ``weights_only=True``; what needs more than that is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

import torch

from sdi.errors import CheckpointError

PICKLED = (".pt", ".pth", ".bin", ".ckpt")


def read_pickled(path: Path) -> Any:
    """Return what a ``torch.save`` file holds, mapped where the format allows it.

    Raises:
        CheckpointError: absent, damaged, or needing code to be run.
    """
    try:
        return _load(path)
    except Exception as error:
        raise _refusal(str(path), error) from error


def read_stream(stream: IO[bytes], label: str) -> Any:
    """Return what ``torch.save`` wrote into a stream; `label` names it in errors.

    Raises:
        CheckpointError: damaged, or needing code to be run.
    """
    try:
        return torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:
        raise _refusal(label, error) from error


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:
        # Files from before torch 1.6 cannot be mapped.
        return torch.load(path, map_location="cpu", weights_only=True)


def _refusal(label: str, error: Exception) -> CheckpointError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # Torch's first line invites to run the code; a later one says what it is.
    reason = next((line.strip() for line in lines if "WeightsUnpickler" in line), lines[0])
    return CheckpointError(
        f"{label} cannot be read as plain tensors ({reason}); "
        "expected a state dict saved by torch.save. Objects other than tensors are refused, "
        "since reading them would run code: save the weights as safetensors"
    )
