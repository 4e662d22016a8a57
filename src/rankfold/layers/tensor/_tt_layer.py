"""What tensor-train layers share: all of the contract that only needs the form of a train and a folded weight."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from rankfold.layers._build import Device, copy_, place, rescale_
from rankfold.layers._contract import Metric, Options, Rank, Spectrum
from rankfold.layers._metric import corrected_bias, group_metrics
from rankfold.layers._twin import TwinLayer
from rankfold.layers.tensor._tt_chain import (
    TTForm,
    balanced_options,
    check_fillable,
    decomposed,
    dense_matrix,
    empty_cores,
    errors,
    fill_cores_,
    fresh_cores_,
    squared_norm,
)
from rankfold.layers.tensor._tt_metric import cores_in_metric, errors_in_metric

if TYPE_CHECKING:
    from typing_extensions import Self


class TTLayer(TwinLayer):
    """A layer whose weight is a tensor train; the final classes say which matrix, and how it is applied."""

    method: ClassVar[str] = "tt"
    cores: nn.ParameterList
    recompute: float | None = None

    @classmethod
    @abstractmethod
    def _form_of(
        cls, dense: Any, *, in_shape: Sequence[int] | None = None, out_shape: Sequence[int] | None = None
    ) -> TTForm:
        """Return the form of the train of a dense layer's weight; a final class may take more options."""

    @classmethod
    @abstractmethod
    def _matrix_of(cls, dense: Any) -> Tensor:
        """Return the weight in float64 as the train's matrix, `(lead, out, in)` where it has a lead."""

    def _assemble(self, form: TTForm, rank: Rank, device: Device, dtype: torch.dtype | None) -> None:
        """Give the layer empty cores."""
        self._chain = form.chain(rank)
        self._merging = self._chain.merge(0, len(self._chain.out_shape)).order
        self._form, self._rank = form, tuple(rank) if isinstance(rank, (tuple, list)) else rank
        self.cores = empty_cores(self._chain, device, dtype)

    def _fresh(self, target: float, generator: torch.Generator | None) -> None:
        """Draw cores that give the weight the squared norm `target`."""
        fresh_cores_(list(self.cores), generator)
        with torch.no_grad():
            rescale_(list(self.cores), self.squared_norm(), target)

    @property
    def rank(self) -> Rank:
        """The rank this layer was built with: a cap for every bond, or the bonds."""
        return self._rank

    @property
    def options(self) -> Options:
        """The options besides the rank: `like(dense, rank=rank, **options)` is the twin of this layer."""
        kept = {} if self.recompute is None else {"recompute": self.recompute}
        return {**self._form.options, **kept}

    def squared_norm(self) -> Tensor:
        """Return the squared Frobenius norm of the weight, from transfer matrices of the cores (differentiable)."""
        return squared_norm(list(self.cores), self._form)

    def to_dense(self) -> nn.Module:
        """Return the stock layer that computes the same function."""
        core = self.cores[0]
        dense = place(self.dense_type(**self._arguments(self), device="meta", dtype=core.dtype), core.device)
        sources: dict[str, tuple[Any, Tensor | None]] = {
            "weight": (self.weight, core),
            "bias": (self._bias(), self._bias()),
        }
        for name, (value, source) in sources.items():
            if value is not None and source is not None:
                copy_(getattr(dense, name), value)
                getattr(dense, name).requires_grad_(source.requires_grad)
        return dense.train(self.training)

    def _bias(self) -> nn.Parameter | None:
        return getattr(self, "bias", None)

    def _matrix(self) -> Tensor:
        return dense_matrix(list(self.cores), self._form, self._merging)

    @classmethod
    def variants(cls, dense: nn.Module) -> tuple[Options, ...]:
        """Return the balanced shapes of 2, 3 and 4 cores with which some rank has fewer parameters than dense."""
        form = cls._form_of(dense)
        options = balanced_options((form.out_size, form.in_size))
        return tuple(chosen for chosen in options if cls.rank_grid(dense, **chosen))

    @classmethod
    def full_rank(cls, dense: nn.Module, **options: Any) -> Rank:
        """Return the cap at which the dense layer is reproduced to rounding."""
        return cls._form_of(dense, **options).full_rank()

    @classmethod
    def rank_grid(cls, dense: nn.Module, *, multiple: int = 1, **options: Any) -> tuple[Rank, ...]:
        """Return caps (powers of two and half-way between), all with fewer parameters than the dense layer."""
        form = cls._form_of(dense, **options)
        return form.rank_grid(multiple, form.out_size * form.in_size * max(form.lead, 1))

    @classmethod
    def errors(
        cls, dense: nn.Module, ranks: Sequence[Rank], *, seed: int = 0, metric: Metric | None = None, **options: Any
    ) -> tuple[float, ...]:
        """Return the relative error of the weight at each rank, measured on one TT-SVD that is rounded to each.

        In a metric it is an estimate of the error of the outputs, slightly above what `from_dense` reaches.
        """
        del seed  # nothing is random
        form = cls._form_of(dense, **options)
        for rank in ranks:
            check_fillable(form, rank)
        groups = group_metrics(cls, dense, metric)
        if metric is None:
            return errors(form, cls._matrix_of(dense), ranks)
        if not any(groups):  # its inputs never vary, or its outputs carry no weight
            return (0.0,) * len(ranks)
        return errors_in_metric(form, cls._matrix_of(dense), ranks, groups, metric)

    @classmethod
    def spectra(cls, dense: nn.Module, **options: Any) -> tuple[Spectrum, ...]:
        """Return nothing: a single cap covers all bonds, so there is no spectrum per entry of the rank."""
        del dense, options
        return ()

    @classmethod
    def from_dense(
        cls, dense: nn.Module, *, rank: Rank, seed: int = 0, metric: Metric | None = None, **options: Any
    ) -> Self:
        """Decompose the weight by TT-SVD in float64; keeps options, dtype, device, mode and requires_grad.

        In a metric the cores are then solved for again, one after the other.
        """
        del seed  # nothing is random
        form = cls._form_of(dense, **options)
        check_fillable(form, rank)
        groups, matrix = group_metrics(cls, dense, metric), cls._matrix_of(dense)
        layer = cls._hollow(dense, rank, None, options)
        if metric is None or not any(groups) or form.chain(rank).ranks[1:-1] == form.full_bonds():
            values = decomposed(form, matrix, rank)
        else:
            values = cores_in_metric(form, matrix, rank, groups, metric)
        fill_cores_(list(layer.cores), values)
        if metric is not None:
            copy_(layer._bias(), corrected_bias(dense, layer.weight, metric))  # type: ignore[arg-type]
        else:
            copy_(layer._bias(), getattr(dense, "bias", None))
        return layer
