"""Ranks from singular values, costs and budgets: numbers in, integers out."""

from rankfold.ranks._allocation import Allocation, allocate, undominated
from rankfold.ranks._spectra import EVBMF, energy, evbmf, stable_rank

__all__ = [
    "Allocation",
    "EVBMF",
    "allocate",
    "energy",
    "evbmf",
    "stable_rank",
    "undominated",
]
