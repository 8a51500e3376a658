"""The figures as a picture: a panel a case, a point a pass."""

from __future__ import annotations

from typing import Any

from tests.benchmarks.cases import CASES

ORDER = (
    "training step", "floor", "outer", "fourier", "auto", "auto, best size",
    "published, best size", "bergson, best size",
)  # fmt: skip


def chart(found: dict[str, Any]) -> Any:
    """Seconds a row over those of a training step (logarithmic), with quartiles."""
    import altair as alt

    cases = [case for case in CASES if case in found["cases"]]
    values = [
        {"case": case, "pass": name, "low": line["ratio"][0], "ratio": line["ratio"][1],
         "high": line["ratio"][2]}
        for case in cases
        for name, line in found["cases"][case]["passes"].items()
    ]  # fmt: skip
    x = alt.X("ratio:Q", scale=alt.Scale(type="log"), title="seconds a row / training step")
    y = alt.Y("pass:N", sort=list(ORDER), title=None)
    base = alt.Chart(alt.Data(values=values))
    bars = base.mark_rule().encode(x="low:Q", x2="high:Q", y=y)
    points = base.mark_point(filled=True, size=60).encode(
        x=x, y=y, color=alt.Color("pass:N", sort=list(ORDER), legend=None)
    )
    one = base.mark_rule(strokeDash=[3, 3], opacity=0.5).encode(x=alt.datum(1))
    panel = alt.layer(one, bars, points).properties(width=260, height=150)
    return panel.facet(facet=alt.Facet("case:N", sort=cases, title=None), columns=2)
