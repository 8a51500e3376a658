"""Ranking rows by a column or a formula."""

from __future__ import annotations

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from curate.errors import UsageError
from curate.rank import _EXPANDS, RankConfig, rank, rank_frame, scored
from curate.rundir import RunDirectory
from curate.scores import score_run
from tests.sketchedrun import make

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


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A scored run of 41 rows and steps s01 to s04."""
    found = make(tmp_path_factory.mktemp("ranked") / "run").run
    score_run(found, "test")
    return found


@pytest.mark.parametrize(
    ("by", "where"),
    [
        ("total", None),
        ("late - 2 * early", "source = 'a'"),
        ("greatest(*COLUMNS('s0[12]|s03'))", None),
        ("list_sum([ *columns(lambda c: c LIKE 's0%') ])", None),
        ("struct_extract(frame, 'early')", None),
        ("(SELECT max(v) FROM (UNPIVOT (SELECT s01, s02) ON * INTO NAME n VALUE v))", None),
        ("#3", None),
        ("total - lag(total, 1, 0) OVER ()", "late > 0"),
        ("total", "least(*COLUMNS('early|s02')) > 0"),
    ],
)
def test_top_is_the_head_of_all(run: RunDirectory, by: str, where: str | None) -> None:
    """The best few are the first of the whole ranking, whichever way SQL names the columns."""
    whole = rank(run, "test", by=by, where=where)
    assert whole.height > 3
    best = rank(run, "test", by=by, where=where, top=3)
    assert_frame_equal(best, whole.head(3), check_column_order=False)


@pytest.mark.parametrize(
    ("text", "expands"),
    [
        ("late * 2 - early*total", False),
        ('(late) * (early) ** 2 * "s01"', False),
        ("avg(total) OVER (PARTITION BY source)", False),
        ("columns_seen * timeframe", False),
        ("*", True),
        ("count(*) OVER ()", True),
        ("greatest(* EXCLUDE (row))", True),
        ("max(DISTINCT *)", True),
        ("COLUMNS(lambda c: true)", True),
        ("hash(Frame)", True),
        ("frame.*", True),
        ("#2", True),
        ("greatest(/* all */ *)", True),
        ("greatest(-- all\n *)", True),
    ],
)
def test_texts_that_name_their_columns(text: str, expands: bool) -> None:
    """Multiplication reads the columns it names; whatever may mean others is given all of them."""
    assert bool(_EXPANDS.search(text)) == expands
