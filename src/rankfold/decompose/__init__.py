"""Decompositions of tensors: tensors in, factors out. No modules, no layers."""

from rankfold.decompose._bases import ELEMENTS, Basis, Shapes, even_knots, values_of
from rankfold.decompose._btt import block_singular_values, block_tensor_train
from rankfold.decompose._coupled import Coupled, coupled
from rankfold.decompose._coupled_start import Neurons
from rankfold.decompose._cp import cp, cp_errors, full_cp_rank
from rankfold.decompose._cp_metric import metric_cp, metric_cp_errors
from rankfold.decompose._curves import monotone_curve
from rankfold.decompose._factors import BTT, CP, SVD, TR, TT, KroneckerSum, TTMatrix, Tucker
from rankfold.decompose._kronecker import kronecker_sum, rearranged
from rankfold.decompose._metric import metric_error
from rankfold.decompose._ring import ring_bonds, tensor_ring
from rankfold.decompose._shared import SharedSVD, shared_svd
from rankfold.decompose._spatial import Separable, separable, separable_errors
from rankfold.decompose._svd import singular_values, svd
from rankfold.decompose._tt import tensor_train, tt_matrix, tt_round, tt_roundings, tt_spectra
from rankfold.decompose._tt_metric import metric_tt_errors, metric_tt_matrix
from rankfold.decompose._tt_shapes import balanced_shape, bonds, pair_modes
from rankfold.decompose._tucker import tucker, tucker_errors
from rankfold.decompose._tucker_metric import metric_tucker, metric_tucker_errors

__all__ = [
    "BTT",
    "Basis",
    "CP",
    "Coupled",
    "ELEMENTS",
    "KroneckerSum",
    "Neurons",
    "SVD",
    "Separable",
    "Shapes",
    "SharedSVD",
    "TR",
    "TT",
    "TTMatrix",
    "Tucker",
    "balanced_shape",
    "block_singular_values",
    "block_tensor_train",
    "bonds",
    "coupled",
    "cp",
    "cp_errors",
    "even_knots",
    "full_cp_rank",
    "kronecker_sum",
    "metric_cp",
    "metric_cp_errors",
    "metric_error",
    "metric_tt_errors",
    "metric_tt_matrix",
    "metric_tucker",
    "metric_tucker_errors",
    "monotone_curve",
    "pair_modes",
    "rearranged",
    "ring_bonds",
    "separable",
    "separable_errors",
    "shared_svd",
    "singular_values",
    "svd",
    "tensor_ring",
    "tensor_train",
    "tt_matrix",
    "tt_round",
    "tt_roundings",
    "tt_spectra",
    "tucker",
    "tucker_errors",
    "values_of",
]
