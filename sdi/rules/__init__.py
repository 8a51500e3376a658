"""Rules: how one recorded operation hands its per-example gradients to a sink.

A rule knows one kind of operation. `find` returns the rule of a function, or None, in which case
the generic per-example vector-Jacobian product of that one operation serves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from sdi.rules.elementwise import add_rule, multiply_rule
from sdi.rules.embedding import embedding_rule
from sdi.rules.experts import grouped_rule
from sdi.rules.linear import addmm_rule, linear_rule, matmul_rule
from sdi.rules.norm import layer_norm_rule, rms_norm_rule
from sdi.rules.use import Use

Rule = Callable[[Use], bool]

_T = torch.Tensor

RULES: dict[Any, Rule] = {
    F.linear: linear_rule,
    torch.matmul: matmul_rule,
    torch.mm: matmul_rule,
    _T.matmul: matmul_rule,
    _T.__matmul__: matmul_rule,
    _T.mm: matmul_rule,
    torch.addmm: addmm_rule,
    _T.addmm: addmm_rule,
    F.embedding: embedding_rule,
    F.layer_norm: layer_norm_rule,
    F.rms_norm: rms_norm_rule,
    torch.mul: multiply_rule,
    _T.mul: multiply_rule,
    _T.__mul__: multiply_rule,
    _T.__rmul__: multiply_rule,
    torch.add: add_rule,
    _T.add: add_rule,
    _T.__add__: add_rule,
    _T.__radd__: add_rule,
}
for _owner, _name in ((F, "grouped_mm"), (torch, "_grouped_mm")):
    if hasattr(_owner, _name):  # torch 2.8 and later
        RULES[getattr(_owner, _name)] = grouped_rule


def find(function: Any) -> Rule | None:
    """The rule that serves a torch function, or None."""
    return RULES.get(function)
