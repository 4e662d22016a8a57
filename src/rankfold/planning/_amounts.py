"""What a layer or a model takes: parameters, multiply-adds, bytes and time, as one value."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args

from rankfold.errors import PlanError

Quantity = Literal["params", "macs", "bytes", "latency"]
QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)
MOST, LARGEST = 2**63 - 1, 1e300  # amounts beyond these are damage, and would overflow in sums
LABELS: Mapping[str, str] = MappingProxyType({q: "MACs" if q == "macs" else q for q in QUANTITIES})


@dataclass(frozen=True)
class Amounts:
    """Amounts of the four quantities that a budget can limit; None where one is not known.

    Attributes:
        params: parameters.
        macs: multiply-adds per sample.
        bytes: bytes of the saved state.
        latency: seconds in one pass of the model.

    Example:
        >>> before, after = Amounts(params=64, macs=640), Amounts(params=16)
        >>> after - before
        Amounts(params=-48, macs=None, bytes=None, latency=None)
    """

    params: int | None = None
    macs: int | None = None
    bytes: int | None = None
    latency: float | None = None

    def __getitem__(self, quantity: str) -> Any:
        """Return the amount of a quantity by its name."""
        return getattr(self, quantity)

    def known(self) -> Iterator[tuple[Quantity, Any]]:
        """Yield the quantities that are known with their amounts."""
        return ((quantity, self[quantity]) for quantity in QUANTITIES if self[quantity] is not None)

    def or_else(self, other: Amounts) -> Amounts:
        """Return the amounts, and the other's where they are not known."""
        return Amounts(*(other[q] if self[q] is None else self[q] for q in QUANTITIES))

    def __add__(self, other: Amounts) -> Amounts:
        """Return the sums, of what both know."""
        return Amounts(*(None if None in (self[q], other[q]) else self[q] + other[q] for q in QUANTITIES))

    def __sub__(self, other: Amounts) -> Amounts:
        """Return the differences, of what both know."""
        return Amounts(*(None if None in (self[q], other[q]) else self[q] - other[q] for q in QUANTITIES))

    def check(self, owner: str, prefix: str = "") -> None:
        """Raise a `PlanError` where an amount is none that `owner` can have."""
        for quantity, value in self.known():
            if quantity == "latency":
                if not is_real(value):
                    raise PlanError(
                        f"{prefix}{quantity} of {owner} must be a finite number of seconds >= 0, got {value!r}"
                    )
            elif type(value) is not int or not 0 <= value <= MOST:
                raise PlanError(f"{prefix}{quantity} of {owner} must be a whole number >= 0, got {value!r}")


def total(amounts: Iterable[Amounts], start: Amounts) -> Amounts:
    """Return the sum of amounts; a quantity that one of them doesn't know is not known of the sum."""
    for one in amounts:
        start = start + one
    return start


def is_real(value: Any) -> bool:
    """Tell whether a value is a finite number >= 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= LARGEST


def amount(quantity: str, value: float | None) -> str:
    """Return an amount as it is printed: "?" where it is not known."""
    if value is None:
        return "?"
    return f"{1e3 * value:.4g} ms" if quantity == "latency" else f"{value:,}"
