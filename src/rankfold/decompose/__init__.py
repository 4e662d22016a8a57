"""Decompositions of tensors: tensors in, factors out. No modules, no layers."""

from rankfold.decompose._cp import cp, cp_errors, full_cp_rank
from rankfold.decompose._factors import CP, SVD, TT, TTMatrix, Tucker
from rankfold.decompose._svd import singular_values, svd
from rankfold.decompose._tt import tensor_train, tt_matrix, tt_round, tt_roundings, tt_spectra
from rankfold.decompose._tt_shapes import balanced_shape
from rankfold.decompose._tucker import tucker, tucker_errors

__all__ = [
    "CP",
    "SVD",
    "TT",
    "TTMatrix",
    "Tucker",
    "balanced_shape",
    "cp",
    "cp_errors",
    "full_cp_rank",
    "singular_values",
    "svd",
    "tensor_train",
    "tt_matrix",
    "tt_round",
    "tt_roundings",
    "tt_spectra",
    "tucker",
    "tucker_errors",
]
