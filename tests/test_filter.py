"""Which rows a filter keeps, and the reasons for those it drops."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest
from polars.testing import assert_frame_equal
from pydantic import ValidationError

from curate.errors import UsageError
from curate.filter import NEEDED, FilterConfig, decide, decided, take_turns
from curate.rank import from_examples
from curate.rundir import RunDirectory
from curate.scores import score_run
from tests.sketchedrun import make

FRAME = pl.DataFrame(
    {
        "row": list(range(8)),
        "id": [f"i{n}" for n in range(8)],
        "source": ["a", "a", "a", "a", "b", "b", "b", "b"],
        "tokens": [10, 20, 30, 40, 10, 20, 30, 40],
        "total": [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, None],
        "late": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0],
        "leaks": [["q"], [], [], [], [], [], [], []],
    }
)


def kept(**rules: object) -> list[int]:
    found = decide(FRAME, FilterConfig(**rules))  # type: ignore[arg-type]
    return found.filter("kept")["row"].to_list()


@pytest.mark.parametrize(
    ("rules", "rows"),
    [
        ({}, [1, 2, 3, 4, 5, 6]),
        ({"drop_leaks": False}, [0, 1, 2, 3, 4, 5, 6]),
        ({"where": "late > 2.5"}, [2, 3, 4, 5, 6]),
        ({"top": 2}, [1, 2]),
        ({"fraction": 0.5}, [1, 2, 3]),
        ({"quantile": 0.5}, [1, 2, 3]),
        ({"quantile": 0.5, "by": "late", "descending": False}, [1, 2, 3, 4]),
        ({"by": "late", "descending": False, "top": 2}, [1, 2]),
        ({"by": "late + 0 * tokens", "top": 1}, [7]),
        ({"tokens": 60}, [1, 2]),
        ({"quotas": {"a": 1, "b": 2}}, [1, 2, 3, 4, 5]),
        ({"quotas": {"a": 2, "b": 0}}, [1, 2]),
        ({"quotas": {"a": 2}, "top": 3}, [1, 2, 4]),
    ],
)
def test_rules(rules: dict[str, object], rows: list[int]) -> None:
    """Each rule alone, and quotas before the count, keep exactly these rows."""
    assert kept(**rules) == rows


def test_every_row_has_a_decision_and_a_reason() -> None:
    """All rows come back in order; a dropped one names the first rule that dropped it, weight 0."""
    found = decide(FRAME, FilterConfig(where="tokens < 40", top=2))
    assert found["row"].to_list() == list(range(8))
    assert found["rule"].to_list() == [
        "same content as a query", "kept", "kept", "not tokens < 40", "not in the top 2",
        "not in the top 2", "not in the top 2", "not tokens < 40",
    ]  # fmt: skip
    assert found["weight"].to_list() == [0, 1, 1, 0, 0, 0, 0, 0]
    assert decide(FRAME, FilterConfig())["rule"][7] == "no score"


def test_round_robin_takes_turns() -> None:
    """Queries take their best free row in turn, skip rows that are out, and stop when they run
    out.
    """
    tops = pl.DataFrame(
        {
            "query_row": [0, 0, 0, 1, 1, 1],
            "row": [0, 1, 2, 1, 3, 5],
            "rank": [1, 2, 3, 1, 2, 3],
        }
    )
    # Row 0 leaks: query 0 takes 1, query 1 then 3, query 0 takes 2.
    found = decide(FRAME, FilterConfig(round_robin=3), tops)
    assert found.filter("kept")["row"].to_list() == [1, 2, 3]
    assert take_turns(tops, set(range(8)), 100) == [0, 1, 2, 3, 5]


@pytest.mark.parametrize(
    ("rules", "text"),
    [
        ({"top": 1, "fraction": 0.5}, "top and fraction"),
        ({"round_robin": 1}, "score with top_k"),
        ({"quotas": {"c": 1}}, "the sources are a, b"),
        ({"quotas": {"a": -1}}, "0 or more"),
        ({"by": "nothing"}, "nothing"),
    ],
)
def test_contradictions_are_refused(rules: dict[str, object], text: str) -> None:
    """Rules that exclude each other, or name what is not there, are refused by name."""
    with pytest.raises(UsageError, match=text):
        kept(**rules)


def test_unknown_rule_is_refused() -> None:
    """A rule that does not exist is an error, never ignored."""
    with pytest.raises(ValidationError):
        FilterConfig(tpo=3)  # type: ignore[call-arg]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A scored run."""
    made = make(tmp_path_factory.mktemp("filter") / "run").run
    score_run(made, "test")
    return made


def columns_of(run: RunDirectory, by: str, where: str | None = None) -> pl.DataFrame:
    """What a filter by this is given."""
    return from_examples(run, "test", lambda frame: frame, by, where, NEEDED)


@pytest.mark.parametrize(
    "rules",
    [
        {"by": "late", "top": 5, "quotas": {"a": 0.5}},
        {"by": "early - LATE", "where": "topic = 'x' and length(text) > 6", "fraction": 0.5},
        {"where": "greatest(*columns('s0.')) > 0"},
        {"where": "frame.total > 0", "tokens": 100},
    ],
    ids=["name", "formula", "columns", "frame"],
)
def test_decisions_need_no_more_columns_than_are_named(
    run: RunDirectory, rules: dict[str, Any]
) -> None:
    """From a run they are what the whole table gives."""
    config = FilterConfig(**rules)
    expected = decide(columns_of(run, "*"), config)
    assert_frame_equal(decided(run, "test", config), expected)


def test_text_is_not_read_unless_it_is_named(run: RunDirectory) -> None:
    """What rows hold beside their scores stays on disk; a score has its error with it."""
    whole = set(columns_of(run, "*").columns)
    assert set(columns_of(run, "late").columns) == {*NEEDED, "late", "late_se"} & whole
    assert {"text", "total"} <= set(columns_of(run, "total", "text like '%1'").columns)


def test_a_column_that_is_not_there_is_told_from_all_that_are(run: RunDirectory) -> None:
    """The line names the columns that could have been meant, text among them."""
    with pytest.raises(UsageError, match="text"):
        decided(run, "test", FilterConfig(where="txet = 'a'"))
