"""SVD training: one penalty for orthonormal factors, one for sparse singular values, and no SVD while training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from rankfold._common import one_of, real
from rankfold.errors import LayerError, RankfoldError
from rankfold.planning import Plan
from rankfold.surgery import apply, densify
from rankfold.train.lowrank._method import TrainingMethod
from rankfold.train.lowrank._penalties import KINDS, orthogonality, sparsity
from rankfold.train.lowrank._targets import FORM, forms_of, unwrapped

RETRACTION = "retraction"


def _constant(_: int) -> float:
    return 1.0


SCHEDULES: Mapping[str, Callable[[int], float]] = MappingProxyType({"constant": _constant})


@final
class SVDTraining(TrainingMethod):
    """Train a model in SVD form with `loss + penalty()`, which drives its singular values to zero one by one.

    The penalty is λo sum_l [D(U_l) + D(V_l)] + λs f(step) sum_l S(s_l) over the layers l in SVD form, with
    `D(U) = ||UᵀU - I||² / r²` and S one of::

        hoyer         |s|_1 / |s|_2 - 1,         the same at every scale of s
        l1            |s|_1,                     shrinks the values that stay, too
        hoyer_square  |s|_1² / |s|_2² - 1,       the same at every scale of s

    With orthonormal factors, `abs(s)` are the singular values of the weight; otherwise the model could escape a penalty
    on s by making U and V larger. A BatchNorm after a layer undoes its scale: the L1 penalty can then be reduced at no
    cost by shrinking all of s, whereas the Hoyer measures do not depend on the scale.

    Args:
        model: a model with layers in SVD form (see `svd_form`); may be wrapped in DistributedDataParallel.
        orthogonality: λo, or "retraction" to make U and V exactly orthonormal by a QR decomposition after each step
            instead of adding a penalty.
        sparsity: λs; with 0 nothing drives the singular values to zero.
        kind: "hoyer", "l1" or "hoyer_square".
        schedule: "constant", or a function of the number of steps taken that returns the factor f of the sparsity.

    Raises:
        LayerError: the model has no layer in SVD form.
        RankfoldError: the kind or the schedule is unknown, or a weight is below 0.

    Reference:
        Yang et al. 2020, section 3.

    Example:
        >>> import rankfold as rf
        >>> form, _ = rf.train.svd_form(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)))
        >>> run = SVDTraining(form, sparsity=0.1, kind="hoyer")
        >>> run.penalty().shape, len(run.spectrum()["0"])
        (torch.Size([]), 16)
        >>> small, plan = run.prune(budget=rf.Budget(params=0.5))
    """

    in_form: ClassVar[bool] = True

    def __init__(
        self,
        model: nn.Module,
        *,
        orthogonality: float | str = 1.0,
        sparsity: float = 0.1,
        kind: str = "hoyer",
        schedule: str | Callable[[int], float] = "constant",
    ) -> None:
        one_of("kind", kind, KINDS)
        if not callable(schedule):
            one_of("schedule", schedule, SCHEDULES, other="a function of the step")
        if isinstance(orthogonality, str) and orthogonality != RETRACTION:
            raise RankfoldError(f"orthogonality must be a weight >= 0 or {RETRACTION!r}, got {orthogonality!r}")
        found = forms_of(unwrapped(model))
        if not found:
            raise LayerError(
                f"{type(unwrapped(model)).__name__} has no layer in SVD form: make one with rankfold.train.svd_form"
            )
        super().__init__(model, found)
        self._retracts = orthogonality == RETRACTION
        self.orthogonality = 0.0 if self._retracts else real("orthogonality", orthogonality)
        self.sparsity = real("sparsity", sparsity)
        self.kind = kind
        self.schedule = schedule if callable(schedule) else SCHEDULES[schedule]
        if self._retracts:
            self._retract()

    def terms(self) -> dict[str, Tensor]:
        """Return the weighted terms "orthogonality" and "sparsity", computed in float32 even under autocast."""
        triplets = [layer.triplets() for layer in self.layers.values()]
        strength = self.sparsity * self.schedule(self.steps)
        terms = {}
        with torch.autocast(triplets[0][1].device.type, enabled=False):
            if self.orthogonality:
                factors = [factor for left, _, right in triplets for factor in (left, right.mT)]
                terms["orthogonality"] = self.orthogonality * orthogonality(factors)
            if strength:
                terms["sparsity"] = strength * sparsity([values for _, values, _ in triplets], self.kind)
        return terms

    def dense(self) -> nn.Module:
        """Return a copy of the model with stock layers instead of those in SVD form."""
        return densify(unwrapped(self.model), methods=FORM)

    def prune_by_values(self, plan: Plan) -> nn.Module:
        """Return the model of a plan, keeping the largest `abs(s)` of each layer instead of an SVD of its weight.

        This is how the paper does it. It is as good as `prune` if U and V are orthonormal; if not, the difference
        shows how much that costs.
        """
        small = apply(self.dense(), plan)
        for name, choice in plan.layers.items():
            if name in self.layers and choice.method == self.layers[name].plain.method:
                cut = self.layers[name].truncated(choice.rank)
                small.get_submodule(name).load_state_dict(cut.state_dict())
        return small

    def _values(self) -> dict[str, Tensor]:
        return {name: layer.triplets()[1] for name, layer in self.layers.items()}

    def _after_step(self) -> None:
        if self._retracts:
            self._retract()

    @torch.no_grad()
    def _retract(self) -> None:
        """Replace U and V by the orthonormal factors of their QR decompositions, keeping the signs of the columns."""
        for layer in self.layers.values():
            left, values, right = layer.triplets()
            layer.write_triplets(_orthonormal(left), values, _orthonormal(right.mT).mT)


def _orthonormal(matrices: Tensor) -> Tensor:
    """Return Q of the QR decomposition whose R has a positive diagonal, in float32 or wider."""
    wide = matrices.to(torch.promote_types(matrices.dtype, torch.float32))
    factor, triangle = torch.linalg.qr(wide)
    signs: Tensor = triangle.diagonal(dim1=-2, dim2=-1).sign()
    q: Tensor = factor
    return q * torch.where(signs == 0, torch.ones_like(signs), signs)[:, None, :]
