"""The entries of the table: every kind in every structure that takes it, and every model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from tests.zoo.case import RIGHT, Case
from tests.zoo.kinds import KINDS
from tests.zoo.looped import Structure
from tests.zoo.models import MODELS
from tests.zoo.parts import Kind
from tests.zoo.structures import STRUCTURES


@dataclass(frozen=True)
class Entry:
    """A name, its two coordinates, and how to make the case."""

    kind: str
    structure: str
    make: Callable[[], Case]

    @property
    def name(self) -> str:
        """What the table and the tests call it."""
        return f"{self.kind} × {self.structure}"


def entries() -> Iterator[Entry]:
    """All: kind × structure, then the models."""
    yield from products()
    yield from models()


def models() -> Iterator[Entry]:
    """Every model."""
    for name, make in MODELS.items():
        yield Entry("model", name, make)


def products() -> Iterator[Entry]:
    """Every kind × structure that makes sense, kinds outermost."""
    for kind in KINDS.values():
        for structure in STRUCTURES.values():
            if fits(kind, structure):
                yield Entry(kind.name, structure.name, _maker(kind, structure))


def covering(each: int = 3) -> Iterator[Entry]:
    """A fixed part of the product for the tests.

    Every kind in one module and in `each` more structures, which differ from kind to kind so that
    every structure has several kinds, and every structure with a linear layer and with attention.
    """
    always = ("nn.Linear", "attention, fused qkv")
    for at, kind in enumerate(KINDS.values()):
        taking = [structure for structure in STRUCTURES.values() if fits(kind, structure)]
        picked = {0} | {(at * 5 + turn * len(taking) // each) % len(taking) for turn in range(each)}
        for place, structure in enumerate(taking):
            if place in picked or kind.name in always:
                yield Entry(kind.name, structure.name, _maker(kind, structure))


def entry(kind: str, structure: str) -> Entry:
    """One of the product, by its two names; "model" and a model's name for a model."""
    if kind == "model":
        return Entry(kind, structure, MODELS[structure])
    return Entry(kind, structure, _maker(KINDS[kind], STRUCTURES[structure]))


def fits(kind: Kind, structure: Structure) -> bool:
    """Whether the structure hands the kind what it takes."""
    if kind.needs == "wide" and structure.name in ("bf16 weights", "autocast"):
        return False
    if kind.needs == "single" and structure.name == "float64 weights":
        return False
    return kind.token or not structure.token


def _maker(kind: Kind, structure: Structure) -> Callable[[], Case]:
    def make() -> Case:
        case = structure.build(kind.make)
        declared = {case.expected, kind.expected, structure.expected} - {RIGHT}
        return replace(case, expected="|".join(sorted(declared)) or RIGHT)

    return make
