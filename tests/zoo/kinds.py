"""Every layer kind, by name: token by token, mixing tokens, mixtures of experts."""

from __future__ import annotations

from tests.zoo.expert_kinds import MIXED
from tests.zoo.parts import Kind
from tests.zoo.sequence_kinds import SEQUENCE
from tests.zoo.token_kinds import TOKEN

KINDS: dict[str, Kind] = {**TOKEN, **SEQUENCE, **MIXED}
