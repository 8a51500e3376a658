"""`python -m tests.zoo`: measure every entry, print one table, exit 1 where one is wrong."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.zoo.entries import entries
from tests.zoo.measure import Outcome, measure
from tests.zoo.table import as_json, markdown, row, summary

TABLE = Path(__file__).with_name("TABLE.md")


def main(arguments: list[str] | None = None) -> int:
    """Run; the exit status: 0 where all are right or refused as declared, else 1."""
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument("--filter", default="", metavar="TEXT", help="only names that contain it")
    parser.add_argument(
        "--json", metavar="FILE", type=Path, help="write the outcomes there as well"
    )
    parser.add_argument("--failures", action="store_true", help="print only entries that fail")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name}")
    given = parser.parse_args(arguments)
    outcomes: list[Outcome] = []
    for entry in entries():
        if given.filter in entry.name:
            outcomes.append(measure(entry.name, entry.make))
            if not given.failures or not outcomes[-1].passes:
                sys.stdout.write(row(outcomes[-1]) + "\n")
                sys.stdout.flush()
    sys.stdout.write(summary(outcomes) + "\n")
    if given.json:
        given.json.write_text(as_json(outcomes))
    if given.write:
        TABLE.write_text(markdown(outcomes))
    return 0 if all(outcome.passes for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
