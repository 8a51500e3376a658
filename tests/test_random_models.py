"""Random models, composed of the layer kinds and looped at random, against per-row autograd."""

from __future__ import annotations

import pytest

from tests.zoo.random import Tally, drawn

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def test_drawn_models_are_right_or_refused(request: pytest.FixtureRequest) -> None:
    """Whatever body and loop are drawn, step gradients and sketches are right, or refused."""
    tally = Tally()
    drawn(60, request.config.getoption("randomly_seed", 0) or 0, tally)()
    assert len(tally.seen) >= 30
    assert sum(tally.refused.values()) <= len(tally.seen) / 2, str(tally)
