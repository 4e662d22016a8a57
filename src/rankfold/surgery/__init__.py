"""Replace modules of a model: apply a plan, go back to dense, separate attention, fold BatchNorm."""

from rankfold.surgery._apply import apply, densify, replace_block
from rankfold.surgery._attention import separate_attention, with_named_projections
from rankfold.surgery._copies import copy_with
from rankfold.surgery._fold import NORMS, fold_batchnorm, folded
from rankfold.surgery._huggingface import ENTRY as CONFIG_ENTRY
from rankfold.surgery._huggingface import plan_of, register

__all__ = [
    "CONFIG_ENTRY",
    "NORMS",
    "apply",
    "copy_with",
    "densify",
    "fold_batchnorm",
    "folded",
    "plan_of",
    "register",
    "replace_block",
    "separate_attention",
    "with_named_projections",
]
