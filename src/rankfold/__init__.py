"""Rankfold makes PyTorch networks small and fast by low-rank and tensor decompositions."""

from rankfold import decompose, layers, ranks, spectrum, train
from rankfold.errors import BudgetError, RankfoldError
from rankfold.exporters import export
from rankfold.pipeline import compress, plan, search
from rankfold.planning import Budget, Choice, Plan, Planning
from rankfold.recalibration import recalibrate
from rankfold.reports import Report, report
from rankfold.stats import Stats, measure
from rankfold.store import load, save
from rankfold.surgery import apply, densify, fold_batchnorm, separate_attention

__all__ = [
    "Budget",
    "BudgetError",
    "Choice",
    "Plan",
    "Planning",
    "RankfoldError",
    "Report",
    "Stats",
    "apply",
    "compress",
    "decompose",
    "densify",
    "export",
    "fold_batchnorm",
    "layers",
    "load",
    "measure",
    "plan",
    "ranks",
    "recalibrate",
    "report",
    "save",
    "search",
    "separate_attention",
    "spectrum",
    "train",
]
