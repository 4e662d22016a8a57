"""Decompositions of tensors: tensors in, factors out. No modules, no layers."""

from rankfold.decompose._bases import Basis, Shapes
from rankfold.decompose._btt import block_singular_values, block_tensor_train
from rankfold.decompose._coupled import Coupled, coupled
from rankfold.decompose._coupled_start import Neurons
from rankfold.decompose._cp import cp, cp_errors, full_cp_rank
from rankfold.decompose._factors import BTT, CP, SVD, TR, TT, KroneckerSum, TTMatrix, Tucker
from rankfold.decompose._kronecker import kronecker_sum
from rankfold.decompose._ring import tensor_ring
from rankfold.decompose._svd import singular_values, svd
from rankfold.decompose._tt import tensor_train, tt_matrix, tt_round, tt_roundings, tt_spectra
from rankfold.decompose._tt_shapes import balanced_shape
from rankfold.decompose._tucker import tucker, tucker_errors

__all__ = [
    "BTT",
    "Basis",
    "CP",
    "Coupled",
    "KroneckerSum",
    "Neurons",
    "SVD",
    "Shapes",
    "TR",
    "TT",
    "TTMatrix",
    "Tucker",
    "balanced_shape",
    "block_singular_values",
    "block_tensor_train",
    "coupled",
    "cp",
    "cp_errors",
    "full_cp_rank",
    "kronecker_sum",
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
]
