"""Step-resolved influence for looped transformers: sketches of training examples and queries.

    loop   = sdi.Loop(model, body="model.layers")
    sketch = sdi.Sketcher(loop, dim=4096, seed=0, checkpoint="step-1000")
    part   = sketch(batch, ids=ids)

Source: Step-Decomposed Influence, arXiv 2602.10097.
"""

from __future__ import annotations

from sdi.estimators.exact import ExactGradients
from sdi.estimators.sketched import Sketcher
from sdi.influence import influence, step_matrix, tracin
from sdi.loop import Loop, LoopCandidate, find_loops
from sdi.losses import causal_lm_loss, masked_lm_loss
from sdi.part import Part
from sdi.selfcheck import SelfCheck, self_check

__version__ = "0.1.0"

__all__ = [
    "ExactGradients",
    "Loop",
    "LoopCandidate",
    "Part",
    "SelfCheck",
    "Sketcher",
    "causal_lm_loss",
    "find_loops",
    "influence",
    "masked_lm_loss",
    "self_check",
    "step_matrix",
    "tracin",
]
