"""Planning: how a model is to be made smaller, as one frozen object that travels with the plan."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypeAlias

from rankfold._common import near, one_of, whole
from rankfold.errors import MethodError, PlanError
from rankfold.layers import BLOCKS, TABLE
from rankfold.planning._choice import OWN, methods
from rankfold.planning._metrics import AUTO, METRICS
from rankfold.planning._objectives import OBJECTIVES
from rankfold.planning._rules import INITS, Init, RuleName, Select, rule_of
from rankfold.stats import Loss, Mask

MethodName: TypeAlias = Literal["svd", "cp", "tucker", "tt", "btt", "kronecker", "ring"]
MetricName: TypeAlias = Literal["auto", "weights", "outputs", "fisher", "fwsvd", "asvd", "whitening"]
ObjectiveName: TypeAlias = Literal["auto", "squares", "energy", "loss", "tempered", "calibrated"]


AFTER = ("init", "seed", "batches", "mask", "loss", "blocks", "recalibrate", "batchnorm", "missing")
"""The fields that what comes after planning goes by."""


@dataclass(frozen=True)
class Planning:
    """How methods and ranks are chosen, and what is done with the choice: all options of `plan` and `compress`.

    A plan holds the `Planning` that it was made with, in its JSON too, so that `compress(model, loader, plan=plan)` and
    `apply(model, plan)` do what was planned without being told again.

    Args:
        methods: the methods that may be mixed: "svd", "tucker", "cp", "tt", "btt", "kronecker", "ring", or one that was
            registered with `rankfold.layers.register`.
        rule: how ranks are chosen. "optimal": the least sum over the layers of what `objective` says; "uniform": the
            same share of cost in every layer; "energy": the same share of the squared singular values in every layer,
            or in another metric than the weights the same error; "evbmf": the ranks of empirical variational Bayes on
            the weights, weakened by one factor to meet the budget; or a function of the candidates per layer name
            (dense the first) and of the limits on their sums, that returns a choice per name.
        metric: what errors are measured in. "weights": the weights; "outputs": the outputs on the data (centred where
            there is a bias, which takes up the mean); "fisher": the outputs weighted by the gradients of `loss`; or as
            published: "fwsvd" (weights, rows by gradients), "asvd" (each input scaled by (E x^2)^(1/4), the square root
            of its size), "whitening" (second moment of the inputs, no bias, as SVD-LLM). "auto": "outputs" where there
            are data, else "weights". A layer whose inputs were not measured, an embedding say, is planned on its
            weight, and its choice says so.
        objective: the sum over layers that rule "optimal" makes small: "squares" of the errors; "energy", of
            -log(1 - e^2); "loss", of what e^2 may change the loss by; "tempered", of e^2 times the square root of what
            it would change the loss by, for data that are unlike those in use (these two need metric "fisher");
            "calibrated", of the squared errors of the model's outputs that each layer alone was measured to make, which
            takes two runs per layer on the first batches. "auto": "calibrated" where rule "optimal" has data to go by
            and the outputs can be compared, else "squares".
        init: what the plan is for: to "decompose" the weights, or to train from scratch. With "random" no weight is
            read, whatever its values or its device, and no error is predicted: only rule "uniform" or a function goes
            with it. "uniform" then takes, within a share, the first of `methods` that has a rank, and of it the largest
            share of the full rank. It is implied for a model on the meta device.
        include: names or patterns (`*`, `?`) of the only layers to change; all of them if empty.
        exclude: names or patterns of layers to leave dense. As in `include`, naming an embedding or the head that is
            tied to it names both.
        multiple: round ranks to multiples of this.
        seed: seed of whatever is random in decompositions, initialisations and the choice of patches.
        batches: how many batches of a loader to read at most; all of them if None, which takes a loader that ends.
        mask: which tokens of a batch count: the key of a tensor in mappings, "attention_mask" say, or a function of a
            batch to one (batch, tokens), True or 1 where a token counts.
        loss: a function of the model's output and the batch's target to the mean loss of the samples of a batch; needed
            for the metrics "fisher" and "fwsvd".
        blocks: names "first:last" of blocks, stretches of linear layers or convolutions of kernel 1, that a flexible
            layer may replace where that is better than factorising their layers. Five are found for each from the
            loader, with values fitted at 20,000 inputs, which takes minutes; or what
            `rankfold.train.flexible_candidates` found, with ranks and settings of your own.
        recalibrate: with a loader, whether the new layers are fitted to the inputs that they get (`recalibrate`).
        batchnorm: with a loader, whether BatchNorm is re-estimated where that lowers the error of the outputs.
        missing: of a planning read from JSON, which of its fields were functions or layers, which JSON can't hold.

    Raises:
        PlanError: an unknown method, rule, metric or objective, or a number that is none.

    References:
        Kim et al. 2016 (EVBMF ranks); Gusak et al. 2019 (MUSCO, weakened ranks); Zhang et al. 2015 (energies);
        Hsu et al. 2022 (FWSVD); Yuan et al. 2023 (ASVD); Wang et al. 2024 (SVD-LLM).

    Example:
        >>> Planning(methods="svd", multiple=16).methods
        ('svd',)
    """

    methods: Sequence[MethodName | str] | MethodName | str = ("svd", "tucker")
    rule: RuleName | Select = "optimal"
    metric: MetricName = "auto"
    objective: ObjectiveName = "auto"
    init: Init = "decompose"
    include: Sequence[str] | str = ()
    exclude: Sequence[str] | str = ()
    multiple: int = 1
    seed: int = 0
    batches: int | None = None
    mask: Mask | None = None
    loss: Loss | None = None
    blocks: Sequence[str] | str | Mapping[str, Any] = ()
    recalibrate: bool = True
    batchnorm: bool = True
    missing: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        for name in ("methods", "include", "exclude", "blocks", "missing"):
            object.__setattr__(self, name, _several(name, getattr(self, name)))
        _check_methods(self.methods)
        rule_of(self.rule)
        one_of("metric", self.metric, (AUTO, *METRICS), error=PlanError)
        one_of("objective", self.objective, (AUTO, *OBJECTIVES), error=PlanError)
        one_of("init", self.init, INITS, error=PlanError)
        object.__setattr__(self, "multiple", whole("multiple", self.multiple, error=PlanError))
        if self.batches is not None:
            object.__setattr__(self, "batches", min(whole("batches", self.batches, error=PlanError), sys.maxsize))
        unknown = set(self.missing) - {one.name for one in fields(self)}
        if unknown:
            raise PlanError(f"missing names a field {min(unknown)!r} that a planning does not have")
        if type(self.seed) is not int:
            raise PlanError(f"seed must be a whole number, got {self.seed!r}")
        for name in ("recalibrate", "batchnorm"):
            if type(getattr(self, name)) is not bool:
                raise PlanError(f"{name} must be True or False, got {getattr(self, name)!r}")

    def given(self, **short: Any) -> Planning:
        """Return the planning with the fields that were given in short form; one that is None was not."""
        return replace(self, **{name: value for name, value in short.items() if value is not None})

    def after(self, made: Planning | None) -> Planning:
        """Return how a plan was made, with what comes after planning as it is here."""
        return self if made is None else replace(made, **{name: getattr(self, name) for name in AFTER})

    def to_data(self) -> dict[str, Any]:
        """Return the planning as JSON data; `missing` names what that can't hold."""
        data, missing = {}, set(self.missing)
        for one in fields(self):
            value = getattr(self, one.name)
            if callable(value) or isinstance(value, Mapping):
                missing.add(one.name)
                value = list(value) if isinstance(value, Mapping) else one.default
            data[one.name] = list(value) if isinstance(value, tuple) else value
        return {**data, "missing": sorted(missing)}

    @classmethod
    def from_data(cls, data: Any) -> Planning:
        """Read what `to_data` returned.

        Raises:
            PlanError: it is something else, or a value is unusable.
        """
        if not isinstance(data, dict):
            raise PlanError(f"planning of a plan must be an object, got {data!r:.80}")
        known = {one.name for one in fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise PlanError(f"the planning has an unknown key {unknown[0]!r}{near(unknown[0], known)}")
        texts = {"rule", "metric", "objective", "init"} & data.keys()
        wrong = [name for name in texts if not isinstance(data[name], str)]
        wrong += [name for name in ("mask",) if not isinstance(data.get(name), str | None)]
        wrong += [name for name in ("loss",) if data.get(name) is not None]
        wrong += [name for name in ("blocks",) if isinstance(data.get(name), Mapping)]
        if wrong:
            raise PlanError(f"{wrong[0]} of a planning must be a name, got {data[wrong[0]]!r:.80}")
        return cls(**data)


class SolvedBlocks(dict[str, Any]):
    """Layers that were solved for blocks; equal where the names of the blocks are, which is what JSON holds."""

    def __eq__(self, other: object) -> bool:
        """Tell whether the blocks have the same names in the same order."""
        return isinstance(other, Mapping | tuple) and tuple(self) == tuple(other)

    __hash__ = None


def _several(name: str, value: Any) -> Any:
    """Return one text, or texts in a row, as a tuple; a mapping as it is."""
    if isinstance(value, str):
        return (value,)
    if name == "blocks" and isinstance(value, Mapping):
        return SolvedBlocks(value)
    if not isinstance(value, list | tuple | set | frozenset) or not all(isinstance(one, str) for one in value):
        raise PlanError(f"{name} must be a name or several in a row, got {value!r:.80}")
    return tuple(sorted(value)) if isinstance(value, set | frozenset) else tuple(value)


def _check_methods(names: Any) -> None:
    known = plannable()
    unknown = [name for name in names if name not in known]
    if unknown and unknown[0] in methods():
        raise PlanError(
            f"method {unknown[0]!r} is not planned: it replaces a block, or is a form to train in; the methods are "
            f"{', '.join(known)}"
        )
    for name in names or ("",):
        one_of("method", name, known, other=OWN, error=MethodError)


def plannable() -> list[str]:
    """Return the methods that a plan may choose among for a layer."""
    trained = {method for (_, method), cls in TABLE.items() if getattr(cls, "only_trained", False)}
    return sorted(methods() - {"dense", *trained, *(method for _, method in BLOCKS)})
