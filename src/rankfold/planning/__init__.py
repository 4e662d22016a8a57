"""Plans: what becomes of every layer of a model, decided before a single weight changes."""

from rankfold.planning._blocks import (
    Blocks,
    SolvedBlock,
    block_choice,
    block_difference,
    block_modules,
    check_apart,
    fresh_block,
    is_block,
    solved_block,
    stand_ins,
)
from rankfold.planning._budget import QUANTITIES, Budget, Measured
from rankfold.planning._candidates import layer_seed, run
from rankfold.planning._joint import Contest, check_blocks
from rankfold.planning._metrics import METRICS, check_stats
from rankfold.planning._names import near, selected
from rankfold.planning._objectives import CALIBRATED, SQUARES
from rankfold.planning._plan import Choice, Plan
from rankfold.planning._refusals import layer_refusal, structural_refusals, without_values
from rankfold.planning._rules import INITS, RULES, Init, Select
from rankfold.planning._search import candidates, plan, planned_metric
from rankfold.planning._select import Candidates, excess, refusal
from rankfold.planning._ties import tied_heads

__all__ = [
    "Blocks",
    "Budget",
    "CALIBRATED",
    "Candidates",
    "Choice",
    "Contest",
    "INITS",
    "Init",
    "METRICS",
    "Measured",
    "Plan",
    "QUANTITIES",
    "RULES",
    "SQUARES",
    "Select",
    "SolvedBlock",
    "block_choice",
    "block_difference",
    "block_modules",
    "candidates",
    "check_apart",
    "check_blocks",
    "check_stats",
    "excess",
    "fresh_block",
    "is_block",
    "layer_refusal",
    "layer_seed",
    "near",
    "plan",
    "planned_metric",
    "refusal",
    "run",
    "selected",
    "solved_block",
    "stand_ins",
    "structural_refusals",
    "tied_heads",
    "without_values",
]
