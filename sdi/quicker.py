"""What a captured pass runs in place of a torch call: the same numbers but for rounding, sooner."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._device import DeviceContext

from sdi.attention import attention
from sdi.onednn import linear

_QUICKER: dict[Any, Callable[..., Tensor | None]] = {
    F.linear: linear,
    F.scaled_dot_product_attention: attention,
}


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of a torch call, by the quicker way where there is one for these arguments."""
    if func in _QUICKER:
        found = _QUICKER[func](*args, **kwargs)
        if found is not None:
            return found
    return func(*args, **kwargs)


def as_called(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of the torch call itself."""
    return func(*args, **kwargs)


def runner() -> Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]:
    """`run`, or `as_called` where a caller's own TorchFunctionMode is to see each torch call.

    That of a default device only looks at calls that make tensors.
    """
    count = torch._C._len_torch_function_stack()
    modes = (torch._C._get_function_stack_at(at) for at in range(count))
    return run if all(isinstance(mode, DeviceContext) for mode in modes) else as_called
