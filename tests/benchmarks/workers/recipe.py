"""The GSM8K recipe's model, from its file; the same in every environment."""

from __future__ import annotations

import importlib.util
from typing import Any

from torch import nn


def build(job: dict[str, Any]) -> nn.Module:
    """A fresh model of the recipe; `job` says in which file, and with which arguments."""
    spec = importlib.util.spec_from_file_location("looped_gpt", job["model"])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model: nn.Module = module.build(**job["arguments"])
    return model
