"""Early and late windows of loop steps, given as fractions of a query's depth or as steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from curate.errors import UsageError

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Windows:
    """Two windows of steps.

    With ``unit="fraction"`` step t of a query of depth d lies in [a, b) when the middle of the
    step, (t - ½)/d, does: depth 8 gives 1-4 and 5-8, depth 5 gives 1-2 and 3-5 (the step in the
    middle counts as late). With ``unit="step"`` both ends are step numbers, counted from 1 and
    included.

    Raises:
        UsageError: a window is empty, turned round or out of range.
    """

    early: tuple[float, float] = (0.0, 0.5)
    late: tuple[float, float] = (0.5, 1.0)
    unit: Literal["fraction", "step"] = "fraction"

    def __post_init__(self) -> None:
        if self.unit not in ("fraction", "step"):
            raise UsageError(f"windows: unit is {self.unit!r}; expected 'fraction' or 'step'")
        for name in ("early", "late"):
            self._check(name, getattr(self, name))

    def _check(self, name: str, window: tuple[float, float]) -> None:
        low, high = window
        if self.unit == "fraction":
            if not 0 <= low < high <= 1:
                raise UsageError(
                    f"windows: {name} is [{low}, {high}]; expected fractions 0 ≤ from < to ≤ 1, "
                    "or unit: step for step numbers"
                )
        elif not (1 <= low <= high and float(low).is_integer() and float(high).is_integer()):
            raise UsageError(
                f"windows: {name} is [{low}, {high}]; expected step numbers 1 ≤ first ≤ last"
            )

    @classmethod
    def of(cls, value: Windows | Mapping[str, Any] | None) -> Windows:
        """Windows from a mapping such as a recipe's, from nothing (the default), or as they are."""
        if isinstance(value, Windows):
            return value
        given = dict(value or {})
        unknown = sorted(set(given) - {"early", "late", "unit"})
        if unknown:
            raise UsageError(
                f"windows: unknown key {unknown[0]!r}; expected 'early', 'late' or 'unit'"
            )
        ends: dict[str, Any] = {
            key: _pair(key, given[key]) for key in ("early", "late") if key in given
        }
        return cls(**ends, **({"unit": given["unit"]} if "unit" in given else {}))

    def as_dict(self) -> dict[str, Any]:
        """The windows as JSON-able values."""
        return {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}

    def masks(self, depths: npt.NDArray[np.int64], steps: int) -> tuple[BoolArray, BoolArray]:
        """Which steps of each query are early, and which late.

        Args:
            depths: (Q,) how many steps each query has.
            steps: τ, the largest depth.

        Returns:
            Two arrays (Q, τ).
        """
        return self._mask(self.early, depths, steps), self._mask(self.late, depths, steps)

    def _mask(
        self, window: tuple[float, float], depths: npt.NDArray[np.int64], steps: int
    ) -> BoolArray:
        number = np.arange(1, steps + 1)[None, :]
        depth = depths[:, None]
        low, high = window
        if self.unit == "step":
            inside = (number >= low) & (number <= high)
        else:
            middle = (number - 0.5) / np.maximum(depth, 1)
            inside = (middle >= low) & (middle < high)
        return np.asarray(inside & (number <= depth))


def _pair(key: str, value: Any) -> tuple[float, float]:
    try:
        low, high = value
        return float(low), float(high)
    except (TypeError, ValueError):
        raise UsageError(
            f"windows: {key} is {value!r}; expected two numbers, such as [0, 0.5]"
        ) from None
