"""Plan: plain data that can be printed, edited, stored and compared."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from rankfold._common import html_table, near, one_of, text_table
from rankfold.errors import PlanError
from rankfold.planning._amounts import LABELS, QUANTITIES, Amounts, amount, total
from rankfold.planning._budget import Budget, Measured
from rankfold.planning._choice import Choice, joined, option_text
from rankfold.planning._metrics import METRICS, WEIGHTS
from rankfold.planning._objectives import CALIBRATED, OBJECTIVES, SQUARES, combined
from rankfold.planning._plan_json import head_data, plan_json, read_plan
from rankfold.planning._planning import Planning
from rankfold.planning._recount import recounted
from rankfold.stats import Stats, count_bytes, count_params

LEFT = ("layer", "method", "reason")  # columns of words
ALWAYS = ("params", "macs")  # quantities with a column whatever the budget


@dataclass(frozen=True)
class Plan:
    """What becomes of every factorisable layer of a model.

    The totals are those of the whole model: its dense totals less what the layers save. The error of a
    plan is the root mean square of the relative errors over its layers, 0 for a dense one; at a fixed
    model it orders plans as the planner's objective, the sum of squared relative errors, does.

    Args:
        layers: per layer name, its choice.
        budget: the budget the plan was made for, if any.
        planning: how the plan was made; None for one that was written by hand.
        dense: parameters, multiply-adds per sample, bytes and seconds of the dense model, where known.
        metric: what the errors of the layers are measured in: "weights", "outputs", … (see `Planning`).
        objective: what sum over the layers the planner made small: "squares" of the errors, … (see `Planning`).
        measured: the latency that the compressed model turned out to have, where that was tried.

    Raises:
        PlanError: an unknown metric or objective, or an amount that is none.

    Example:
        >>> plan = Plan({"fc": Choice("svd", rank=4)})
        >>> Plan.from_json(plan.to_json()) == plan
        True
        >>> plan["fc"].rank
        4
    """

    layers: Mapping[str, Choice]
    budget: Budget | None = None
    planning: Planning | None = None
    dense: Amounts = Amounts()
    metric: str = WEIGHTS
    objective: str = SQUARES
    measured: Measured | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", dict(self.layers))
        one_of("metric", self.metric, METRICS, error=PlanError)
        one_of("objective", self.objective, OBJECTIVES, error=PlanError)
        self.dense.check("a plan", "dense_")

    def __getitem__(self, name: str) -> Choice:
        """Return what becomes of a layer.

        Raises:
            PlanError: the plan names no such layer.
        """
        if name not in self.layers:
            raise PlanError(f"the plan has no layer {name!r}{near(name, self.layers)}")
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the layers."""
        return iter(self.layers)

    @property
    def amounts(self) -> Amounts:
        """Predicted parameters, MACs, bytes and seconds of the whole model; None where a layer's are not known."""
        changed = [choice for choice in self.layers.values() if choice.method != "dense"]
        return total((choice.amounts - choice.dense for choice in changed), start=self.dense)

    @property
    def params(self) -> int | None:
        """Predicted parameters of the whole model; None where a layer's are not known."""
        return self.amounts.params

    @property
    def macs(self) -> int | None:
        """Predicted multiply-adds per sample of the whole model; None where a layer's are not known."""
        return self.amounts.macs

    @property
    def bytes(self) -> int | None:
        """Predicted bytes of the saved model; None where a layer's are not known."""
        return self.amounts.bytes

    @property
    def latency(self) -> float | None:
        """Promised seconds of one pass of the model; None where a layer's are not known."""
        return self.amounts.latency

    @property
    def error(self) -> float | None:
        """Root mean square of the layers' relative errors; None where one is not known."""
        errors = [0.0 if choice.method == "dense" else choice.error for choice in self.layers.values()]
        if any(error is None for error in errors):
            return None
        return math.sqrt(sum(error**2 for error in errors if error) / max(1, len(errors)))

    @property
    def output_error(self) -> float | None:
        """Predicted relative error of the model's outputs; None where a layer's error is not known.

        Each layer is taken to keep 1 - e^2 of the energy that reaches it: `sqrt(1 - prod(1 - e^2))`. In a calibrated
        plan e is what was measured at the model's outputs with this layer alone changed, else the layer's own error.
        """
        changed = [choice for choice in self.layers.values() if choice.method != "dense"]
        measured = self.objective == CALIBRATED
        squares = [c.damage if measured else c.error and c.error**2 for c in changed]
        return None if None in squares else combined(square or 0.0 for square in squares)

    def with_choice(self, name: str, choice: Choice) -> Plan:
        """Return the plan with another choice for one layer.

        What was predicted of the choice before does not stay with the new one, even where that was made of it by
        `dataclasses.replace`.

        Raises:
            PlanError: the plan names no such layer.
        """
        before = self[name]
        dense = choice.dense.or_else(before.dense)
        changed = {**self.layers, name: replace(_unpredicted(choice, before), dense=dense)}
        return replace(self, layers=changed, measured=None)

    def checked(self, model: nn.Module, stats: Stats | None = None) -> Plan:
        """Return the plan with all amounts counted again on the model, after its ranks were edited, say.

        Parameters and bytes are counted, and multiply-adds where `stats` holds the calls of the layers; where it does
        not, and of seconds, what the plan says is kept. Predicted errors stay as they are: those of choices that were
        edited are not known, and None.

        Args:
            model: the dense model that the plan is for.
            stats: what `measure` found of it.

        Raises:
            PlanError: a layer that the model doesn't have, or a method, rank or option that doesn't fit its layer.
        """
        whole = Amounts(count_params(model), stats.macs if stats else None, count_bytes(model))
        return replace(self, layers=recounted(model, self.layers, stats), dense=whole.or_else(self.dense))

    def to_json(self) -> str:
        """Return the plan as JSON text, one line per layer."""
        head = head_data(self.budget, self.planning, self.dense, self.measured, self.layers)
        words = {"metric": (self.metric, WEIGHTS), "objective": (self.objective, SQUARES)}
        head |= {key: value for key, (value, usual) in words.items() if value != usual}
        return plan_json(head, self.layers, (self.metric, self.objective))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan, checking all of it.

        The text may have been edited. What was predicted of a layer belongs to one method, rank and options: where
        these were changed it is not known any more, and `checked` or `compress` counts it again.

        Raises:
            PlanError: not JSON, another version, an unknown key, method or option, a rank that is not an int >= 1.
        """
        return cls(**read_plan(text))

    def __str__(self) -> str:
        """Return the plan as an aligned table with its totals."""
        return "\n".join([text_table(*_table(self), left=LEFT), "", *_totals(self)])

    def _repr_html_(self) -> str:
        """Return the plan as a table for notebooks."""
        return html_table(*_table(self), left=LEFT, below=_totals(self))


def _unpredicted(choice: Choice, before: Choice) -> Choice:
    """Return a choice without what was predicted of the one before, where it is another: `replace` copies all of it."""
    if str(choice) == str(before):
        return choice
    amounts = Amounts() if choice.amounts == before.amounts else choice.amounts
    error, damage = (
        None if getattr(choice, name) == getattr(before, name) else getattr(choice, name)
        for name in ("error", "damage")
    )
    return replace(choice, amounts=amounts, error=error, damage=damage)


def _table(plan: Plan) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the heads and the rows of a plan's table."""
    limited = plan.budget.limits if plan.budget is not None else {}
    quantities = [quantity for quantity in QUANTITIES if quantity in ALWAYS or quantity in limited]
    heads = ("layer", "method", "rank", *(LABELS[quantity] for quantity in quantities), "error", "reason")
    return heads, [_row(name or "(model)", choice, quantities) for name, choice in plan.layers.items()]


def _row(name: str, choice: Choice, quantities: Sequence[str]) -> tuple[str, ...]:
    options = ",".join(option_text(*item) for item in choice.options.items())
    method = f"{choice.method}({options})" if options else choice.method
    return (
        name,
        method,
        "-" if choice.rank is None else joined(choice.rank),
        *(_change(choice, quantity) for quantity in quantities),
        "-" if choice.error is None else f"{choice.error:.4f}",
        choice.reason or (f"error of the {choice.metric}" if choice.metric else ""),
    )


def _change(choice: Choice, quantity: str) -> str:
    new, old = choice.amounts[quantity], choice.dense[quantity]
    if choice.method == "dense":
        return amount(quantity, old if new is None else new)
    return f"{amount(quantity, old)} -> {amount(quantity, new)}"


def _totals(plan: Plan) -> list[str]:
    lines = []
    for quantity, old in plan.dense.known():
        new, label = plan.amounts[quantity], LABELS[quantity]
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
