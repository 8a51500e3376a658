"""The benchmark command on a case of a second; the figures themselves are nobody's test."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.benchmarks import job
from tests.benchmarks.__main__ import main
from tests.benchmarks.hired import PUBLISHED, Shop, Worker, WorkerError
from tests.benchmarks.rounds import error, summed
from tests.benchmarks.verdicts import verdicts

TINY = ("--case", "tiny", "--quick", "--threads", "1", "--without", PUBLISHED)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the command wrote."""
    folder = tmp_path_factory.mktemp("out")
    main([*TINY, "--out", str(folder)])
    return folder


def test_the_command_measures_a_case_and_writes_what_it_found(written: Path) -> None:
    """Every pass of a tiny case gets seconds, memory, and scores within a sketch's noise."""
    passes = json.loads((written / "BENCHMARKS.json").read_text())["cases"]["tiny"]["passes"]
    assert set(passes) == {
        "training step", "floor", "outer", "fourier", "auto", "auto, best size",
    }  # fmt: skip
    for line in passes.values():
        low, middle, high = line["seconds"]
        assert 0 < low <= middle <= high
        assert line["peak_anonymous"] > 10 << 20
    for name in ("outer", "fourier", "auto"):
        assert 1e-3 < passes[name]["error"] < 3 / math.sqrt(64)
        assert passes[name]["bytes_per_row"] == 2 * (64 + 8)
    page = (written / "BENCHMARKS.md").read_text()
    assert page.index("## Expected") < page.index("## Measured")
    assert "| tiny | auto, m = 64 |" in page


def test_a_case_measured_alone_leaves_the_others(
    written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rendering prints what other calls have kept, and another machine's figures are refused."""
    kept = json.loads((written / "BENCHMARKS.json").read_text())
    kept["cases"]["d128"] = kept["cases"]["tiny"]
    (tmp_path / "BENCHMARKS.json").write_text(json.dumps(kept))
    main(["--render", "--threads", "1", "--out", str(tmp_path)])
    assert "d128: our pass / training step, seconds" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="name another folder"):
        main(["--render", "--threads", "3", "--out", str(tmp_path)])


def test_ratios_are_of_seconds_a_row_within_a_round() -> None:
    """A pass on twice the rows in the same seconds costs half, whatever the rounds differ by."""
    seconds = {"training step": [1.0, 2.0, 4.0], "pass": [1.0, 2.0, 4.0]}
    found = summed(seconds, {"training step": 2, "pass": 4})
    assert found["pass"]["ratio"] == [0.5, 0.5, 0.5]
    assert found["pass"]["rows_per_second"] == 2.0


def test_the_error_is_in_units_of_the_gradients_lengths() -> None:
    """Gradients of lengths 2 and 3 whose inner product is off by 0.6 have an error of 0.1."""
    exact = [[4.0, 0.0], [0.0, 9.0]]
    assert error([[99.0, 0.6], [0.6, 99.0]], exact) == pytest.approx(0.1)


def test_a_line_through_the_runs_gives_the_whole() -> None:
    """Two runs of the job fix what a row costs and what the process costs without any."""
    runs = [{"rows": rows, "queries": 20, "seconds": 3.0 + (rows + 20) / 2} for rows in (10, 30)]
    found = job.extrapolated(runs, "seconds", 1000)
    assert found == pytest.approx({"fixed": 3.0, "each": 0.5, "whole": 503.0})


def test_one_run_gives_no_line() -> None:
    """One run gives no line: what it would extrapolate to is left open."""
    assert job.extrapolated([{"rows": 5, "queries": 5, "seconds": 1.0}], "seconds", 9) == {
        "fixed": None, "each": None, "whole": None,
    }  # fmt: skip


def test_a_smaller_batch_that_is_nearly_as_fast_is_taken() -> None:
    """Nine tenths of the rows a second will do where a side says so, else the fastest is taken."""
    tried = {1: 12.0, 2: 11.0, 4: 10.0, 8: 10.5}
    assert [job.smallest(tried, good) for good in (0.8, 0.9, 1.0)] == [1, 2, 4]


def test_sides_take_turns_where_both_have_so_many_rows() -> None:
    """Runs on a number of rows that both are given alternate, once where they are long; the others
    come once, afterwards.
    """
    ours, theirs = job.sides((10, 99, 1000), (5, 10, 1000))
    found = [(side.name, rows) for side, rows in job.order((ours, theirs), turns=2)]
    few, many = ([("ours", rows), ("published", rows)] for rows in (10, 1000))
    assert found == [*few, *few, *many, ("ours", 99), ("published", 5)]


def test_demands_compare_the_best_of_both_data_types() -> None:
    """Ours in bf16 is held against the published package in float32 where these are fastest."""

    def case(ours: float, theirs: float) -> dict[str, object]:
        line = {"ratio": [1.0, 1.0, 1.0]}
        best = {"auto, best size": line | {"rows_per_second": ours}}
        other = {"published, best size": line | {"rows_per_second": theirs}}
        return {"passes": {"auto": line} | best | other}

    found = {"machine": {"bf16": True}, "cases": {"d128": case(2, 3), "d128 bf16": case(9, 1)}}
    rate = next(verdict for verdict in verdicts(found) if "published" in verdict.what)
    assert rate.found == 3.0 and rate.met


def test_a_worker_that_fails_says_why(tmp_path: Path) -> None:
    """An exception in a worker comes back with its type and message, and a second request works."""
    with Worker(Shop(tmp_path, threads=1), "with_plain.py") as worker:
        with pytest.raises(WorkerError, match=r"with_plain\.py: KeyError"):
            worker.ask("make", case={}, kind="floor")
        with pytest.raises(WorkerError, match="KeyError: 'round'"):
            worker.ask("round", rows=1)
