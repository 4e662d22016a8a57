"""Rankfold makes PyTorch networks small and fast by low-rank and tensor decompositions."""

from rankfold import decompose, latency, layers, ranks, spectrum, train
from rankfold.errors import BudgetError, RankfoldError
from rankfold.exporters import export
from rankfold.pipeline import compress, plan, search
from rankfold.planning import Budget, Choice, Plan, Planning
from rankfold.recalibration import recalibrate
from rankfold.reports import Report, report
from rankfold.stats import Stats, measure
from rankfold.store import load, save
from rankfold.surgery import apply, densify, fold_batchnorm, separate_attention

__version__ = "0.1.0"

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
    "latency",
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


def __dir__() -> list[str]:
    """Return the public names: what completion should offer."""
    return [*__all__, "__doc__", "__version__"]
