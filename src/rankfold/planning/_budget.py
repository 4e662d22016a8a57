"""Budgets: what a plan may keep of each quantity, and the latency that it turned out to keep."""

from __future__ import annotations

from dataclasses import dataclass

from rankfold._common import real
from rankfold.errors import BudgetError, PlanError
from rankfold.planning._amounts import QUANTITIES, amount


@dataclass(frozen=True)
class Budget:
    """Fractions of the whole model that a plan may keep.

    Args:
        params: parameters kept, 0 < x <= 1, or None for no limit.
        macs: multiply-adds kept, 0 < x <= 1, or None for no limit.
        bytes: bytes of the saved state kept, 0 < x <= 1, or None for no limit.
        latency: time of one pass kept, 0 < x <= 1, or None for no limit; it is measured on the user's device.

    Raises:
        BudgetError: no limit at all, or a limit outside 0 < x <= 1.

    Example:
        >>> Budget(macs=0.5).limits
        {'macs': 0.5}
    """

    params: float | None = None
    macs: float | None = None
    bytes: float | None = None
    latency: float | None = None

    def __post_init__(self) -> None:
        for quantity, share in self.limits.items():
            known = real(
                f"budget {quantity}", share, most=1, ends="(]", error=BudgetError, why=": it is the fraction kept"
            )
            object.__setattr__(self, quantity, known)
        if not self.limits:
            raise BudgetError(f"a budget limits one or more of {', '.join(QUANTITIES)}, such as Budget(macs=0.5)")

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are set, by quantity."""
        return {quantity: getattr(self, quantity) for quantity in QUANTITIES if getattr(self, quantity) is not None}


@dataclass(frozen=True)
class Measured:
    """Latency of the compressed model as it was measured when the plan was made, side by side with the dense one.

    Attributes:
        kept: time of one pass over the dense model's.
        dense_seconds: seconds of one pass of the dense model.
        setting: where it was measured, in words.

    Raises:
        PlanError: times that are not above zero.
    """

    kept: float
    dense_seconds: float
    setting: str

    def __post_init__(self) -> None:
        for name in ("kept", "dense_seconds"):
            real(f"{name} of a measured latency", getattr(self, name), ends="()", error=PlanError)
        if not isinstance(self.setting, str):
            raise PlanError(f"the setting of a measured latency must be a text, got {self.setting!r}")

    def __str__(self) -> str:
        """Return the measurement in words."""
        before, after = (amount("latency", x) for x in (self.dense_seconds, self.kept * self.dense_seconds))
        return f"{before} -> {after} ({self.kept:.1%} kept; {self.setting})"
