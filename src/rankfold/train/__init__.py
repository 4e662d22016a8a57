"""Training: recover accuracy after compression, train towards low rank, replace a block by a flexible layer."""

from rankfold.train._batchnorm import reestimate_batchnorm
from rankfold.train._distil_blocks import BlockFit, distil_blocks
from rankfold.train._fit import fit
from rankfold.train._groups import parameter_groups
from rankfold.train._recipe import Epoch, History, Recipe
from rankfold.train.flexible._decouple import BlockError, decouple, decouple_errors, flexible_candidates
from rankfold.train.lowrank._adapters import lightning_callback, trainer_callback
from rankfold.train.lowrank._cuttlefish import Cuttlefish
from rankfold.train.lowrank._dlrt import DLRT
from rankfold.train.lowrank._lc import LC
from rankfold.train.lowrank._method import TrainingMethod
from rankfold.train.lowrank._methods import METHODS, training_method
from rankfold.train.lowrank._nuclear import NuclearNorm
from rankfold.train.lowrank._penalties import KINDS
from rankfold.train.lowrank._pufferfish import Pufferfish
from rankfold.train.lowrank._restart import restarted
from rankfold.train.lowrank._svd_form import svd_form
from rankfold.train.lowrank._svd_training import SVDTraining
from rankfold.train.lowrank._trp import TRP

__all__ = [
    "BlockError",
    "BlockFit",
    "Cuttlefish",
    "DLRT",
    "Epoch",
    "History",
    "KINDS",
    "LC",
    "METHODS",
    "NuclearNorm",
    "Pufferfish",
    "Recipe",
    "SVDTraining",
    "TRP",
    "TrainingMethod",
    "decouple",
    "decouple_errors",
    "distil_blocks",
    "fit",
    "flexible_candidates",
    "lightning_callback",
    "parameter_groups",
    "reestimate_batchnorm",
    "restarted",
    "svd_form",
    "trainer_callback",
    "training_method",
]
