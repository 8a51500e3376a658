"""The benchmark of growth: its exponents are right, and its files are written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.benchmarks import growth
from tests.benchmarks.growth import Fit, Shape, fit, verdict

SIZES = (8, 16, 32, 64, 128, 256)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_a_power_law_is_found(exponent: float) -> None:
    """Noise of 5 % leaves the exponent within three of its standard errors, which are not 0."""
    random = np.random.default_rng(0)
    times = [list(size**exponent * random.lognormal(0, 0.05, 15)) for size in SIZES]
    found = fit(SIZES, times)
    assert 0 < found.error < 0.05
    assert abs(found.exponent - exponent) < 3 * found.error


def test_fixed_costs_count_little() -> None:
    """The larger half decides: a cost that every size has hides less of a linear law there."""
    times = [[16 + float(size)] * 3 for size in SIZES]
    whole = np.polyfit(np.log(SIZES), np.log([own[0] for own in times]), 1)[0]
    assert whole + 0.1 < fit(SIZES, times).exponent < 1


def test_growth_beyond_the_expected_is_called_out() -> None:
    """Only an exponent that lies beyond by more than two standard errors is."""
    assert verdict(Fit(1.3, 0.1), (0.9, 1.05)) == "GROWS FASTER"
    assert verdict(Fit(1.2, 0.1), (0.9, 1.05)) == "as expected"
    assert verdict(Fit(0.6, 0.1), (0.9, 1.05)) == "grows slower"


def test_parameters_are_those_of_the_body() -> None:
    """Twice the layers are twice the parameters; twice the width nearly four times."""
    one = Shape().parameters()
    assert Shape(blocks=2).parameters() == 2 * one
    assert 3.9 < Shape(width=128).parameters() / one < 4


@pytest.mark.parametrize("axis", growth.AXES, ids=lambda axis: axis.name)
def test_every_axis_has_room_for_a_slope(axis: growth.Axis, tmp_path: Path) -> None:
    """Four values or more, over a factor of eight or more, and the smallest of them works."""
    assert len(axis.values) >= 4
    assert axis.values[-1] >= 8 * axis.values[0]
    size, work = axis.prepare(axis.values[0], tmp_path)
    assert size > 0
    work()


def test_the_files_hold_what_was_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table's exponent is in the JSON file, with every timing, and the chart names the axis."""
    growth.main(["--axis", "sketch: m", "--seconds", "0", "--into", str(tmp_path)])
    found = json.loads((tmp_path / "growth.json").read_text())["axes"][0]
    printed = capsys.readouterr().out.splitlines()[1]
    assert printed.startswith("sketch: m ")
    assert f"{found['exponent']:.2f} ± {found['error']:.2f}" in printed
    assert [len(own) for own in found["seconds"]] == [growth.LEAST_ROUNDS] * len(found["values"])
    assert "sketch: m" in (tmp_path / "growth.html").read_text()
