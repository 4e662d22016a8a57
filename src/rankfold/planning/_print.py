"""A plan as an aligned table with its totals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rankfold.planning._budget import QUANTITIES, SHOWN, amount
from rankfold.planning._objectives import CALIBRATED

if TYPE_CHECKING:
    from rankfold.planning._plan import Choice, Plan

LEFT = frozenset({"layer", "method", "reason"})
ALWAYS = ("params", "macs")  # quantities with a column whatever the budget


def plan_text(plan: Plan) -> str:
    """Return the table and the totals of a plan."""
    limited = plan.budget.limits if plan.budget is not None else {}
    quantities = [quantity for quantity in QUANTITIES if quantity in ALWAYS or quantity in limited]
    heads = ("layer", "method", "rank", *(SHOWN[quantity] for quantity in quantities), "error", "reason")
    table = [heads, *(_row(name or "(model)", choice, quantities) for name, choice in plan.layers.items())]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    table.insert(1, tuple("-" * width for width in widths))
    lines = ["  ".join(map(_pad, row, widths, heads)).rstrip() for row in table]
    return "\n".join([*lines, "", *_totals(plan)])


def _pad(text: str, width: int, head: str) -> str:
    return text.ljust(width) if head in LEFT else text.rjust(width)


def _row(name: str, choice: Choice, quantities: Sequence[str]) -> tuple[str, ...]:
    options = ",".join(_option_text(*item) for item in choice.options.items())
    method = f"{choice.method}({options})" if options else choice.method
    rank = choice.rank if isinstance(choice.rank, tuple) else (choice.rank,)
    return (
        name,
        method,
        "-" if choice.rank is None else "x".join(map(str, rank)),
        *(_change(choice, quantity) for quantity in quantities),
        "-" if choice.error is None else f"{choice.error:.4f}",
        choice.reason or (f"error of the {choice.metric}" if choice.metric else ""),
    )


def _option_text(name: str, value: Any) -> str:
    if isinstance(value, tuple):
        return f"{name}={'x'.join(map(str, value))}"
    return value if isinstance(value, str) else f"{name}={value}"


def _change(choice: Choice, quantity: str) -> str:
    new, old = getattr(choice, quantity), getattr(choice, f"dense_{quantity}")
    if choice.method == "dense":
        return amount(quantity, old if new is None else new)
    return f"{amount(quantity, old)} -> {amount(quantity, new)}"


def _totals(plan: Plan) -> list[str]:
    lines = []
    for quantity, label in SHOWN.items():
        new, old = getattr(plan, quantity), getattr(plan, f"dense_{quantity}")
        if old is not None:
            share = f" ({new / old:.1%} kept)" if new is not None and old else ""
            lines.append(f"{label}: {amount(quantity, old)} -> {amount(quantity, new)}{share}")
    if plan.measured is not None:
        lines.append(f"measured: {plan.measured}")
    changed = sum(choice.method != "dense" for choice in plan.layers.values())
    error = "unknown" if plan.error is None else f"{plan.error:.4f} (root mean square over layers, of {plan.metric})"
    whole = "unknown" if plan.output_error is None else f"{plan.output_error:.4f} (predicted, {_grade(plan)})"
    layers = f"layers: {changed} of {len(plan.layers)} factorised"
    return [*lines, f"error: {error}", f"output error: {whole}", layers]


def _grade(plan: Plan) -> str:
    """Return in words what the prediction rests on."""
    if plan.objective == CALIBRATED:
        return f"from measured points, errors of {plan.metric}"
    return f"from errors of {plan.metric}"
