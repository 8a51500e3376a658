"""How a worker is asked: a line of JSON on stdin, a line of JSON back through a pipe of its own.

`{"do": "make", ...}` builds what is measured, and each later line does one of the deeds that it
named. Between lines the worker sleeps in a read, so that it takes no core from the one that is
asked. Needs the standard library only, since every worker's environment is another.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

Deed = Callable[..., dict[str, Any]]


def serve(make: Callable[..., dict[str, Deed]]) -> None:
    """Answer until stdin ends; an exception is an answer too (`error`), its trace on stderr."""
    replies = os.fdopen(int(sys.argv[1]), "w")
    deeds: dict[str, Deed] = {}
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        name = request.pop("do")
        try:
            if name == "make":
                deeds = make(**request)
                reply: dict[str, Any] = {}
            else:
                reply = deeds[name](**request)
        except Exception as problem:  # the asker decides what an exception means
            traceback.print_exc()
            reply = {"error": f"{type(problem).__name__}: {problem}".splitlines()[0]}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def timed(run: Callable[[int], Any]) -> Deed:
    """The deed `round`: run once on so many rows, and say how long that took."""

    def deed(rows: int) -> dict[str, Any]:
        begin = time.perf_counter()
        run(rows)
        return {"seconds": time.perf_counter() - begin}

    return deed
