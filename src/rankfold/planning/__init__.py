"""Plans: what becomes of every layer of a model, decided before a single weight changes."""

from rankfold.planning._amounts import QUANTITIES, Amounts, Quantity
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
from rankfold.planning._budget import Budget, Measured
from rankfold.planning._candidates import candidates, planned_metric
from rankfold.planning._choice import Choice, joined, option_text
from rankfold.planning._fits import fits
from rankfold.planning._joint import Contest, check_blocks
from rankfold.planning._layer import layer_seed, run
from rankfold.planning._metrics import AUTO, METRICS, check_stats
from rankfold.planning._names import selected
from rankfold.planning._objectives import CALIBRATED, OBJECTIVES, SQUARES
from rankfold.planning._plan import Plan
from rankfold.planning._planning import MethodName, MetricName, ObjectiveName, Planning, plannable
from rankfold.planning._refusals import layer_refusal, structural_refusals, without_values
from rankfold.planning._rules import INITS, RULES, Init, RuleName, Select, rule_of
from rankfold.planning._select import Candidates, budget_error, excess
from rankfold.planning._ties import tied_heads

__all__ = [
    "AUTO",
    "Amounts",
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
    "MethodName",
    "MetricName",
    "OBJECTIVES",
    "ObjectiveName",
    "Plan",
    "Planning",
    "QUANTITIES",
    "Quantity",
    "RULES",
    "RuleName",
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
    "fits",
    "fresh_block",
    "is_block",
    "joined",
    "layer_refusal",
    "layer_seed",
    "option_text",
    "plannable",
    "planned_metric",
    "budget_error",
    "rule_of",
    "run",
    "selected",
    "solved_block",
    "stand_ins",
    "structural_refusals",
    "tied_heads",
    "without_values",
]
