"""Every loop structure, by name."""

from __future__ import annotations

from tests.zoo.depth_structures import DEPTH
from tests.zoo.layout_structures import LAYOUT
from tests.zoo.loop_structures import LOOP
from tests.zoo.looped import Structure

STRUCTURES: dict[str, Structure] = {**LOOP, **DEPTH, **LAYOUT}
