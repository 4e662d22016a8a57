"""Plans: what becomes of every layer of a model, decided before a single weight changes."""

from rankfold.planning._blocks import block_difference, block_modules, fresh_block, is_block, stand_ins
from rankfold.planning._candidates import layer_seed, run
from rankfold.planning._names import near, selected
from rankfold.planning._plan import Budget, Choice, Plan
from rankfold.planning._refusals import layer_refusal, structural_refusals, without_values
from rankfold.planning._rules import INITS, RULES, Init, Select
from rankfold.planning._search import plan

__all__ = [
    "INITS",
    "RULES",
    "Budget",
    "Choice",
    "Init",
    "Plan",
    "Select",
    "block_difference",
    "block_modules",
    "fresh_block",
    "is_block",
    "layer_refusal",
    "layer_seed",
    "near",
    "plan",
    "run",
    "selected",
    "stand_ins",
    "structural_refusals",
    "without_values",
]
