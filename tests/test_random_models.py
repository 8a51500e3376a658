"""Random models, composed of the layer kinds and looped at random, against per-row autograd."""

from __future__ import annotations

import pytest

from tests.zoo.random import Tally, drawn

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def test_drawn_models_are_right_or_refused() -> None:
    """Whatever body and loop are drawn, step gradients and sketches are right, or refused.

    The same ones each time; `python -m tests.zoo.random --models N --seed S` draws others.
    """
    tally = Tally()
    drawn(60, 0, tally)()
    assert len(tally.seen) >= 30
    assert sum(tally.refused.values()) <= len(tally.seen) / 2, str(tally)
