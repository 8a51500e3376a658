"""Whole models, by name: of transformers, and from the literature."""

from __future__ import annotations

from collections.abc import Callable

from tests.zoo.case import Case
from tests.zoo.hub_models import HUB
from tests.zoo.reasoning_models import REASONING
from tests.zoo.recurrent_models import RECURRENT

MODELS: dict[str, Callable[[], Case]] = {**HUB, **RECURRENT, **REASONING}
