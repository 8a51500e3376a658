"""Compiled code in a pass: run eagerly, whoever compiled it and when; no compiler is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SETUP = """
import sys, warnings
import torch
import threading
from torch import compile as compiled
import sdi
from tests.looped import Custom, make, names, tokens
warnings.simplefilter("ignore")
calls = []

def backend(graph, inputs):
    def run(*values):
        calls.append(1)
        return graph.forward(*values)
    return run

def late(m, x):
    return torch.compile(lambda y: torch.tanh(m.a(y)), backend=backend)(x)

def later(m, x):
    return compiled(lambda y: torch.tanh(m.a(y)), backend=backend)(x)

def sketched(run):
    torch.manual_seed(0)
    model = make(Custom(run, a=torch.nn.Linear(16, 16)))
    return sdi.Sketcher(sdi.Loop(model, "body"), dim=64)(tokens(), names(4)).values

plain = sketched(lambda m, x: torch.tanh(m.a(x)))
"""


@pytest.mark.parametrize(
    "claim",
    [
        "'torch._dynamo' not in sys.modules",
        "torch.equal(sketched(late), plain) and not calls",
        "torch.equal(sketched(late), sketched(late)) and not calls",
        "torch.equal(sketched(later), plain) and not calls",
        "torch.equal(sketched(late), plain) and late(Custom(late, a=torch.nn.Linear(16, 16)),"
        " torch.ones(1, 16)).numel() == 16 and len(calls) == 1",
        "[t.join() for t in [threading.Thread(target=sketched, args=(late,)) for _ in range(3)]"
        " if not t.start()] and not calls and late(Custom(late, a=torch.nn.Linear(16, 16)),"
        " torch.ones(1, 16)).numel() == 16 and len(calls) == 1",
        "late(Custom(late, a=torch.nn.Linear(16, 16)), torch.ones(1, 16)).numel() == 16"
        " and torch.equal(sketched(late), plain) and len(calls) == 1",
    ],
    ids=[
        "no compiler",
        "compiled in the pass",
        "and again",
        "by another name",
        "compiled after",
        "in threads",
        "compiled before",
    ],
)
def test_compiled_code(claim: str) -> None:
    """Each in a process of its own, since a compiler once imported stays."""
    code = f"{SETUP}\nassert {claim}, (len(calls), 'torch._dynamo' in sys.modules)"
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
