"""Where kernels cannot be compiled torch serves, with the same sketches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import sdi
from tests.looped import make, names, tokens

ROOT = Path(__file__).parent.parent
CODE = """
import sys, warnings
sys.modules.update({name: None for name in sys.argv[2:] if name == "numba"})
sys.path[:0] = [name for name in sys.argv[2:] if name != "numba"]
import numpy as np
import sdi
from sdi.flash import compiled
from sdi.sketch.kernels import has_numba
from tests.test_team import sketches
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    np.save(sys.argv[1], sketches())
    assert compiled() is None and not has_numba()
print(*{str(warning.message).partition("(")[0] for warning in said}, sep="\\n")
"""


def sketches() -> np.ndarray:
    """Of four rows, by products whose entries are added one by one."""
    sketcher = sdi.Sketcher(sdi.Loop(make(), "body"), dim=64, method="outer")
    return sketcher(tokens(4), names(4)).values.numpy()


@pytest.mark.parametrize("without", ["numba", "compiler", "its library"])
def test_torch_serves(without: str, tmp_path: Path) -> None:
    """In a process of its own, since numba is imported once; only a broken one is told of."""
    pytest.importorskip("numba")
    file, broken = tmp_path / "sketches.npy", without != "numba"
    homes = dict.fromkeys(("XDG_CACHE_HOME", "NUMBA_CACHE_DIR"), str(tmp_path))
    switch = {"NUMBA_DISABLE_JIT": "1"} if without == "compiler" else {}
    (tmp_path / "numba").mkdir()
    (tmp_path / "numba" / "__init__.py").write_text("raise OSError('no libllvmlite.so')")
    argument = {"numba": ["numba"], "compiler": [], "its library": [str(tmp_path)]}[without]
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(file), *argument],
        cwd=ROOT,
        env={**os.environ, **homes, **switch},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    files = ("adds", "flash", "norms") if broken else ()
    assert sorted(said) == [f"numba does not compile sdi.compiled.{name}" for name in files]
    assert np.allclose(np.load(file), sketches(), atol=1e-6)
