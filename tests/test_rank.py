"""Ranking rows by a column or a formula."""

from __future__ import annotations

import polars as pl
import pytest

from curate.errors import UsageError
from curate.rank import RankConfig, rank_frame, scored

FRAME = pl.DataFrame(
    {
        "row": [0, 1, 2, 3, 4],
        "id": list("abcde"),
        "source": ["x", "y", "x", "y", "x"],
        "total": [1.0, 3.0, 3.0, float("nan"), None],
        "total_se": [0.1, 0.2, 0.3, 0.4, 0.5],
        "late": [5.0, 1.0, 2.0, 3.0, 4.0],
        "text": ["one", "two", "three", "four", "five"],
    }
)


def test_column_order_ties_and_missing() -> None:
    """The best comes first, ties go by row, and NaN or NULL scores are not ranked."""
    found = rank_frame(FRAME, RankConfig(by="total"))
    assert found.select("row", "rank", "score_se").rows() == [(1, 1, 0.2), (2, 2, 0.3), (0, 3, 0.1)]
    assert found.columns[:6] == ["row", "id", "source", "score", "score_se", "rank"]
    assert found.columns[-1] == "text"


def test_ascending_top_and_where() -> None:
    """Least first on request, ties still by row, `top` and `where` narrow."""
    found = rank_frame(FRAME, RankConfig(by="late", descending=False, where="source = 'x'", top=2))
    assert found["row"].to_list() == [2, 4]


def test_formula_has_no_standard_error() -> None:
    """An SQL formula orders rows, and its standard error is NULL rather than a guess."""
    found = rank_frame(FRAME, RankConfig(by="late - 10 * total"))
    assert found["row"].to_list() == [0, 2, 1]
    assert found["score_se"].null_count() == 3


def test_scored_keeps_every_row_in_order() -> None:
    """Rows that do not pass or have no score stay, without a rank."""
    found = scored(FRAME, "total", where="total > 1")
    assert found["row"].to_list() == [0, 1, 2, 3, 4]
    # DuckDB orders NaN above every number, so the row passes `where` but has no score to rank.
    assert found["passes"].to_list() == [False, True, True, True, False]
    assert found["rank"].to_list() == [None, 1, 2, None, None]


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (RankConfig(by="text"), "expected numbers"),
        (RankConfig(where="late + 1"), "expected a condition"),
        (RankConfig(by="lat"), "late"),
        (RankConfig(top=0), "expected 1 or more"),
        (RankConfig(by="(COPY frame TO 'x')"), "expression"),
    ],
)
def test_wrong_requests_are_named(config: RankConfig, text: str) -> None:
    """What is no number, no condition, no column or no reading expression is refused."""
    with pytest.raises(UsageError, match=text):
        rank_frame(FRAME, config)
