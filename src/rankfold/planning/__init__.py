"""Plans: what becomes of every layer of a model, decided before a single weight changes."""

from rankfold.planning._candidates import layer_seed, run
from rankfold.planning._names import near
from rankfold.planning._plan import Budget, Choice, Plan
from rankfold.planning._refusals import structural_refusals
from rankfold.planning._rules import RULES, Select
from rankfold.planning._search import plan

__all__ = ["RULES", "Budget", "Choice", "Plan", "Select", "layer_seed", "near", "plan", "run", "structural_refusals"]
