"""Which libraries, at which versions, and what their environments need."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class Peer:
    """One library.

    Attributes:
        name: on the package index.
        version: pinned; None for this project, and for torch, which is pinned in constraints.txt.
        driver: file beside this one.
        extra: of the package, which its attribution needs.
        drop: packages to remove once installed, for `why`.
        why: reason.
    """

    name: str
    version: str | None
    driver: str
    extra: str = ""
    drop: tuple[str, ...] = ()
    why: str = ""

    @property
    def requirement(self) -> str:
        """What pip is asked for."""
        extra = f"[{self.extra}]" if self.extra else ""
        return f"{self.name}{extra}=={self.version}" if self.version else torch_requirement()


OURS = Peer("this project", None, "with_ours.py")
PEERS = (
    Peer("step-decomposed-influence", "0.1.1", "with_published.py"),
    Peer(
        "bergson",
        "2.5.1",
        "with_bergson.py",
        drop=("torchvision", "torchaudio"),
        why="their binaries may be built for another torch, and bergson itself imports neither",
    ),
    Peer("kronfluence", "1.0.1", "with_kronfluence.py"),
    Peer("dattri", "0.3.0", "with_dattri.py"),
    Peer("captum", "0.9.0", "with_captum.py"),
    Peer("traker", "0.3.2", "with_trak.py"),
    Peer("pyDVL", "0.10.0", "with_pydvl.py", extra="influence"),
    Peer("opacus", "1.6.0", "with_opacus.py"),
    Peer("backpack-for-pytorch", "1.7.1", "with_backpack.py"),
    Peer("curvlinops-for-pytorch", "3.0.1", "with_curvlinops.py"),
    Peer("torch", None, "with_torchfunc.py"),
)


def torch_requirement() -> str:
    """The torch that this project is tested with, as constraints.txt pins it."""
    text = (ROOT / "constraints.txt").read_text()
    found = re.search(r"^torch==\S+$", text, flags=re.MULTILINE)
    if found is None:
        raise ValueError("constraints.txt has no line 'torch==VERSION': expected one")
    return found.group()
